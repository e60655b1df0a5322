"""Gradients of all ranks put together, and how far they are from the truth.

Measures and never judges; `harness.checks.gradients` holds the values to limits.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from harness.live_gradients import RankGradients, as_array

Array = np.ndarray[Any, np.dtype[Any]]

_DROWNED: Final = 1 / 20
"""Of a tensor's own size; times the limit of bfloat16 that is three fifths of it."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ReferenceGradients:
    """What the live Hugging Face model gives: a loss in nats per token, and gradients by name."""

    loss: float
    gradients: Mapping[str, Array]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Assembled:
    """Whole gradients of the Hugging Face tensors, from the tiles of all ranks.

    Attributes:
        losses: Every rank's loss, nats per token.
        copies: By tensor: its gradient, and another one for each rank that holds an element with
            other bits. Each is judged, so copies that drift apart are within the limit or found.
        unequal: Tensors of which ranks hold copies that are not bit-equal.
        problems: What was never covered, has no place, or should be zero and is not.
    """

    losses: Sequence[float]
    copies: Mapping[str, Sequence[Array]]
    unequal: Sequence[str]
    problems: Sequence[str]


def assemble(ranks: Sequence[RankGradients], shapes: Mapping[str, tuple[int, ...]]) -> Assembled:
    """Put the tiles of all ranks together.

    Args:
        ranks: By rank.
        shapes: Of every tensor that the checkpoint holds.
    """
    problems: list[str] = []
    versions: dict[str, list[Array]] = {}
    unequal: list[str] = []
    for rank, found in enumerate(ranks):
        problems += [f"rank {rank}: no gradient for {name}" for name in found.without]
        for tile in found.tiles:
            if tile.hf_name is None:
                if tile.gradient.any():
                    problems.append(
                        f"rank {rank}: {tile.parameter}: rows that pad the vocabulary have a "
                        f"gradient, up to {np.abs(tile.gradient).max():.3g}"
                    )
                continue
            if tile.hf_name not in shapes:
                problems.append(f"rank {rank}: {tile.parameter}: no tensor {tile.hf_name}")
                continue
            held = versions.setdefault(tile.hf_name, [])
            _place(held, tile.slices, tile.gradient, shapes[tile.hf_name])
    copies: dict[str, list[Array]] = {}
    for name, held in versions.items():
        holes = np.isnan(held[0])
        if holes.any():
            where = np.argwhere(holes)[0].tolist()
            problems.append(f"{name}{where}: NaN, or on no rank; {int(holes.sum())} elements")
        # What a further copy does not hold, it shares with the first.
        copies[name] = [held[0], *(np.where(np.isnan(one), held[0], one) for one in held[1:])]
        if len(held) > 1:
            unequal.append(name)
    problems += [f"{name}: no rank has a gradient for it" for name in shapes.keys() - copies.keys()]
    return Assembled(
        losses=[found.loss for found in ranks], copies=copies, unequal=unequal, problems=problems
    )


def _place(held: list[Array], where: tuple[slice, ...], tile: Array, shape: Sequence[int]) -> None:
    """Into the first copy that has no other bits there yet; NaN marks what nobody has filled."""
    for copy in held:
        there = copy[where]
        if np.isnan(there).all():
            copy[where] = tile
            return
        if np.array_equal(there, tile):
            return
    fresh = np.full(tuple(shape), math.nan, tile.dtype)
    fresh[where] = tile
    held.append(fresh)


def hf_loss_and_gradients(model: Any, input_ids: Array, position_ids: Array) -> ReferenceGradients:  # noqa: ANN401 - transformers is not typed
    """One backward pass of a transformers model, which is left as it was found.

    The loss is taken from the logits here, in float32 or float64, and not by transformers, whose
    own takes no positions with gaps.
    """
    import torch

    parameters = dict(model.named_parameters())
    before = {name: (one.requires_grad, one.grad) for name, one in parameters.items()}
    ids = torch.from_numpy(input_ids).to(model.device)
    positions = torch.from_numpy(np.broadcast_to(position_ids, input_ids.shape).copy())
    try:
        for one in parameters.values():
            one.requires_grad_()
            one.grad = None
        with torch.enable_grad():
            logits = model(
                input_ids=ids,
                position_ids=positions.to(model.device),
                attention_mask=torch.ones_like(ids),
                use_cache=False,
            ).logits
            wide = logits if logits.dtype == torch.float64 else logits.float()
            loss = torch.nn.functional.cross_entropy(
                wide[:, :-1].flatten(0, 1), ids[:, 1:].flatten()
            )
            loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        found = {
            name: as_array(one.grad) for name, one in parameters.items() if one.grad is not None
        }
        return ReferenceGradients(loss=loss.item(), gradients=found)
    finally:
        for name, (required, grad) in before.items():
            parameters[name].requires_grad_(required)
            parameters[name].grad = grad


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorError:
    """One tensor's gradient: how far ours and the reference's are from the truth.

    Attributes:
        name: The Hugging Face tensor.
        excess: `candidate / max(reference, floor)`, the worst copy's.
        candidate: rms(ours - truth).
        reference: rms(reference - truth).
        scale: rms(truth).
        worst: Index of the element that is farthest off.
        ours: Its value in our gradient.
        truth: Its true value.
    """

    name: str
    excess: float
    candidate: float
    reference: float
    scale: float
    worst: tuple[int, ...]
    ours: float
    truth: float


