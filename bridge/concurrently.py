"""Two pieces of work at once."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextvars import copy_context
from typing import TypeVar

from bridge.crew.protocol import Brake, StoppedError
from bridge.progress import Advance

One = TypeVar("One")
Other = TypeVar("Other")


def both(
    one: Callable[[Advance], One], other: Callable[[Advance], Other], advance: Advance
) -> tuple[One, Other]:
    """Do `one` here and `other` in a thread. When either fails, the other stops at its next step.

    Args:
        one: Called with what it is to report its steps to.
        other: The same.
        advance: Hears of the steps of both.

    Raises:
        BaseException: What `one` raises, which is the error of `other` where that failed first; and
            that of `other` where `one` had ended.
    """
    brake = Brake()
    checked = brake.on(advance)

    def stop(done: Future[Other]) -> None:
        error = done.exception()
        if error is not None:
            brake.pull(error)

    with ThreadPoolExecutor(1, thread_name_prefix="beside") as pool:
        future = pool.submit(copy_context().run, other, checked)
        future.add_done_callback(stop)
        try:
            return one(checked), future.result()
        except BaseException:
            brake.pull(StoppedError())
            raise
