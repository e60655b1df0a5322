"""What a qualification runs, as far as it follows from the configuration and a few choices.

Whoever checks a bundle derives it again: a case that is missing, another twin, or a fault left out
show by that alone.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

from bridge.errors import UnsupportedFieldError, UsageError
from bridge.hf_config import LLAMA, spec_from_hf_config
from bridge.parameters import block_num_parameters, num_parameters
from bridge.plan import Plan
from bridge.spec import ModelSpec
from harness.faults import CATALOGUE
from harness.faults.matrix import shows
from harness.layouts import runs
from harness.oracle import NotUnderstoodError, read_config
from harness.qualify.traits import traits_of
from harness.qualify.twin import Twin, make_twin
from harness.streaming.bench import CHECKS as WALKED_CHECKS
from harness.streaming.segments import distinct_blocks
from harness.suite import Case, Compute
from harness.verification import CHECK_NAMES, verification_cases
from harness.workbench import BASE_LAYOUT

LAYOUTS: Final = (
    BASE_LAYOUT, "tp2-pp1", "tp1-pp2", "tp2-pp2", "tp4-pp1", "tp1-pp2-vp2", "tp2-pp2-vp2",
    "tp2-pp1-sp", "tp2-pp2-sp",
)  # fmt: skip
"""Candidates, on four ranks at most; a model is tried on those that it runs on."""
ROUND_TRIP: Final = "round_trip"
TWIN_DTYPE: Final = "float32"
"""Of the twin's weights: bits that bfloat16 has not are there to be lost."""
Weights = Literal["checkpoint", "synthetic"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Choices:
    """What the user decides.

    Args:
        name: The model's, as in case ids.
        weights: Its own, or pseudo-random ones of its configuration.
        paired: Whether a Megatron checkpoint is held against it.
        full: Every block at real dimensions, not one of each kind.
        seed: Of pseudo-random weights.
        dtype: What to compute in.
        device: Where.
        faults: Patterns; with any, only the faults they fit, and the proof is not whole.
        stand_in: What the configuration stands for, where it is not the variant's own.
    """

    name: str
    weights: Weights
    paired: bool = False
    full: bool = False
    seed: int = 0
    dtype: str = "float32"
    device: str = "cpu"
    faults: tuple[str, ...] = ()
    stand_in: str | None = None

    @property
    def compute(self) -> Compute:
        """For cases and faults; by Megatron-Core's own layers, which every machine has."""
        return Compute(dtype=self.dtype, device=self.device)


@dataclass(frozen=True, slots=True, kw_only=True)
class Scope:
    """What is run, and what it is run on.

    Args:
        choices: The user's.
        spec: The model.
        twin: Its small twin.
        layouts: That the twin is tried on.
        blocks: Walked at real dimensions; None for all of them.
        cases: Of the model and of the twin.
        faults: That are tried on the twin.
        nothing_to_spoil: Faults that a model of these traits cannot have, that need more of a
            layout than it can be cut into, or that only records of known models can tell.
    """

    choices: Choices
    spec: ModelSpec
    twin: Twin
    layouts: tuple[str, ...]
    blocks: tuple[int, ...] | None
    cases: tuple[Case, ...]
    faults: tuple[str, ...]
    nothing_to_spoil: tuple[str, ...]

    @property
    def twin_config(self) -> dict[str, Any]:
        """The configuration that the twin's checkpoint has."""
        return self.twin.toy.config_for(TWIN_DTYPE)

    @property
    def num_walked(self) -> int:
        """Parameters of the blocks that are walked at real dimensions."""
        chosen = range(self.spec.num_layers) if self.blocks is None else self.blocks
        return sum(block_num_parameters(self.spec, layer_idx) for layer_idx in chosen)

    def as_data(self) -> dict[str, Any]:
        """Plain data for the evidence, all of it derived."""
        choices = self.choices
        return {
            "model": choices.name,
            "twin": self.twin.toy.name,
            "weights": choices.weights,
            "paired": choices.paired,
            "seed": choices.seed,
            "dtype": choices.dtype,
            "device": choices.device,
            "stand_in": choices.stand_in,
            "num_layers": self.spec.num_layers,
            "num_parameters": num_parameters(self.spec),
            "params_dtype": self.spec.params_dtype,
            "plan_sha256": Plan(self.spec, self.spec.padded_vocab_size(1)).digest(),
            "full": choices.full,
            "blocks": list(range(self.spec.num_layers) if self.blocks is None else self.blocks),
            "num_parameters_walked": self.num_walked,
            "layouts": list(self.layouts),
            "twin_blocks": list(self.twin.layer_idx),
            "twin_parameters": num_parameters(spec_from_hf_config(self.twin_config)),
            "traits": [
                {"trait": trait, "value": value}
                for trait, value in traits_of(self.twin.toy.architecture).items()
            ],
            "fault_patterns": list(choices.faults),
            "nothing_to_spoil": list(self.nothing_to_spoil),
        }


def scope_of(config: Mapping[str, Any], choices: Choices, *, where: str) -> Scope:
    """Derive all that is to be run.

    Args:
        config: The parsed `config.json`.
        choices: The user's.
        where: What to call the configuration in errors.

    Raises:
        ConfigError: BR1xx, what cannot be converted or cannot be proved, field by field.
        UsageError: BR001, patterns that no fault fits.
    """
    spec = provable(config, choices, where=where)
    twin = make_twin(f"{choices.name}-twin", config)
    small = spec_from_hf_config(twin.toy.config, where=where)
    layouts = tuple(name for name in LAYOUTS if runs(small, name))
    real = (*WALKED_CHECKS, *((ROUND_TRIP,) if choices.weights == "checkpoint" else ()))
    possible = [
        name for name, fault in CATALOGUE.items() if shows(fault, small) and not fault.only_recorded
    ]
    return Scope(
        choices=choices,
        spec=spec,
        twin=twin,
        layouts=layouts,
        blocks=None if choices.full else tuple(distinct_blocks(read_config(config))),
        cases=(
            *verification_cases(
                twin.toy.name, checks=CHECK_NAMES, layouts=layouts, compute=choices.compute
            ),
            *verification_cases(
                choices.name, checks=real, layouts=(BASE_LAYOUT,), compute=choices.compute
            ),
        ),
        faults=_selected(possible, choices.faults),
        nothing_to_spoil=tuple(name for name in CATALOGUE if name not in possible),
    )


def provable(config: Mapping[str, Any], choices: Choices, *, where: str) -> ModelSpec:
    """Read the model, or refuse what no part of the proof could answer for.

    There is no way to carry an unknown field along here: what nobody has read, nobody has proved.

    Raises:
        ConfigError: BR1xx, naming the fields.
    """
    spec = spec_from_hf_config(config, where=where)
    problems = []
    try:
        read_config(config)
    except (NotUnderstoodError, KeyError, TypeError) as error:
        problems.append(f"{where}: {error} (the float64 oracle has no such arithmetic)")
    if config["architectures"][0] == LLAMA and spec.hidden_size % spec.num_attention_heads:
        problems.append(
            f"{where}: num_attention_heads={spec.num_attention_heads} does not divide hidden_size="
            f"{spec.hidden_size} (transformers refuses such a Llama, so there is no reference)"
        )
    if choices.weights == "synthetic" and spec.params_dtype not in ("float32", "bfloat16"):
        problems.append(
            f"{where}: dtype {spec.params_dtype} (pseudo-random weights are float32 or bfloat16)"
        )
    if problems:
        raise UnsupportedFieldError(
            "the configuration can be converted, and not be qualified",
            where=problems,
            hint="no evidence is better than evidence of something else; `import` converts it",
        )
    return spec


def _selected(known: Sequence[str], patterns: Sequence[str]) -> tuple[str, ...]:
    if not patterns:
        return tuple(known)
    found = tuple(
        name
        for name in known
        if any(one in name or fnmatch.fnmatchcase(name, one) for one in patterns)
    )
    if not found:
        raise UsageError(
            f"no fault that this model can have is selected by {', '.join(patterns)}",
            hint="`nemotron-bridge faults --list` shows the catalogue",
        )
    return found
