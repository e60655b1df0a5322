"""Where a deliberate mistake can be put in: the seams of a run, in this process and in the ranks.

A run without a fault is a check of the bridge; a run with one is a check of the checks. A fault is
plain picklable data, so it reaches rank processes; each part is None where all is healthy.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal, get_args

from bridge.spec import ModelSpec
from harness.ranks import Hook, RankContext

CodeChange = Callable[[], contextlib.AbstractContextManager[None]]
Dimension = Literal["tp", "pp", "sp"]
"""What a layout can have: TP or PP above 1, sequence parallelism."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """A wrong bridge, a damaged checkpoint, a wrong reference or a wrong launch.

    Args:
        name: Id; part of every cache key, so that healthy and faulty models are never mixed up.
        family: What goes wrong: mapping, layout, configuration, rope, norm, parallel, storage,
            reference or launch.
        stands_for: The real bug it stands for, one sentence.
        applies: Whether a model has what it spoils; None for any model.
        needs: What a layout must have one of for it to change anything; empty for nothing: it shows
            on one rank.
        local_only: It comes in where only Megatron-Core's own layers pass.
        only_recorded: All is right in itself, and other than what is on record: nothing can tell
            but the goldens of known models.
        spec: The bridge understands the configuration differently.
        code: The bridge's code is different: entered around every conversion in this process and
            around every function in a rank.
        rank: Something is different on some ranks only.
        checkpoint: Damages a converted Megatron checkpoint, given its root directory.
        exported: Damages an exported Hugging Face directory.
        reference: Changes the Hugging Face model in memory.
        oracle: The oracle reads another configuration.
    """

    name: str
    family: str = ""
    stands_for: str = ""
    applies: Callable[[ModelSpec], bool] | None = None
    needs: tuple[Dimension, ...] = ()
    local_only: bool = False
    only_recorded: bool = False
    spec: Callable[[ModelSpec], ModelSpec] | None = None
    code: CodeChange | None = None
    rank: Hook | None = None
    checkpoint: Callable[[Path], None] | None = None
    exported: Callable[[Path], None] | None = None
    reference: Callable[[Any], None] | None = None
    oracle: Callable[[dict[str, Any]], dict[str, Any]] | None = None

    def changed_code(self) -> contextlib.AbstractContextManager[None]:
        """The changed bridge, for as long as the context lasts."""
        return contextlib.nullcontext() if self.code is None else self.code()

    @property
    def hook(self) -> Hook | None:
        """What rank functions are to be run in; None when ranks are healthy."""
        return None if self.code is None and self.rank is None else _FaultyRank(self)


HEALTHY = Fault(name="healthy")

Seam = Literal["spec", "code", "rank", "checkpoint", "exported", "reference", "oracle"]
SEAMS: Final[tuple[Seam, ...]] = get_args(Seam)


def seams_of(fault: Fault) -> frozenset[Seam]:
    """Where a fault comes in."""
    return frozenset(seam for seam in SEAMS if getattr(fault, seam) is not None)


@dataclass(frozen=True, slots=True)
class _FaultyRank:
    fault: Fault

    def __call__(self, context: RankContext) -> contextlib.AbstractContextManager[None]:
        stack = contextlib.ExitStack()
        stack.enter_context(self.fault.changed_code())
        if self.fault.rank is not None:
            stack.enter_context(self.fault.rank(context))
        return stack  # type: ignore[return-value]  # an ExitStack yields itself, nobody looks
