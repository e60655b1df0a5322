"""Hidden states of live Megatron models, block by block, and what their tensors hold.

Every function here runs in rank processes: it takes a `RankContext` and plain data, and returns
plain data.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np

from bridge.spec import ParallelLayout
from harness import live
from harness.damage import LiveWords, look_for_damage
from harness.live import ModelRequest
from harness.ranks import RankContext

Array = np.ndarray[Any, np.dtype[Any]]
EMBEDDING: Final = -1
"""Stands for the embedding where a `layer_idx` is asked for."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RankStates:
    """What one rank saw; states are (seq or its share of it, batch, hidden_size).

    Attributes:
        rank: Which.
        tp_rank: Which share of a sequence, where it is shared.
        free: Layer index to the state after that block, the model left to itself.
        entering: First layer index of each model part to the state it was given.
        forced: The same as `free`, every block given the reference's state.
        logits: Of the head, given the reference's last state; from the first rank alone.
    """

    rank: int
    tp_rank: int
    free: dict[int, Array] = field(default_factory=dict)
    entering: dict[int, Array] = field(default_factory=dict)
    forced: dict[int, Array] = field(default_factory=dict)
    logits: Array | None = None


def states(
    context: RankContext,
    request: ModelRequest,
    input_ids: Array,
    position_ids: Array,
    inputs: Sequence[Array],
) -> RankStates:
    """Run the model twice, free and forced, and keep the state after every block.

    Args:
        context: This rank.
        request: The model.
        input_ids: (batch, seq).
        position_ids: (seq,) or (batch, seq).
        inputs: What each block is given when forced, and last the head: (batch, seq, hidden_size).
    """
    import torch
    from megatron.core import parallel_state

    from bridge.forward import forward

    parts = live.model(context, request)
    tp_rank: int = parallel_state.get_tensor_model_parallel_rank()
    found = RankStates(rank=context.rank, tp_rank=tp_rank)
    ids, positions = torch.from_numpy(input_ids), torch.from_numpy(position_ids)
    share = (tp_rank, request.layout.tensor_model_parallel_size)
    if not request.layout.sequence_parallel:
        share = (0, 1)

    def give(layer_idx: int, hidden: Any) -> Any:  # noqa: ANN401 - a tensor
        return _share_of(inputs[layer_idx], hidden, *share) if layer_idx < len(inputs) else None

    with torch.no_grad():
        with _watched(parts, found.free, entering=found.entering):
            forward(parts, request.spec, request.layout, ids, positions)
        with _watched(parts, found.forced, give=give, head=len(inputs) - 1):
            logits = forward(parts, request.spec, request.layout, ids, positions)
    if context.rank != 0:
        return found
    return RankStates(
        rank=0, tp_rank=tp_rank, free=found.free, entering=found.entering, forced=found.forced,
        logits=_plain(logits),
    )  # fmt: skip


def _share_of(whole: Array, like: Any, index: int, ways: int) -> Any:  # noqa: ANN401 - tensors
    """This rank's share of a sequence, (share, batch, hidden_size), padded as the model's is."""
    import torch

    hidden = torch.from_numpy(whole).transpose(0, 1)
    length = like.shape[0]
    missing = length * ways - hidden.shape[0]
    padded = torch.nn.functional.pad(hidden, (0, 0, 0, 0, 0, missing))
    return padded[index * length : (index + 1) * length].to(like).contiguous()


