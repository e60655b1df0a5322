"""Block parity of a conversion that has just been made: one block of each kind, within a budget.

The bits have been compared when this runs; what is added is that Megatron computes with them what
the model means. Kinds are taken smallest first until the budget of work is spent, so that a small
model is proved whole and a large one does not take an hour; what was left out is said, with the
command that does it.
"""

from __future__ import annotations

import shlex
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final, Literal

from bridge.convert import read_spec
from bridge.parameters import block_num_parameters
from bridge.plan import ranges
from bridge.scratch import held_directory
from bridge.spec import ModelSpec
from harness.bench import Subject
from harness.block_states import kind_of
from harness.oracle import Architecture, read_config
from harness.runner import Result, run_cases
from harness.streaming.bench import StreamingBench
from harness.streaming.segments import distinct_blocks
from harness.streaming.walking import Streaming
from harness.suite import ON_CPU
from harness.verification import verification_cases
from harness.workbench import BASE_LAYOUT

BUDGET: Final = 1_000_000_000
"""Parameters that are read and computed with: half a minute on 2 cores, see the docs."""

Status = Literal["passed", "failed", "not run", "error"]


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockParity:
    """What became of it.

    Args:
        status: "not run" where it cannot be done here, "error" where it was tried in vain.
        blocks: Layer indices that were looked at, one of each kind.
        left_out: Kinds beyond the budget, by the first block of each.
        num_parameters: Of the blocks that were looked at.
        summary: One line, the worst excess error with its limit.
        places: On failure, where.
        command: What does the rest; None where there is none.
    """

    status: Status
    blocks: Sequence[int] = ()
    left_out: Mapping[int, str] | None = None
    num_parameters: int = 0
    summary: str
    places: Sequence[str] = ()
    command: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain data for `--json`."""
        found = {name: getattr(self, name) for name in self.__slots__}
        left = {str(layer_idx): kind for layer_idx, kind in (self.left_out or {}).items()}
        return found | {"left_out": left}

    def lines(self) -> list[str]:
        """For people."""
        if self.status == "not run":
            return [f"block parity not run: {self.summary}", *self._rest()]
        if self.status == "error":
            return [f"block parity could not be carried out: {self.summary}", *self.places]
        said = (
            f"block parity {self.status}: {len(self.blocks)} kinds of blocks "
            f"({ranges(self.blocks)}), {self.num_parameters:,} parameters; {self.summary}"
        )
        return [said, *self.places, *self._rest()]

    def _rest(self) -> list[str]:
        if self.command is None:
            return []
        left = "; ".join(f"block {idx}, {kind}" for idx, kind in (self.left_out or {}).items())
        return [f"left out: {left}" if left else "left out: all of it", f"  {self.command}"]


def within(spec: ModelSpec, model: Architecture, budget: int) -> tuple[list[int], list[int]]:
    """One block of each kind, the smallest ones that fit into a budget, and those beyond it.

    Args:
        spec: The model.
        model: The same, as the oracle reads it.
        budget: Parameters of all chosen blocks together.
    """
    chosen: list[int] = []
    kinds = sorted(distinct_blocks(model), key=lambda idx: (block_num_parameters(spec, idx), idx))
    for layer_idx in kinds:
        budget -= block_num_parameters(spec, layer_idx)
        if budget < 0:
            break
        chosen.append(layer_idx)
    return sorted(chosen), sorted(set(kinds) - set(chosen))


def prove_blocks(
    hf: Path, megatron: Path, *, carry: Collection[str] = (), budget: int = BUDGET
) -> BlockParity:
    """Walk through one block of each kind of a pair of checkpoints.

    Args:
        hf: The Hugging Face side.
        megatron: The Megatron side.
        carry: Unknown fields of its configuration that the user lets through.
        budget: Parameters.
    """
    from bridge.hf_config import load_hf_config

    spec = read_spec(hf, carry=carry)
    try:
        model = read_config(load_hf_config(hf))
    except ValueError as error:
        return BlockParity(status="not run", summary=f"the oracle does not know {error}")
    blocks, beyond = within(spec, model, budget)
    left = {layer_idx: kind_of(model, layer_idx) for layer_idx in beyond}
    command = rest_command(hf, megatron, beyond, carry=carry) if beyond else None
    if not blocks:
        return BlockParity(
            status="not run", left_out=left, command=command,
            summary=f"the smallest block is beyond {budget:,} parameters",
        )  # fmt: skip
    subject = Subject(
        name=hf.resolve().name, hf=hf, megatron=megatron, carry=tuple(carry),
        blocks=tuple(blocks), streamed="walk",
    )  # fmt: skip
    cases = verification_cases(
        subject.name, checks=("blocks",), layouts=(BASE_LAYOUT,), compute=ON_CPU
    )
    make = partial(StreamingBench, streaming=Streaming())
    with (
        held_directory() as scratch,
        make(scratch, subjects={subject.name: subject}) as bench,
    ):
        bench.prepare(cases)
        results = run_cases(cases, bench).results
    worst, status = _worst(results), _status(results)
    looked = blocks if status != "not run" else []
    return BlockParity(
        status=status,
        blocks=looked,
        left_out=left,
        num_parameters=sum(block_num_parameters(spec, layer_idx) for layer_idx in looked),
        summary=_said(worst),
        places=worst.finding.places if worst.finding is not None else (),
        command=command,
    )


def rest_command(
    hf: Path, megatron: Path, blocks: Sequence[int], *, carry: Collection[str] = ()
) -> str:
    """The command that looks at these blocks of a pair."""
    words = ["nemotron-bridge", "verify", "--hf-model", str(hf), "--megatron-path", str(megatron)]
    words += ["--stream", "--checks", "blocks", "--blocks", ranges(blocks)]
    words += [word for name in carry for word in ("--carry-field", name)]
    return shlex.join(words)


def _said(result: Result) -> str:
    """One line; of a case that was not run, why in more than a word where there is more."""
    if result.status == "not run" and result.traceback:
        return result.traceback.splitlines()[0]
    return result.summary


def _status(results: Sequence[Result]) -> Status:
    states = {result.status for result in results}
    found: tuple[Status, ...] = ("failed", "error", "not run")
    return next((status for status in found if status in states), "passed" if states else "not run")


def _worst(results: Sequence[Result]) -> Result:
    """The result to tell: a failure, else what could not be carried out, else the largest value."""
    order = ("passed", "not run", "error", "failed")

    def key(result: Result) -> tuple[int, float]:
        value = result.finding.value if result.finding is not None else None
        return order.index(result.status), value or 0.0

    return max(results, key=key)
