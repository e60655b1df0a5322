"""What moving and comparing share: nothing of a pool is left behind by a wait that ends early."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any

import pytest

from bridge import reading
from bridge.reading import all_or_first_error


class Work:
    """Five items for a pool of one thread: the first runs until it is released."""

    def __init__(self, pool: ThreadPoolExecutor) -> None:
        self.begun = threading.Event()
        self.release = threading.Event()
        self.finished: list[int] = []
        self.futures: list[Future[None]] = []
        self._pool = pool

    def submit(self) -> Iterator[Future[None]]:
        """Hand the items in one by one, as `all_or_first_error` takes them."""
        for item in range(5):
            self.futures.append(self._pool.submit(self._do, item))
            yield self.futures[-1]

    def _do(self, item: int) -> None:
        self.begun.set()
        self.release.wait(60)
        self.finished.append(item)


@pytest.fixture
def work() -> Iterator[Work]:
    """In a pool of one thread, which ends with the test."""
    with ThreadPoolExecutor(1) as pool:
        found = Work(pool)
        yield found
        found.release.set()


def interrupted_wait(work: Work) -> Callable[..., Any]:
    """`wait` whose first call is interrupted, once the first item runs."""
    calls: list[None] = []

    def waits(*args: Any, **kwargs: Any) -> Any:  # noqa: ANN401 - concurrent.futures.wait's own
        calls.append(None)
        if len(calls) > 1:
            work.release.set()
            return wait(*args, **kwargs)
        assert work.begun.wait(60)
        raise KeyboardInterrupt

    return waits


def test_an_interrupted_wait_drops_what_has_not_started_and_waits_for_what_has(
    work: Work, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The caller closes the files next, which the running item still uses."""
    monkeypatch.setattr(reading, "wait", interrupted_wait(work))
    with pytest.raises(KeyboardInterrupt):
        all_or_first_error(work.submit())
    assert work.finished == [0]
    assert [future.cancelled() for future in work.futures] == [False, True, True, True, True]


def test_an_interrupt_while_items_are_handed_in_drops_those_that_were(
    work: Work, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A checkpoint has thousands of them."""

    def interrupted() -> Iterator[Future[None]]:
        yield from work.submit()
        assert work.begun.wait(60)
        raise KeyboardInterrupt

    def waits(*args: Any, **kwargs: Any) -> Any:  # noqa: ANN401 - the function's own
        work.release.set()  # first waited for when all others have been dropped
        return wait(*args, **kwargs)

    monkeypatch.setattr(reading, "wait", waits)
    with pytest.raises(KeyboardInterrupt):
        all_or_first_error(interrupted())
    assert work.finished == [0]
    assert [future.cancelled() for future in work.futures] == [False, True, True, True, True]


def test_the_first_failure_is_raised_and_the_rest_is_dropped(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of one thread's items, those behind the one that fails are not begun, but for the next."""
    begun: list[int] = []
    ready, dropped = threading.Event(), threading.Event()

    def do(item: int) -> None:
        begun.append(item)
        ready.wait(60)
        if item == 1:
            raise ZeroDivisionError
        if item > 1:
            dropped.wait(60)

    def waits(*args: Any, **kwargs: Any) -> Any:  # noqa: ANN401 - the function's own
        if begun[1:]:  # the second time: what had not begun has been dropped
            dropped.set()
        return wait(*args, **kwargs)

    monkeypatch.setattr(reading, "wait", waits)
    with ThreadPoolExecutor(1) as pool:
        futures = [pool.submit(do, item) for item in range(50)]
        threading.Timer(0.05, ready.set).start()  # once it is waited for
        with pytest.raises(ZeroDivisionError):
            all_or_first_error(futures)
    assert begun in ([0, 1], [0, 1, 2])


def test_the_results_come_in_the_order_of_the_futures() -> None:
    """Whichever ends first."""
    with ThreadPoolExecutor(4) as pool:
        assert all_or_first_error(pool.submit(str, item) for item in range(9)) == list("012345678")
