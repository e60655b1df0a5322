"""The plan of a conversion, and the closed accounting that precedes it.

Every HF element is read once and every Megatron element written once: the first half is proved by
inverting the tilings (`parameters.hf_tilings`), the second by each tiling's own partition. What is
left is to hold the plan against the tensors that are really there, which `account_for` does before
any byte moves.
"""

from __future__ import annotations

import hashlib
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from bridge.dtypes import Dtype
from bridge.errors import AccountingError, DtypeMismatchError
from bridge.parameters import EMBEDDING_ROW, Parameter, hf_tensors, hf_tilings, parameters
from bridge.spec import ModelSpec
from bridge.storage.source import TensorInfo
from bridge.tiling import Shape, Tiling


@dataclass(frozen=True)
class Plan:
    """How the tensors of one model map onto each other, both ways."""

    spec: ModelSpec
    padded_vocab_size: int

    @classmethod
    def of_checkpoint(cls, spec: ModelSpec, megatron: Mapping[str, TensorInfo]) -> Plan:
        """The plan of a model whose vocabulary is padded as in this Megatron checkpoint."""
        embedding = megatron.get(EMBEDDING_ROW.name)
        rows = embedding.shape[0] if embedding is not None and embedding.shape else 0
        return cls(spec, max(rows, spec.vocab_size))

    @cached_property
    def parameters(self) -> Mapping[str, Parameter]:
        """The Megatron side, in the order the model runs."""
        return parameters(self.spec, padded_vocab_size=self.padded_vocab_size)

    @cached_property
    def hf_to_mcore(self) -> Mapping[str, Tiling]:
        """Each Megatron parameter, tiled by HF tensors."""
        return {name: parameter.tiling for name, parameter in self.parameters.items()}

    @cached_property
    def mcore_to_hf(self) -> Mapping[str, Tiling]:
        """Each HF tensor, tiled by Megatron parameters."""
        return hf_tilings(self.spec, padded_vocab_size=self.padded_vocab_size)

    @cached_property
    def hf_shapes(self) -> Mapping[str, Shape]:
        """The HF side, in the order of the model."""
        return hf_tensors(self.spec)

    @cached_property
    def mcore_shapes(self) -> Mapping[str, Shape]:
        """The Megatron side, in the order the model runs."""
        return {name: parameter.shape for name, parameter in self.parameters.items()}

    def lines(self) -> Iterator[str]:
        """The plan as text, one line per tile; stable, so that it can be diffed and hashed."""
        for name, tiling in self.hf_to_mcore.items():
            for tile in tiling.tiles:
                yield f"{name}{tile.target_box} <- {tile.source or 'zeros'}{tile.source_box}"

    def digest(self) -> str:
        """Sha256 of `lines`: two plans with equal digests convert alike."""
        return hashlib.sha256("\n".join(self.lines()).encode()).hexdigest()

    def target_dtypes(
        self, tilings: Mapping[str, Tiling], source: Mapping[str, TensorInfo], *, where: str
    ) -> dict[str, Dtype]:
        """The dtype of each target: that of its sources, which must agree.

        Raises:
            DtypeMismatchError: BR303, tensors that hold no floating-point numbers, or one target
                made of several dtypes; all of them.
        """
        odd = [
            f"{name} is {info.dtype.name}"
            for name, info in source.items()
            if not info.dtype.is_floating
        ]
        if odd:
            raise DtypeMismatchError(
                f"{len(odd)} tensors in {where} hold no floating-point parameters",
                where=odd,
                hint="quantised checkpoints are not converted: start from the original weights",
            )
        found: dict[str, Dtype] = {}
        mixed = []
        for name, tiling in tilings.items():
            kinds = {tile.source: source[tile.source].dtype for tile in tiling.tiles if tile.source}
            if len(set(kinds.values())) > 1:
                listed = ", ".join(f"{key} {dtype.name}" for key, dtype in kinds.items())
                mixed.append(f"{name} would mix {listed}")
            found[name] = next(iter(kinds.values()))
        if mixed:
            raise DtypeMismatchError(
                f"{len(mixed)} parameters made from {where} would mix dtypes",
                where=mixed,
                hint="store the sources of one parameter in one dtype; nothing is rounded silently",
            )
        return found


def account_for(
    expected: Mapping[str, Shape],
    found: Mapping[str, TensorInfo],
    *,
    where: str,
    also: Sequence[str] = (),
) -> None:
    """Hold the tensors that are there against those the model has; all differences at once.

    Args:
        expected: The model's tensors.
        found: The source's.
        where: The source.
        also: Problems the source itself has noticed, to be reported with the others.

    Raises:
        AccountingError: BR301, missing, unexpected or mis-shaped tensors, each named.
    """
    missing = expected.keys() - found.keys()
    unexpected = found.keys() - expected.keys()
    misshaped = {
        name: f"{_shape(found[name].shape)}, expected {_shape(shape)}"
        for name, shape in expected.items()
        if name in found and found[name].shape != shape
    }
    if not (missing or unexpected or misshaped or also):
        return
    places = [
        *(f"missing: {name}" for name in fold_layers(missing)),
        *(f"unexpected: {name}" for name in fold_layers(unexpected)),
        *(f"mis-shaped: {name}" for name in _fold_labelled(misshaped)),
        *also,
    ]
    counts = ", ".join(
        f"{len(group)} {what}"
        for group, what in (
            (missing, "missing"),
            (unexpected, "unexpected"),
            (misshaped, "mis-shaped"),
            (also, "not as the index says"),
        )
        if group
    )
    hint = "the configuration and the weights must be of the same model; nothing was written"
    if "lm_head.weight" in unexpected:
        hint = (
            "tie_word_embeddings is true, yet there is a separate lm_head.weight: set it to "
            "false, or remove the tensor if it is a copy; nothing was written"
        )
    raise AccountingError(
        f"the tensors in {where} are not this model's: {counts}", where=places, hint=hint
    )


def _shape(shape: Shape) -> str:
    return "(" + ", ".join(map(str, shape)) + ")"


_LAYER = re.compile(r"(?<=layers\.)(?:0|[1-9][0-9]{0,8})(?=\.)")


def fold_layers(names: Iterable[str]) -> list[str]:
    """Say a name that recurs over layers once: `model.layers.{0-31}.mlp.up_proj.weight`."""
    groups: defaultdict[str, list[int]] = defaultdict(list)
    plain = []
    for name in names:
        match = _LAYER.search(name)
        if match is None:
            plain.append(name)
        else:
            groups[_LAYER.sub("{}", name, count=1)].append(int(match.group()))
    folded = [
        template.replace("{}", ranges(layers) if len(layers) == 1 else f"{{{ranges(layers)}}}", 1)
        for template, layers in groups.items()
    ]
    return sorted(plain) + sorted(folded)


def _fold_labelled(problems: Mapping[str, str]) -> list[str]:
    return fold_layers(f"{name} is {what}" for name, what in problems.items())


def ranges(numbers: Iterable[int]) -> str:
    """Write numbers as ranges: 0, 1, 2, 5 become `0-2,5`."""
    spans: list[list[int]] = []
    for number in sorted(set(numbers)):
        if spans and number == spans[-1][1] + 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in spans)