def tensor_errors(
    copies: Mapping[str, Sequence[Array]],
    reference: Mapping[str, Array],
    truth: Mapping[str, Array],
    *,
    floor: float,
) -> tuple[list[TensorError], list[str]]:
    """Measure every tensor's gradient against the truth.

    Args:
        copies: Ours, each as often as ranks hold it differently.
        reference: The reference's.
        truth: The oracle's, float64.
        floor: The least error counted for the reference, relative to the largest rms(truth) of
            all tensors. Gradients are sums in which the large ones of later blocks meet, so their
            rounding is what a small one drowns in. It counts for no more than `_DROWNED` of the
            tensor's own rms: where more is lost, the reference has lost as much itself, and
            where the reference has not, a gradient that is missing must not pass for rounding.

    Returns:
        Errors, largest excess first, and what could not be compared, which is a failure.
    """
    problems = [
        f"{name}: no gradient from {who}"
        for who, found in (
            ("Megatron", copies),
            ("the reference", reference),
            ("the oracle", truth),
        )
        for name in sorted((copies.keys() | reference.keys() | truth.keys()) - found.keys())
    ]
    scales = {name: _rms(one) for name, one in truth.items()}
    least = floor * max(scales.values(), default=math.nan)
    if not least > 0:
        return [], [*problems, "the oracle's gradients are all zero: any model would agree"]
    found = []
    for name in copies.keys() & reference.keys() & truth.keys():
        theirs, true, ours = reference[name], truth[name], copies[name]
        wrong = [
            f"{name}: shape {one.shape} {one.dtype} from {who}, {true.shape} from the oracle"
            for who, one in (("Megatron", ours[0]), ("the reference", theirs))
            if one.shape != true.shape or one.dtype != theirs.dtype or not one.size
        ] + [
            f"{name}: {who} has NaN or infinite values"
            for who, one in (("the reference", theirs), *(("Megatron", copy) for copy in ours))
            if not np.isfinite(one).all()
        ]
        problems += wrong
        if not wrong:
            own = scales[name] * _DROWNED
            found.append(
                _tensor_error(name, ours, theirs, true, min(least, own or least), scales[name])
            )
    found.sort(key=lambda one: (-one.excess, one.name))
    return found, problems


def _tensor_error(
    name: str, ours: Sequence[Array], theirs: Array, true: Array, least: float, scale: float
) -> TensorError:
    worst_copy = max(ours, key=lambda copy: _rms(copy - true))
    off = np.abs(worst_copy - true)
    index = tuple(int(i) for i in np.unravel_index(int(off.argmax()), off.shape))
    candidate, reference = _rms(worst_copy - true), _rms(theirs - true)
    return TensorError(
        name=name,
        excess=candidate / max(reference, least),
        candidate=candidate,
        reference=reference,
        scale=scale,
        worst=index,
        ours=float(worst_copy[index]),
        truth=float(true[index]),
    )


def reference_error(errors: Sequence[TensorError]) -> float:
    """The reference's relative error in the tensor where it is least; NaN without any.

    A reference that computes another function is wrong in every gradient, since all depend on its
    logits. Taking the least asks for no more than one tensor that is well-conditioned: a model of
    hidden_size 1 has others whose true gradients nearly cancel, and are rounding for the most part.
    """
    return min((one.reference / one.scale for one in errors if one.scale), default=math.nan)


def loss_excess(
    losses: Sequence[float], reference: float, truth: float, *, scale: float, floor: float
) -> float:
    """The farthest rank's distance from the true loss, in units of the reference's.

    Args:
        losses: Of all ranks.
        reference: The reference's loss.
        truth: The oracle's.
        scale: What a loss is the difference of: rms(logits), or the loss if that is larger.
        floor: Least error counted for the reference, relative to `scale`. A loss is one number,
            and the error of one number is near zero by chance now and then.
    """
    farthest = max((abs(loss - truth) for loss in losses), default=math.nan)
    if not all(math.isfinite(loss) for loss in losses):
        return math.nan  # max() passes NaN over
    return farthest / max(abs(reference - truth), floor * scale)


def _rms(values: Array) -> float:
    return math.sqrt(float(np.mean(np.square(values, dtype=np.float64)))) if values.size else 0.0
