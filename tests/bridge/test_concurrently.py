"""Two pieces of work at once: both results, or the first failure, and nobody goes on after it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import NoReturn

import pytest

from bridge.concurrently import both
from bridge.progress import Advance

BOUND = 20.0
"""Seconds after which a test gives up: a piece of work that is not stopped would go on for ever."""


def until_stopped(stopped: threading.Event) -> Callable[[Advance], NoReturn]:
    """Work that goes on until its `advance` raises."""

    def work(advance: Advance) -> NoReturn:
        timer = threading.Event()
        for _ in range(int(BOUND * 100)):
            timer.wait(0.01)
            try:
                advance(1)
            except BaseException:
                stopped.set()
                raise
        raise AssertionError("nobody has stopped it")

    return work


def failing(error: BaseException, after: threading.Event | None = None) -> Callable[[Advance], int]:
    """Work that fails after a step, once the other has begun."""

    def work(advance: Advance) -> int:
        advance(1)
        if after is not None:
            assert after.wait(BOUND)
        raise error

    return work


def test_both_results_and_the_steps_of_both() -> None:
    """The second runs in a thread of its own, while the first runs here."""
    steps: list[int] = []
    meet = threading.Barrier(2, timeout=BOUND)

    def one(advance: Advance) -> threading.Thread:
        meet.wait()
        advance(1)
        return threading.current_thread()

    def other(advance: Advance) -> threading.Thread:
        meet.wait()
        advance(2)
        return threading.current_thread()

    here, there = both(one, other, steps.append)
    assert here is threading.current_thread() is not there
    assert sorted(steps) == [1, 2]


@pytest.mark.parametrize("error", [OSError("a"), KeyboardInterrupt()])
def test_a_failure_here_stops_the_other(error: BaseException) -> None:
    """It has ended when the error comes out."""
    stopped = threading.Event()
    with pytest.raises(type(error)) as caught:
        both(failing(error), until_stopped(stopped), lambda _: None)
    assert caught.value is error
    assert stopped.is_set()


def test_a_failure_there_stops_this_one_and_is_the_one_that_is_told() -> None:
    """Not that this one was stopped."""
    stopped, error = threading.Event(), OSError("there")
    with pytest.raises(OSError, match="there") as caught:
        both(until_stopped(stopped), failing(error), lambda _: None)
    assert caught.value is error
    assert stopped.is_set()


def test_a_failure_there_after_this_one_is_done_is_told() -> None:
    """It is waited for."""
    done = threading.Event()
    with pytest.raises(OSError, match="late"):
        both(lambda _: done.set(), failing(OSError("late"), after=done), lambda _: None)
