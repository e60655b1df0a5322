"""Where the threads of a process are, in words that fit into an error."""

from __future__ import annotations

import sys
import threading
import traceback
from collections.abc import Collection
from typing import Final

_DEPTH: Final = 8
"""Calls of a thread that are shown, innermost first."""
_COLLECTIVES: Final = "torch/distributed/"


def stacks(*, without: Collection[int] = ()) -> tuple[str, ...]:
    """One line for each thread of this process, the main thread first.

    Args:
        without: Ids of threads that only watch.
    """
    names = {one.ident: one.name for one in threading.enumerate()}
    main = threading.main_thread().ident
    found = []
    for ident, frame in sys._current_frames().items():  # noqa: SLF001 - the documented way
        if ident in without:
            continue
        calls = reversed(traceback.extract_stack(frame)[-_DEPTH:])
        text = " < ".join(f"{call.filename}:{call.lineno} in {call.name}" for call in calls)
        found.append((ident != main, f"{names.get(ident, ident)} at {text}"))
    return tuple(text for _, text in sorted(found))


def is_waiting(found: Collection[str]) -> bool:
    """Whether these stacks are of a process that waits for others inside a collective."""
    return any(_COLLECTIVES in stack for stack in list(found)[:1])
