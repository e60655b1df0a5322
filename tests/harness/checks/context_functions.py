"""Deliberate mistakes that only real long sequences show, importable by rank processes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

from harness.hooks import Fault

WINDOW = 1024


@contextlib.contextmanager
def windowed() -> Iterator[None]:
    """Attention sees the last 1,024 tokens only."""
    from bridge import forward

    healthy: Any = forward._causal_mask

    def mask(*args: Any) -> Any:  # noqa: ANN401 - the function's own
        found = healthy(*args)
        return found | found.new_ones(found.shape).tril(-WINDOW)

    with mock.patch.object(forward, "_causal_mask", mask):
        yield


@contextlib.contextmanager
def counts_double() -> Iterator[None]:
    """A model that is left to count gets positions 0, 2, 4, ...; one that is told does not."""
    from bridge.rotary import PositionedRotaryEmbedding

    healthy = PositionedRotaryEmbedding._angles

    def angles(self: Any, max_seq_len: int, offset: int) -> Any:  # noqa: ANN401 - torch tensors
        found = healthy(self, max_seq_len, offset)
        return found * 2 if self.position_ids is None else found

    with mock.patch.object(PositionedRotaryEmbedding, "_angles", angles):
        yield


WINDOWED = Fault(name="windowed", code=windowed)
COUNTS_DOUBLE = Fault(name="counts-double", code=counts_double)
