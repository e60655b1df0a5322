"""Somebody who wants to see long work move; the terminal's bars are `bridge.console`'s."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

Advance = Callable[[int], None]
"""Called with the number of bytes that were just finished; from several threads."""


class Progress(Protocol):
    """Somebody who wants to see long work move."""

    def phase(self, name: str, total: int) -> AbstractContextManager[Advance]:
        """A phase of `total` bytes begins; the value is called with the bytes just done."""
        ...


class Silent:
    """Nobody is watching."""

    @contextmanager
    def phase(self, name: str, total: int) -> Iterator[Advance]:
        """Count nothing."""
        del name, total
        yield unwatched


def unwatched(_nbytes: int) -> None:
    """Be an `Advance` that nobody watches."""
