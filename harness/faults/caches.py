"""A KV cache that holds the wrong thing. A single forward pass never sees it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from harness.faults import traits
from harness.faults.seams import Replaced
from harness.hooks import Fault

Function = Callable[..., Any]


def one_short(healthy: Function) -> Function:
    """The first new token is written over the last one of the prompt, and rotated as that was."""

    def increment(self: Any, increment: int) -> None:  # noqa: ANN401 - an inference context
        healthy(self, increment - 1 if increment > 1 else increment)

    return increment


FAULTS: Final = (
    Fault(name="cache-one-short", family="arithmetic",
          stands_for="a cache that counts the prompt's tokens from 0 to the last one's index",
          applies=traits.has_attention,
          rank=Replaced("megatron.core.inference.contexts",
                        "BaseInferenceContext.increment_sequence_len_offset", one_short)),
)  # fmt: skip
