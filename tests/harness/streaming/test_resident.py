"""Megatron whole on ranks, the reference and the truth from the walk."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from harness.bench import Subject
from harness.checks.logits import run
from harness.faults import fault_named
from harness.hooks import HEALTHY, Fault
from harness.runner import run_case
from harness.streaming.bench import StreamingBench
from harness.streaming.walking import Streaming
from harness.suite import Case
from harness.toys import toy_named
from tests.harness.streaming.conftest import case_of

pytestmark = pytest.mark.ranks


@pytest.fixture
def bench(tmp_path: Path) -> Callable[..., StreamingBench]:
    """A bench for a configuration with synthetic weights."""
    path = tmp_path / "config.json"
    path.write_text(json.dumps(toy_named("super-49b-v1").config_for("bfloat16")), "utf-8")
    workdir = tmp_path / "work"
    workdir.mkdir()

    def make(*, resident: bool = True, fault: Fault = HEALTHY, seed: int = 0) -> StreamingBench:
        return StreamingBench(
            workdir,
            subjects={
                "m": Subject(
                    name="m", hf=path, seed=seed, streamed="resident" if resident else "walk"
                )
            },
            fault=fault,
            streaming=Streaming(memory_budget=1 << 30, quiet=True),
        )

    return make


def logits(layout: str = "tp2-pp1") -> Case:
    """Of the long probe."""
    return replace(case_of("logits"), layout=layout)


@pytest.mark.parametrize("layout", ["tp1-pp1", "tp2-pp1", "tp1-pp2"])
def test_a_whole_model_of_synthetic_weights_is_proved_in_any_layout(
    bench: Callable[..., StreamingBench], layout: str
) -> None:
    """Its ranks draw their own shares of the same weights."""
    with bench(seed=5) as one:
        found = run(logits(layout), one)
    assert found.passed, found.summary
    assert found.value is not None
    assert 0.5 < found.value < 2


def test_other_weights_on_the_ranks_are_seen(bench: Callable[..., StreamingBench]) -> None:
    """What goes wrong when whole models are filled shows there, and not in the walk."""
    wrong = fault_named("norm-one-less")
    with bench(fault=wrong, resident=False) as walked:
        assert run(logits("tp1-pp1"), walked).passed
    with bench(fault=wrong) as whole:
        found = run_case(logits(), whole)
    assert found.status == "failed"
    assert found.finding is not None
    assert found.finding.value is not None
    assert found.finding.value > 2
    assert "not localised: only the walk has looked at blocks" in found.finding.places


def test_blocks_are_those_of_the_walk(bench: Callable[..., StreamingBench]) -> None:
    """Nobody claims to have seen those of the ranks."""
    with bench() as one:
        assert one.can_answer(case_of("blocks"))
        assert not one.can_answer(replace(case_of("blocks"), layout="tp2-pp1"))
        assert not one.can_answer(replace(case_of("blocks"), layers="te"))
        assert one.can_answer(replace(logits(), layers="te"))
