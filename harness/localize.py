"""Where a model goes wrong, and why: the tensor and the tile, or the typical mistake.

Asked when a parity check has failed. First every live tensor is held against what Megatron should
read there. With all weights right the sums must be wrong: the first block that is off, given the
right input, is computed again in float64 under each of a table of mistakes (`harness.mistakes`),
and the one that comes closest to what was computed is the suspect.

Nothing here may hide the finding that asked: what goes wrong in here becomes a line of the answer.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from harness import live_blocks, oracle
from harness.block_states import Witnesses, kind_of
from harness.live_blocks import EMBEDDING, Gathered
from harness.metrics import excess
from harness.mistakes import Setup, Suspect, suspects
from harness.probes import CONTEXT_LENGTHS
from harness.thresholds import REFERENCE_ERROR, judge_logits
from harness.tiles import layer_of

if TYPE_CHECKING:
    from harness.bench import Bench
    from harness.suite import Case

Array = np.ndarray[Any, np.dtype[Any]]
_MAX_TEXTS: Final = 8
_ELEMENTS_KEPT: Final = 1 << 22
"""Of one weight, while mistakes are tried."""
_ALIKE: Final = 1e-3
"""Difference of explained shares below which two mistakes are one on this model."""
_CONVINCING: Final = 0.5
"""Share of the error that a mistake must explain to be named as the suspect."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Localisation:
    """The answer.

    Attributes:
        side: Whose model is wrong: "megatron", "reference", "oracle", or "" when none could be
            named.
        places: In words, the most telling first.
        damage: Damaged tiles, plain data.
        suspects: Mistakes that explain part of the error, the best first.
        cause: The suspected mistake, by the name it has in the catalogue of faults; "" for none.
        block: Where the sums go wrong first: layer_idx, -1 for the embedding, the number of blocks
            for the head; None when weights are to blame or nothing is.
    """

    side: str = ""
    places: tuple[str, ...] = ()
    damage: Sequence[Mapping[str, Any]] = ()
    suspects: Sequence[Suspect] = ()
    cause: str = ""
    block: int | None = None
    trouble: tuple[str, ...] = field(default_factory=tuple)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for the evidence."""
        return {
            "side": self.side,
            "places": list(self.places),
            "cause": self.cause,
            "block": self.block,
            "damage": [dict(one) for one in self.damage],
            "suspects": [one.to_dict() for one in self.suspects[:_MAX_TEXTS]],
            "trouble": list(self.trouble),
        }


def localisation(case: Case, bench: Bench) -> Localisation:
    """The bench's answer; an error in here becomes one, so that no finding is lost to it."""
    if not bench.localises:
        return Localisation()
    if case.probe in CONTEXT_LENGTHS:  # every mistake that is tried computes a block in float64
        place = f"not localised on {case.probe}: run `blocks` of the same model on the long probe"
        return Localisation(places=(place,))
    try:
        return bench.localisation(case)
    except Exception as error:  # noqa: BLE001 - the finding matters more than its explanation
        what = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        return Localisation(places=(f"localisation failed: {what}",), trouble=(what,))


def localise(case: Case, bench: Bench) -> Localisation:
    """Look at witnesses, weights and sums, in this order."""
    by = bench.witnesses(case)
    reference = _reference_failure(case, bench, by)
    if reference is not None:
        return _in_reference(case, bench, by, reference)
    damage, places = _weights(case, bench)
    if damage or places:
        causes = [one["cause"] for one in damage if one["cause"]]
        cause = max(dict.fromkeys(causes), key=causes.count, default="")
        if cause:
            places = [*places, f"suspected cause: {cause}"]
        return Localisation(side="megatron", places=tuple(places), damage=damage, cause=cause)
    return _in_sums(case, bench, by)


# --------------------------------------------------------------------------------------
# The weights
# --------------------------------------------------------------------------------------


