"""The checks, each in one file, and the one registry of them.

A check takes a `Case` and the `Bench` and returns a `Finding`. A difference is a finding, never an
exception; an exception means that the check could not be carried out.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Literal

from harness.hooks import SEAMS, Seam

if TYPE_CHECKING:
    from harness.bench import Bench
    from harness.compare import Finding
    from harness.suite import Case

Axis = Literal["layout", "probe"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """One property that a right conversion has.

    Args:
        name: As in suites, ids and reports; also the module under `harness.checks`.
        claim: What holds when it passes, one sentence.
        axes: What it varies over besides model and dtype.
        sees: The seams (`harness.hooks`) that what it looks at has gone through. A fault that comes
            in elsewhere cannot change its finding; a test holds every check to that.
    """

    name: str
    claim: str
    axes: frozenset[Axis] = frozenset()
    sees: frozenset[Seam] = frozenset(SEAMS)

    def run(self, case: Case, bench: Bench) -> Finding:
        """Carry it out on one case."""
        found: Finding = importlib.import_module(f"harness.checks.{self.name}").run(case, bench)
        return found


_LAYOUT: Final[frozenset[Axis]] = frozenset({"layout"})
_LAYOUT_PROBE: Final[frozenset[Axis]] = frozenset({"layout", "probe"})
_BRIDGE: Final[frozenset[Seam]] = frozenset({"spec", "code"})
_FILES: Final[frozenset[Seam]] = _BRIDGE | {"checkpoint", "exported"}
_NUMBERS: Final[frozenset[Seam]] = _BRIDGE | {"rank", "reference", "oracle"}

_ALL: Final = (
    Check(
        name="config",
        claim="the configuration means the same to the bridge, to an independent reader, and after "
        "a way through Megatron's and back",
        sees=_BRIDGE,
    ),
    Check(
        name="round_trip",
        claim="a Megatron checkpoint holds exactly the bits of the Hugging Face one, and an export "
        "of it gives every file again, byte for byte",
        axes=_LAYOUT,
        sees=_FILES,
    ),
    Check(
        name="placement",
        claim="every element is where Megatron reads it, on every rank",
        axes=_LAYOUT,
        sees=_BRIDGE | {"rank", "checkpoint"},
    ),
    Check(
        name="resharding",
        claim="a checkpoint cut for any layout loads at any other, bit for bit, by the bridge and "
        "by Megatron-Core's own loader; what Megatron-Core saves is exported again",
        axes=_LAYOUT,
        sees=_FILES | {"rank"},
    ),
    Check(
        name="rope",
        claim="every model part rotates by the reference's frequencies, bit for bit, at every "
        "position",
        axes=_LAYOUT,
        sees=_NUMBERS,
    ),
    Check(
        name="logits",
        claim="Megatron is as close to the truth as the reference, at every position",
        axes=_LAYOUT_PROBE,
        sees=_NUMBERS,
    ),
    Check(
        name="layouts",
        claim="pipeline stages change no bit; tensor parallelism only the order of sums",
        axes=_LAYOUT_PROBE,
        sees=_NUMBERS,
    ),
    Check(
        name="blocks",
        claim="each block is as close to the truth as the reference's, given the same input and "
        "running free",
        axes=_LAYOUT_PROBE,
        sees=_NUMBERS,
    ),
    Check(
        name="gradients",
        claim="the loss and every parameter's gradient are as close to the truth as the "
        "reference's",
        axes=_LAYOUT,
        sees=_NUMBERS,
    ),
    Check(
        name="generation",
        claim="greedy decoding picks the reference's tokens, but where two are equally likely",
        axes=_LAYOUT,
        sees=_NUMBERS,
    ),
    Check(
        name="golden",
        claim="configuration, plan, weights and logits are those on record",
        sees=_BRIDGE | {"checkpoint", "oracle"},  # files only of `golden:NAME`; toys make do
    ),
)
CHECKS: Final[Mapping[str, Check]] = {check.name: check for check in _ALL}
