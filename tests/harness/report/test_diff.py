"""Two runs against each other: what got worse is told apart from what merely changed."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import harness.cli  # noqa: F401 - it adds the commands
from bridge.cli import app
from harness.errors import EvidenceError
from harness.report.diff import Change, compare_runs
from harness.report.evidence import to_json

Make = Callable[..., dict[str, Any]]
LOGITS = "logits/tied/tp1-pp1/float32/long"


@pytest.fixture
def data(make_evidence: Make) -> dict[str, Any]:
    """Evidence of one's own."""
    return copy.deepcopy(make_evidence())


def case(data: dict[str, Any], name: str = LOGITS) -> dict[str, Any]:
    """One case of it."""
    found: dict[str, Any] = next(one for one in data["cases"] if one["id"] == name)
    return found


def changed(data: dict[str, Any], change: Callable[[dict[str, Any]], object]) -> list[Change]:
    """What is told of a run after a change."""
    other = copy.deepcopy(data)
    change(other)
    return compare_runs(data, other)


def test_a_run_does_not_differ_from_itself(data: dict[str, Any]) -> None:
    """NaN included; times and memory are no difference."""
    assert compare_runs(data, copy.deepcopy(data)) == []
    assert changed(data, lambda other: other.update(seconds=99.0, memory={})) == []


@pytest.mark.parametrize(
    ("change", "kind", "what", "regression"),
    [
        (lambda d: case(d).update(status="failed"), "worse", LOGITS, True),
        (lambda d: case(d).update(status="error"), "worse", LOGITS, True),
        (lambda d: case(d).update(status="not run"), "worse", LOGITS, True),
        (
            lambda d: case(d, "config/puzzle/float32").update(status="passed"),
            "better", "config/puzzle/float32", False,
        ),
        (lambda d: d["cases"].remove(case(d)), "only in a", LOGITS, True),
        (lambda d: case(d).update(value=1.6), "moved", LOGITS, True),
        (lambda d: case(d).update(value=0.1), "moved", LOGITS, False),
        (lambda d: case(d).update(value="nan"), "moved", LOGITS, True),
        (lambda d: case(d).update(value=None), "moved", LOGITS, False),
        (lambda d: d.update(code_sha256="c" * 64), "changed", "code_sha256", False),
        (
            lambda d: d["environment"]["versions"].update(torch="2.7"),
            "changed", "environment > versions > torch", False,
        ),
        (
            lambda d: d["inputs"]["tied/float32"].update(config_sha256="1" * 64),
            "changed", "inputs > tied/float32 > config_sha256", False,
        ),
    ],
)  # fmt: skip
def test_one_change_is_told_once_and_judged(
    data: dict[str, Any],
    change: Callable[[dict[str, Any]], object],
    kind: str,
    what: str,
    regression: bool,  # noqa: FBT001 - the verdict
) -> None:
    """Its kind, its place, and whether the second run proves less."""
    (found,) = changed(data, change)
    assert (found.kind, found.what, found.regression) == (kind, what, regression)


def test_a_value_within_the_ratio_is_not_told(data: dict[str, Any]) -> None:
    """0.97 to 1.3 is a factor of 1.34."""
    assert changed(data, lambda other: case(other).update(value=1.3)) == []
    other = copy.deepcopy(data)
    case(other)["value"] = 1.3
    assert [one.kind for one in compare_runs(data, other, ratio=1.2)] == ["moved"]


def test_a_raised_limit_is_a_regression_and_a_lowered_one_is_not(data: dict[str, Any]) -> None:
    """A check that was loosened passes as well."""
    for factor, regression in ((2, True), (0.5, False)):
        other = copy.deepcopy(data)
        limit = next(one for one in other["thresholds"] if one["name"] == "logits.excess")
        limit["limit"] *= factor
        (found,) = compare_runs(data, other)
        assert found.what == f"thresholds > logits.excess ({limit['dtype']}) > limit"
        assert found.regression is regression


@pytest.mark.parametrize(
    ("before", "after", "regression"),
    [(1024, 512, True), (1024, 2048, False), (None, 1024, True), (1024, None, False)],
)
def test_a_limit_that_grows_sooner_is_a_regression(
    data: dict[str, Any],
    before: int | None,
    after: int | None,
    regression: bool,  # noqa: FBT001
) -> None:
    """Beyond that width it is the looser one."""
    first, second = copy.deepcopy(data), copy.deepcopy(data)
    for run, width in ((first, before), (second, after)):
        next(one for one in run["thresholds"] if one["name"] == "logits.excess")["hidden_size"] = (
            width
        )
    (found,) = compare_runs(first, second)
    assert found.what.endswith(" > hidden_size")
    assert found.regression is regression


def test_regressions_come_first(data: dict[str, Any]) -> None:
    """Whatever else has changed."""
    other = copy.deepcopy(data)
    other["code_sha256"] = "c" * 64
    case(other)["status"] = "failed"
    assert [one.regression for one in compare_runs(data, other)] == [True, False]


def test_the_command_exits_with_0_1_or_2(data: dict[str, Any], tmp_path: Path) -> None:
    """Nothing worse, something worse, and no evidence; --json prints one document."""
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "evidence.json").write_text(to_json(data), "utf-8")
    worse = copy.deepcopy(data)
    case(worse)["status"] = "failed"
    (tmp_path / "b.json").write_text(to_json(worse), "utf-8")
    run = CliRunner().invoke
    same = run(app, ["diff", str(tmp_path / "a"), str(tmp_path / "a" / "evidence.json")])
    assert (same.exit_code, same.output.strip()) == (0, "no difference")
    found = run(app, ["diff", str(tmp_path / "a"), str(tmp_path / "b.json")])
    assert found.exit_code == 1
    assert "1 differences, 1 regressions" in found.output
    found = run(app, ["diff", str(tmp_path / "a"), str(tmp_path / "b.json"), "--json"])
    assert json.loads(found.output)["changes"][0]["what"] == LOGITS
    missing = run(app, ["diff", str(tmp_path / "a"), str(tmp_path / "none")])
    assert isinstance(missing.exception, EvidenceError)
    assert missing.exception.exit_code == 2