def _weights(case: Case, bench: Bench) -> tuple[list[dict[str, Any]], list[str]]:
    layout = bench.layout(case)
    path, config = bench.checkpoint(case), bench.config(case)
    ranks = bench.run(case, layout, live_blocks.damage, bench.request(case), path, config)
    damage = sorted(
        (one for found, _ in ranks for one in found),
        key=lambda one: (not one["lines"], layer_of(one["tensor"]), one["tensor"], one["rank"]),
    )
    texts: dict[str, list[int]] = {}
    for one in damage:
        texts.setdefault(one["text"], []).append(one["rank"])
    many = layout.world_size > 1
    places = [text + (f" on {_ranks(on)}" if many else "") for text, on in texts.items()]
    if len(places) > _MAX_TEXTS:
        places = [*places[:_MAX_TEXTS], f"and {len(places) - _MAX_TEXTS} more damaged places"]
    held = {name for _, names in ranks for name in names}
    missing = [name for name in _needed(oracle.read_config(config)) if name not in held]
    places += [f"no rank holds any of {name}" for name in missing[:_MAX_TEXTS]]
    return damage, places


def _ranks(ranks: Sequence[int]) -> str:
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, sorted(ranks)))}"


def _needed(model: oracle.Architecture) -> list[str]:
    from harness.toys import hf_tensors

    return list(hf_tensors(model))


def _reference_weights(case: Case, bench: Bench) -> list[str]:
    """What of the live reference is not what the files say."""
    from harness.compare import read_safetensors, words_of

    stored = read_safetensors(bench.checkpoint(case))
    found = []
    for name, parameter in bench.hf_model(case).named_parameters():
        tensor = parameter.detach()
        if name not in stored:
            found.append(f"the reference's {name} is not in the files")
            continue
        wanted = stored[name].to(tensor.dtype)
        if tensor.shape != wanted.shape:
            found.append(f"the reference's {name} has shape {tuple(tensor.shape)}")
        elif (words_of(tensor) != words_of(wanted)).any():
            different = (words_of(tensor) != words_of(wanted)).sum()
            ratio = float(
                (tensor.double() * wanted.double()).sum() / wanted.double().square().sum()
            )
            found.append(
                f"the reference's {name}: {different} of {tensor.numel()} elements are not those "
                f"of the file (about x {ratio:.6g})"
            )
    return found[:_MAX_TEXTS]


# --------------------------------------------------------------------------------------
# The sums
# --------------------------------------------------------------------------------------


def _reference_failure(case: Case, bench: Bench, by: Witnesses) -> int | None:
    """The first entry in which the reference is not sane; None when it is."""
    for one in bench.block_judgements(case):
        if not one.verdicts[0].passed and not one.forced.problems:
            return one.layer_idx
    threshold = bench.limits(case).get(REFERENCE_ERROR, case.dtype)
    head = excess(by.reference_logits, by.reference_logits, by.forced_logits, 0.0)
    if head.problems or head.reference_error_ulp(case.dtype) > threshold.limit:
        return len(by.model.blocks)
    return None


def _in_reference(case: Case, bench: Bench, by: Witnesses, layer_idx: int) -> Localisation:
    """The reference is off: is it alone in that, or is the oracle?"""
    found = bench.block_states(case)
    head = layer_idx == len(by.model.blocks)
    theirs = by.reference_logits if head else by.reference[layer_idx + 1]
    states = found.free if layer_idx == EMBEDDING else found.forced
    ours = found.logits if head else next(state for _, state in states[layer_idx])
    truth = by.forced_logits if head else by.forced[layer_idx + 1]
    apart = float(np.abs(ours.astype(np.float64) - theirs).max())
    off = float(np.abs(truth - theirs).max())
    side = "oracle" if apart < off / 4 else "reference"
    where = f"{_name(by, layer_idx)} ({kind_of(by.model, layer_idx)})"
    places = [
        f"{where}: the reference is wrong, Megatron and the oracle disagree with it"
        if side == "reference"
        else f"{where}: Megatron and the reference agree, the oracle is the odd one out of three"
    ]
    best = _suspects(case, bench, by, layer_idx, theirs)
    if side == "reference":
        weights = _reference_weights(case, bench)
        if weights:
            return Localisation(side=side, places=(*places, *weights), block=layer_idx,
                                cause="reference-weights")  # fmt: skip
    return answer(side, places, layer_idx, best)