@contextlib.contextmanager
def _watched(
    parts: Sequence[Any],
    states_by_layer: dict[int, Array],
    *,
    entering: dict[int, Array] | None = None,
    give: Callable[[int, Any], Any] | None = None,
    head: int | None = None,
) -> Iterator[None]:
    """Keep what the embedding and each block put out; before that, put in what `give` says."""
    handles = []
    for part in parts:
        layers = list(part.decoder.layers)
        if part.pre_process:
            keep = partial(_keep, states_by_layer, EMBEDDING)
            handles.append(part.embedding.register_forward_hook(keep))
        for local_layer_idx, layer in enumerate(layers):
            layer_idx = layer.layer_number - 1
            if give is not None:
                swap = partial(_swap, give, layer_idx)
                handles.append(layer.register_forward_pre_hook(swap, with_kwargs=True))
            elif entering is not None and local_layer_idx == 0:
                look = partial(_look, entering, layer_idx)
                handles.append(layer.register_forward_pre_hook(look, with_kwargs=True))
            handles.append(layer.register_forward_hook(partial(_keep, states_by_layer, layer_idx)))
        norm = part.decoder.final_layernorm
        if give is not None and head is not None and norm is not None:
            handles.append(norm.register_forward_pre_hook(partial(_swap_first, give, head)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _keep(kept: dict[int, Array], layer_idx: int, _module: Any, _args: Any, output: Any) -> None:  # noqa: ANN401 - a hook
    kept[layer_idx] = _plain(output[0] if isinstance(output, tuple) else output)


def _look(
    kept: dict[int, Array],
    layer_idx: int,
    _layer: Any,  # noqa: ANN401 - a hook
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> None:
    kept[layer_idx] = _plain(kwargs["hidden_states"] if "hidden_states" in kwargs else args[0])


def _swap(
    give: Callable[[int, Any], Any],
    layer_idx: int,
    _layer: Any,  # noqa: ANN401 - a hook
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    given = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
    wanted = give(layer_idx, given)
    if wanted is None:
        return args, kwargs
    if "hidden_states" in kwargs:
        return args, {**kwargs, "hidden_states": wanted}
    return (wanted, *args[1:]), kwargs


def _swap_first(
    give: Callable[[int, Any], Any],
    layer_idx: int,
    _module: Any,  # noqa: ANN401 - a hook
    args: tuple[Any, ...],
) -> tuple[Any, ...]:
    return (give(layer_idx, args[0]), *args[1:])


def _plain(tensor: Any) -> Array:  # noqa: ANN401 - a tensor
    """A copy, since what follows may compute in place; bfloat16 becomes float32, exactly."""
    import torch

    wide = tensor if tensor.dtype == torch.float64 else tensor.float()
    found: Array = wide.detach().clone().cpu().numpy()
    return found


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Gathered:
    """States of the whole model, (batch, seq, hidden_size), by layer index.

    Several where the TP ranks that should hold one state hold different ones; (TP rank, state).
    """

    free: Mapping[int, list[tuple[int, Array]]]
    forced: Mapping[int, list[tuple[int, Array]]]
    entering: Mapping[int, list[tuple[int, Array]]]
    logits: Array


def gather(ranks: Sequence[RankStates], layout: ParallelLayout, num_tokens: int) -> Gathered:
    """Put the shares of all ranks together."""
    logits = next(rank.logits for rank in ranks if rank.logits is not None)
    return Gathered(
        free=_gather([(rank.tp_rank, rank.free) for rank in ranks], layout, num_tokens),
        forced=_gather([(rank.tp_rank, rank.forced) for rank in ranks], layout, num_tokens),
        entering=_gather([(rank.tp_rank, rank.entering) for rank in ranks], layout, num_tokens),
        logits=logits,
    )


def _gather(
    ranks: Sequence[tuple[int, Mapping[int, Array]]], layout: ParallelLayout, num_tokens: int
) -> dict[int, list[tuple[int, Array]]]:
    shares: dict[int, list[tuple[int, Array]]] = {}
    for tp_rank, by_layer in ranks:
        for layer_idx, state in by_layer.items():
            shares.setdefault(layer_idx, []).append((tp_rank, state))
    found: dict[int, list[tuple[int, Array]]] = {}
    for layer_idx, parts in sorted(shares.items()):
        ordered = sorted(parts, key=lambda one: one[0])
        if layout.sequence_parallel:
            ordered = [(0, np.concatenate([state for _, state in ordered]))]
        different: list[tuple[int, Array]] = []
        for tp_rank, state in ordered:
            whole = state.swapaxes(0, 1)[:, :num_tokens]
            if not any(np.array_equal(whole, other) for _, other in different):
                different.append((tp_rank, whole))
        found[layer_idx] = different
    return found


def damage(
    context: RankContext, request: ModelRequest, hf: Path, config: dict[str, Any]
) -> tuple[list[dict[str, Any]], list[str]]:
    """Hold every live tensor against what Megatron should read there.

    Args:
        context: This rank.
        request: The model, from wherever its weights come.
        hf: The Hugging Face checkpoint that says what the weights should be.
        config: Its configuration.

    Returns:
        Damaged tiles, as `harness.damage.Damage.to_dict`, and the HF tensors that this rank holds
        some of.
    """
    from megatron.core import parallel_state

    from harness.compare import words_of
    from harness.oracle import read_config

    tensors = [
        LiveWords(name=one.name, words=words_of(one.tensor), dtype=str(one.tensor.dtype))
        for one in live.live_tensors(live.model(context, request))
    ]
    found, held = look_for_damage(
        tensors,
        hf,
        read_config(config),
        tp_rank=parallel_state.get_tensor_model_parallel_rank(),
        tp=request.layout.tensor_model_parallel_size,
    )
    return [one.to_dict(context.rank) for one in found], held
