"""Work is timed by whoever does it, in turns, and not before it is warm."""

from __future__ import annotations

import time

import pytest
import torch

from harness.benchmarks import stopwatch
from harness.benchmarks.stopwatch import in_turns, seconds


def test_works_alternate_and_warm_up_counts_for_nothing() -> None:
    """One warm-up and two samples of each."""
    log: list[str] = []
    works = {"a": lambda: log.append("a"), "b": lambda: log.append("b")}
    found = in_turns(works, repeats=2, warm_up=1)
    assert "".join(log) == "ababab"
    assert {name: len(samples) for name, samples in found.items()} == {"a": 2, "b": 2}


def test_the_first_run_is_no_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes nine seconds, the others fewer."""
    taken = iter([9.0, 1.0, 2.0])
    monkeypatch.setattr(stopwatch, "seconds", lambda _work, _device: next(taken))
    assert in_turns({"a": lambda: None}, repeats=2, warm_up=1) == {"a": [1.0, 2.0]}


def test_a_cpu_is_timed_by_the_clock() -> None:
    """At least what it slept."""
    assert seconds(lambda: time.sleep(0.05)) >= 0.05


def test_a_gpu_is_timed_by_its_own_events(monkeypatch: pytest.MonkeyPatch) -> None:
    """Recorded around the work, from an idle device on, and read once it is done; 1500 ms."""
    log: list[str] = []

    class Event:
        def __init__(self, *, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            log.append("record")

        def elapsed_time(self, last: Event) -> float:
            assert last is not self
            log.append("read")
            return 1500.0

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: log.append("wait"))
    assert seconds(lambda: log.append("work"), "cuda") == 1.5
    assert log == ["wait", "record", "work", "record", "wait", "read"]
