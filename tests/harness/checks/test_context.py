"""Logits of real long sequences: real models agree, and what only length shows is seen."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

import numpy as np
import pytest

from harness import localize
from harness.bench import Bench
from harness.checks import logits
from harness.compare import Finding
from harness.hooks import HEALTHY, Fault
from harness.probes import CONTEXT_LENGTHS
from harness.reference import attention_for
from harness.runner import run_case
from harness.suite import PROBES, Case, load_suite, suite_names
from harness.thresholds import judge_logits, load_thresholds

if TYPE_CHECKING:
    from tests.harness.checks import context_functions as faults
else:  # a module beside this file: tests are not a package
    sys.path.append(str(Path(__file__).parent))
    import context_functions as faults

LENGTH = 2048
"""Of the longest probe here: a CPU's size, and yet four bands of the oracle's."""


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    """One bench, so that the ranks are started once; its long probes are short ones."""
    with (
        mock.patch.dict(CONTEXT_LENGTHS, {"context-32k": LENGTH}),
        Bench(tmp_path_factory.mktemp("context"), timeout=120) as found,
    ):
        yield found


def finding(
    bench: Bench, layout: str, fault: Fault = HEALTHY, probe: str = "context-32k"
) -> Finding:
    """What `logits` finds on the toy for long runs; anything but a finding fails the test."""
    case = Case(check="logits", model="context", dtype="float32", layout=layout, probe=probe)
    result = run_case(case, bench if fault is HEALTHY else bench.under(fault))
    assert result.finding is not None, result.traceback
    return result.finding


@pytest.mark.ranks
@pytest.mark.parametrize("layout", ["tp1-pp1", "tp2-pp1", "tp2-pp1-sp"])
def test_reference_megatron_and_oracle_agree_on_2048_real_tokens(layout: str, bench: Bench) -> None:
    """As close to the truth as the reference at every token; it counts positions as it is told."""
    found = finding(bench, layout)
    assert found.passed, found
    assert found.details["counts_as_told"] is True
    drawn: Any = found.details["by_position"]
    assert drawn["positions"][-1] == LENGTH - 1
    assert {512} == {len(row) for row in drawn.values()}


@pytest.mark.ranks
def test_attention_that_forgets_is_seen_by_real_length_alone(bench: Bench) -> None:
    """A window of 1,024 tokens holds all 48 tokens of the long probe, whatever their positions."""
    assert finding(bench, "tp1-pp1", faults.WINDOWED, "long").passed
    found = finding(bench, "tp1-pp1", faults.WINDOWED)
    assert not found.passed
    first = next(place for place in found.places if place.startswith("first token beyond"))
    assert faults.WINDOW <= int(first.rpartition(" ")[2]) < LENGTH
    assert "not localised on context-32k" in found.places[-1]


@pytest.mark.ranks
def test_a_reference_whose_scores_fit_nowhere_stores_none(bench: Bench) -> None:
    """Its attention is transformers' `sdpa`, which is as near to the truth, and said."""
    with (
        mock.patch.dict(CONTEXT_LENGTHS, {"context-128k": LENGTH // 2}),
        mock.patch("harness.reference._EAGER_UP_TO", LENGTH // 2 - 1),
        mock.patch("bridge.decilm.layers.eager_attention_forward", side_effect=MemoryError),
    ):
        found = finding(bench, "tp1-pp1", probe="context-128k")
    assert found.passed, found
    assert found.details["reference"] == "run here, with sdpa attention"


def test_only_128k_tokens_are_too_many_for_eager_attention() -> None:
    """Published limits and verdicts were measured with eager attention."""
    assert [attention_for(length) for length in (48, *CONTEXT_LENGTHS.values())] == [
        "eager", "eager", "sdpa",
    ]  # fmt: skip


@pytest.mark.ranks
def test_a_model_that_counts_otherwise_than_it_is_told_is_seen(bench: Bench) -> None:
    """Told the positions its logits are right, so the judgement alone would pass."""
    found = finding(bench, "tp1-pp1", faults.COUNTS_DOUBLE)
    assert not found.passed
    assert found.details["counts_as_told"] is False
    assert found.summary.startswith("told positions 0, 1, 2, ... logits are up to ")
    assert found.summary in found.places


def test_no_mistake_is_tried_on_a_whole_context() -> None:
    """Each try is a block in float64; the bench is not even asked."""
    case = Case(check="logits", model="context", dtype="float32", probe="context-128k")
    asked = mock.Mock(localises=True)
    found = localize.localisation(case, asked)
    assert found.places
    asked.localisation.assert_not_called()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("wrong", ["candidate", "reference", None])
def test_a_mistake_at_the_end_does_not_drown_in_a_whole_context(
    wrong: str | None, dtype: str
) -> None:
    """64 of 2,048 tokens are off by many times rounding; over all of them it is little."""
    rng = np.random.default_rng(3)
    truth = rng.normal(size=(1, LENGTH, 8))
    unit = 2.0 ** -{"float32": 23, "bfloat16": 7}[dtype]
    noise = {name: 2 * unit * rng.normal(size=truth.shape) for name in ("candidate", "reference")}
    if wrong is not None:
        noise[wrong][:, -64:] *= {"candidate": 4, "reference": 16}[wrong]
    ours, theirs = ((truth + noise[name]).astype(np.float32) for name in noise)
    judged = judge_logits(ours, theirs, truth, dtype=dtype)
    assert judged.passed
    again = logits.by_stretch(judged, dtype)
    assert again.passed == (wrong is None)
    assert again.odd_one_out == wrong
    assert again.excess is judged.excess


def test_the_check_judges_each_stretch_of_a_whole_context_and_of_nothing_else() -> None:
    """The same logits pass as a user's own input, which is judged as a whole."""
    rng = np.random.default_rng(4)
    truth = rng.normal(size=(1, LENGTH, 8))
    reference, candidate = ((truth + 1e-6 * rng.normal(size=truth.shape)) for _ in range(2))
    candidate[:, -64:] += 4 * (candidate - truth)[:, -64:]
    bench = mock.Mock()
    bench.oracle_logits.return_value = truth
    bench.limits.return_value = load_thresholds()
    bench.detached.return_value = None
    bench.probe.return_value.position_ids = np.arange(LENGTH)
    for probe, passes in (("context-32k", False), ("input", True)):
        case = Case(check="logits", model="context", dtype="float32", probe=probe)
        ours, theirs = candidate.astype(np.float32), reference.astype(np.float32)
        assert logits.judge(case, bench, ours, theirs).passed == passes, probe


@pytest.mark.parametrize("length", [1, 48, 511, 512, 513, 1300, 131_072])
def test_a_figure_has_few_points_and_loses_no_outlier(length: int) -> None:
    """Each stretch shows its worst token, at its last position; short sequences show each token."""
    rng = np.random.default_rng(length)
    truth = rng.normal(size=(1, length, 8))
    reference = (truth + 1e-7 * rng.normal(size=truth.shape)).astype(np.float32)
    candidate = reference.copy()
    worst = length // 3
    candidate[0, worst, 0] += 100
    judged = judge_logits(candidate, reference, truth, dtype="float32")
    drawn: Any = logits._by_position(judged, list(range(length)))
    positions = drawn["positions"]
    assert positions == sorted(set(positions))
    assert positions[-1] == length - 1
    assert len(positions) == (length if length <= 512 else -(-length // -(-length // 512)))
    assert {len(positions)} == {len(row) for row in drawn.values()}
    point = next(index for index, position in enumerate(positions) if position >= worst)
    assert (
        point == int(np.argmax(drawn["max_abs_diff"])) == int(np.argmax(drawn["candidate_error"]))
    )
    assert drawn["max_abs_diff"][point] == pytest.approx(100, rel=1e-3)
    assert drawn["top5"][point] <= 1


def test_the_context_suite_runs_whole_contexts_where_kernels_keep_no_scores() -> None:
    """131,072 tokens only by fused kernels, 32,768 also in float32; nobody else runs either."""
    cases = load_suite("context_gpu").cases
    assert {("context", "cuda")} == {(case.model, case.device) for case in cases}
    logits = {(one.probe, one.dtype, one.layers) for one in cases if one.check == "logits"}
    assert logits == {
        ("context-32k", "float32", "local"),
        ("context-32k", "float32", "te-unfused"),
        *(
            (probe, "bfloat16", layers)
            for probe in ("context-32k", "context-128k")
            for layers in ("te-fused", "te-flash")
        ),
    }
    for kind in logits:
        layouts = {c.layout for c in cases if (c.probe, c.dtype, c.layers) == kind}
        assert {"tp1-pp1", "tp2-pp1"} <= layouts
    assert "context-128k" not in {case.probe for case in cases if case.check == "blocks"}
    assert PROBES == ("short", "long")
    for name in set(suite_names()) - {"context_gpu"}:
        others = load_suite(name).cases
        assert {"context"}.isdisjoint({case.model for case in others})
        assert {case.probe for case in others} <= {None, *PROBES}