def _in_sums(case: Case, bench: Bench, by: Witnesses) -> Localisation:
    found = bench.block_states(case)
    all_right = ("every weight is right, on every rank",)
    for one in bench.block_judgements(case):
        if one.verdicts[1].passed:
            continue
        where = f"{one.name} ({one.kind}): the first to compute wrong from a right input"
        states = found.free if one.layer_idx == EMBEDDING else found.forced
        held = states.get(one.layer_idx, [])
        if not held:
            nowhere = (*all_right, f"{one.name}: no rank has run it")
            return Localisation(side="megatron", places=nowhere, block=one.layer_idx)
        state = next((state for rank, state in held if rank == one.tp_rank), held[0][1])
        best = _suspects(case, bench, by, one.layer_idx, state)
        return answer("megatron", [*all_right, where], one.layer_idx, best)
    head = judge_logits(
        found.logits, by.reference_logits, by.forced_logits,
        dtype=case.dtype, thresholds=bench.limits(case),
    )  # fmt: skip
    if not head.passed:
        layer_idx = len(by.model.blocks)
        best = _suspects(case, bench, by, layer_idx, found.logits)
        where = "the final norm and the output layer compute wrong from a right input"
        return answer("megatron", [*all_right, where], layer_idx, best)
    places = [*all_right, "every block computes right from a right input", *_between(found)]
    return Localisation(side="megatron" if len(places) > 2 else "", places=tuple(places))


def _between(found: Gathered) -> list[str]:
    """States that are not what the block before them has put out."""
    places = []
    for layer_idx, given in found.entering.items():
        before = found.free.get(layer_idx - 1, [])
        if before and not all(np.array_equal(one, before[0][1]) for _, one in given):
            source = "the embedding" if layer_idx == 0 else f"block {layer_idx - 1}"
            places.append(f"the state changes on its way from {source} to block {layer_idx}")
    return places


def _suspects(
    case: Case, bench: Bench, by: Witnesses, layer_idx: int, computed: Array
) -> list[Suspect]:
    probe = bench.probe(case)
    setup = Setup(
        model=by.model,
        weight=remembered(bench.oracle_weight(case)),
        layer_idx=layer_idx,
        hidden=by.reference[max(layer_idx, 0)].astype(np.float64),
        input_ids=probe.input_ids,
        position_ids=probe.position_ids,
        tp=bench.layout(case).tensor_model_parallel_size,
    )
    return suspects(setup, computed.astype(np.float64))


def remembered(weight: oracle.Weight) -> oracle.Weight:
    """Small weights are read once for all mistakes; large ones every time, a few rows at once."""
    kept: dict[str, oracle.Rows] = {}

    def find(name: str) -> oracle.Rows:
        if name not in kept:
            rows = weight(name)
            small = math.prod(rows.shape) <= _ELEMENTS_KEPT
            kept[name] = rows[0 : rows.shape[0]].astype(np.float64) if small else rows
        return kept[name]

    return find


def answer(side: str, places: list[str], layer_idx: int, best: list[Suspect]) -> Localisation:
    """Whose sums are wrong and where; the suspect is named if it explains enough of the error."""
    convincing = best and best[0].explains >= _CONVINCING
    if convincing:
        top = best[0]
        twins = [one.name for one in best[1:] if one.explains > top.explains - _ALIKE]
        also = f"; so does {', '.join(twins)}" if twins else ""
        cause = f"{top.name}, {top.says}: explains {top.explains:.2%} of the error{also}"
        places = [*places, f"suspected cause: {cause}"]
    elif best:
        places = [
            *places,
            (
                f"none of {len(best)} typical mistakes explains it; the nearest, {best[0].name}, "
                f"{max(best[0].explains, 0):.0%} of it"
            ),
        ]
    return Localisation(
        side=side, places=tuple(places), block=layer_idx, suspects=best[:_MAX_TEXTS],
        cause=best[0].name if convincing else "",
    )  # fmt: skip


def _name(by: Witnesses, layer_idx: int) -> str:
    if layer_idx == EMBEDDING:
        return "the embedding"
    return "the head" if layer_idx == len(by.model.blocks) else f"block {layer_idx}"
