"""A suite is what it says, or an error that names everything wrong with it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from harness.checks import CHECKS
from harness.errors import SuiteError
from harness.suite import Case, layers_named, load_suite, parse_suite, select, suite_names
from harness.toys import TOYS, VARIANT_TOYS


def parse(*runs: dict[str, Any], **top: object) -> tuple[Case, ...]:
    """Cases of a suite written in Python."""
    document = {"schema_version": 1, "run": list(runs), **top}
    return parse_suite(document, name="test", where="test.toml").cases


RUN = {"checks": ["config"], "models": ["toy:nano-4b"], "dtypes": ["float32"]}


def test_a_run_is_the_product_of_its_lists_over_the_axes_a_check_has() -> None:
    """A configuration has no layout, RoPE no probe, logits both."""
    cases = parse(
        {
            "checks": ["config", "rope", "logits"],
            "models": ["toy:nano-4b", "toy:tied"],
            "layouts": ["tp1-pp1", "tp2-pp1"],
            "dtypes": ["float32"],
            "probes": ["short", "long"],
        }
    )
    per_model = [
        "config/{}/float32",
        "rope/{}/tp1-pp1/float32",
        "rope/{}/tp2-pp1/float32",
        "logits/{}/tp1-pp1/float32/short",
        "logits/{}/tp1-pp1/float32/long",
        "logits/{}/tp2-pp1/float32/short",
        "logits/{}/tp2-pp1/float32/long",
    ]
    expected = {one.format(model) for one in per_model for model in ("nano-4b", "tied")}
    assert expected == {case.id for case in cases}
    assert len(expected) == len(cases)


def test_defaults_fill_what_a_run_leaves_out_and_nothing_else() -> None:
    """A run's own list replaces the default one."""
    defaults = {"models": ["toy:nano-4b"], "dtypes": ["float32"], "layouts": ["tp1-pp1"]}
    cases = parse(
        {"checks": ["config"]},
        {"checks": ["placement"], "models": ["toy:tied"]},
        defaults=defaults,
    )
    assert [c.id for c in cases] == ["config/nano-4b/float32", "placement/tied/tp1-pp1/float32"]


def test_layers_are_an_axis_of_what_has_a_live_model() -> None:
    """Local ones go without saying; a round trip and a configuration have none."""
    cases = parse(
        {
            "checks": ["config", "round_trip", "rope"],
            "models": ["toy:tied"],
            "layouts": ["tp1-pp1"],
            "dtypes": ["bfloat16"],
            "layers": ["local", "te", "te-fused"],
            "device": "cuda",
        }
    )
    assert [case.id for case in cases] == [
        "config/tied/bfloat16/cuda",
        "round_trip/tied/tp1-pp1/bfloat16/cuda",
        "rope/tied/tp1-pp1/bfloat16/cuda",
        "rope/tied/tp1-pp1/bfloat16/cuda/te",
        "rope/tied/tp1-pp1/bfloat16/cuda/te-fused",
    ]


def test_layers_by_default_are_transformer_engine_s_where_it_can_run(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What is named is taken as it is; the case then says what it lacks."""
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    assert [layers_named("auto", device) for device in ("cpu", "cuda")] == ["local", "local"]
    assert layers_named("te-flash", "cpu") == "te-flash"
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    assert [layers_named("auto", device) for device in ("cpu", "cuda")] == ["local", "te"]


def test_the_device_is_part_of_the_id_where_it_is_not_the_cpu() -> None:
    """The same case on a GPU is another case."""
    (case,) = parse({**RUN, "device": "cuda"})
    assert case.id == "config/nano-4b/float32/cuda"


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"checks": ["no-such-check"]}, "checks: 'no-such-check' is not one of config"),
        ({"models": ["toy:nano-5b"]}, "no toy is called 'toy:nano-5b'"),
        ({"models": ["nano-4b"]}, "'nano-4b' must be toy:NAME"),
        ({"dtypes": ["float8"]}, "'float8' is not one of float32, bfloat16"),
        ({"checks": ["rope"]}, "run 1: layouts is missing"),
        ({"checks": ["rope"], "layouts": ["tp2xpp1"]}, "no layout is called 'tp2xpp1'"),
        ({"checks": ["logits"], "layouts": ["tp1-pp1"], "probes": ["far"]}, "'far' is not one of"),
        ({"models": []}, "run 1: models is missing"),
        ({"models": "toy:nano-4b"}, "models must be a list of strings"),
        ({"check": ["config"]}, "unknown key check"),
        ({"device": "tpu"}, "device must be one of cpu, cuda"),
        ({"models": ["toy:tied", "toy:tied"]}, "config/tied/float32 comes twice"),
    ],
)
def test_what_makes_no_sense_is_refused_by_name(change: dict[str, Any], problem: str) -> None:
    """A misspelt check would otherwise silently check nothing."""
    with pytest.raises(SuiteError) as caught:
        parse({**RUN, **change})
    assert problem in str(caught.value)
    assert caught.value.exit_code == 2


def test_all_problems_come_in_one_error() -> None:
    """One look, one edit."""
    with pytest.raises(SuiteError) as caught:
        parse({**RUN, "checks": ["a"]}, {**RUN, "dtypes": ["b"]}, colour="red")
    text = str(caught.value)
    assert all(one in text for one in ("'a' is not", "'b' is not", "unknown key colour"))


def test_a_suite_of_another_schema_or_without_runs_is_refused(tmp_path: Path) -> None:
    """An empty suite must not look like a success."""
    with pytest.raises(SuiteError, match="schema_version"):
        parse(RUN, schema_version=2)
    with pytest.raises(SuiteError, match=r"\[\[run\]\]"):
        parse()
    broken = tmp_path / "broken.toml"
    broken.write_text("schema_version = ", "utf-8")
    with pytest.raises(SuiteError, match="not a suite"):
        load_suite(str(broken))
    with pytest.raises(SuiteError, match="no suite 'nope'"):
        load_suite("nope")


def test_selecting_takes_a_part_of_the_id_or_a_glob_over_all_of_it() -> None:
    """`tp2` is everything at TP=2; a glob must fit the whole id."""
    cases = load_suite("parity").cases
    part = select(cases, ["logits/tied/tp2"])
    assert {"tp2-pp1", "tp2-pp2", "tp2-pp1-sp", "tp2-pp2-sp"} == {case.layout for case in part}
    assert {"tied"} == {case.model for case in part}
    inside = select(cases, ["tied/tp2-pp1/"])
    assert {"tied"} == {case.model for case in inside}
    assert {"tp2-pp1"} == {case.layout for case in inside}
    assert {"placement", "rope", "logits", "layouts", "resharding", "blocks"} == {
        one.check for one in inside
    }
    glob = select(cases, ["rope/*/tp4-pp1/*"])
    assert set(TOYS) == {case.model for case in glob}
    assert {"rope"} == {case.check for case in glob}
    assert len(select(cases, ["config/", "config/tied"])) == len(TOYS)


def test_selecting_nothing_is_an_error() -> None:
    """A run that checks nothing must not be green."""
    with pytest.raises(SuiteError, match="none of 1 cases is selected by nothing-like-it"):
        select(parse(RUN), ["nothing-like-it"])


def test_the_parity_suite_covers_the_whole_family() -> None:
    """Every variant, tied and puzzle; every layout promised; short and long positions."""
    cases = load_suite("parity").cases
    assert {*VARIANT_TOYS, "tied", "puzzle"} == {case.model for case in cases}
    logits = {(case.layout, case.probe) for case in cases if case.check == "logits"}
    layouts = {
        "tp1-pp1", "tp2-pp1", "tp1-pp2", "tp2-pp2", "tp4-pp1", "tp1-pp2-uneven", "tp1-pp2-vp2",
    }  # fmt: skip
    assert {(layout, probe) for layout in layouts for probe in ("short", "long")} <= logits
    assert {"tp2-pp1-sp", "tp2-pp2-sp"} < {layout for layout, _ in logits}
    loaded = {case.model for case in cases if case.check == "resharding"}
    assert {"nano-4b", "ultra-253b"} <= loaded
    assert set(CHECKS) == {case.check for case in cases}
    assert "parity" in suite_names()
