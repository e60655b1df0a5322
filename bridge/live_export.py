"""Hugging Face tensors out of a live Megatron model, gathered over TP and PP one by one.

A rank's shard is tiled by the tensors of Hugging Face; each of its tiles is a piece of one of them.
So the ranks that hold a parameter give away their tiles, box by box, and nothing is computed: the
result has the live model's bits. Memory is one tensor and one tile of it, whatever the model.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch

from bridge.dtypes import dtype_named
from bridge.errors import BridgeError, DtypeMismatchError, UsageError
from bridge.forward import current_device
from bridge.live_parameters import matched
from bridge.loading import unwatched
from bridge.parameters import Parameter, hf_tensors, parameters
from bridge.progress import Advance
from bridge.rounding import largest_finite
from bridge.spec import ModelSpec, ParallelLayout, Stage
from bridge.tiling import Shape, Tile

if TYPE_CHECKING:
    from megatron.core.models.gpt import GPTModel


class HFWeightTuple(NamedTuple):
    """A tensor under its Hugging Face name."""

    param_name: str
    weight: torch.Tensor


def export_hf(
    model_parts: Sequence[GPTModel],
    spec: ModelSpec,
    layout: ParallelLayout,
    *,
    only: Collection[str] | None = None,
    dst: int | None = None,
    cpu: bool = False,
    weight_dtype: torch.dtype | None = None,
    advance: Advance = unwatched,
) -> Iterator[HFWeightTuple]:
    """Stream the model's tensors, in the order the model runs.

    Every rank of the layout must exhaust the stream; with data parallelism each replica has one of
    its own. A tied embedding comes once, from the first stage; the padding of the vocabulary stays.

    Args:
        model_parts: This rank's, bare.
        spec: The model.
        layout: How it is cut.
        only: Megatron parameters wanted, the same on every rank; None is all.
        dst: Global rank that gets the tensors; the stream of all others is empty, and other
            replicas take no part. None gives every rank every tensor.
        cpu: Put them together in host memory.
        weight_dtype: Round each element to this dtype, once.
        advance: Progress in bytes of the tensors, as the model holds them.

    Raises:
        UsageError: BR001, a dtype that holds no floating-point numbers.
        PlanError: BR400, live parameters and the table are not the same, on whichever rank: nothing
            has been exchanged.
        DtypeMismatchError: BR303, finite elements would become infinite, likewise.
    """
    refuse_no_float(weight_dtype)
    replica = _join_replica(model_parts, spec, layout, weight_dtype, only)
    if dst is not None and dst not in replica.places.values():
        return
    shapes = hf_tensors(spec)
    for parameter, stage in owners(spec, layout):
        pp_rank = stage.pp_rank
        if only is not None and parameter.name not in only:
            continue
        local = replica.tensors.get(parameter.name)
        for name, pieces in _pieces(parameter, layout.tensor_model_parallel_size).items():
            dtype = replica.dtypes[pp_rank, parameter.name]
            weight = None
            if dst is None or dst == replica.rank:
                device = "cpu" if cpu else current_device()
                weight = torch.empty(shapes[name], dtype=dtype, device=device)
            for tp_rank, tile in pieces:
                owner = replica.places[pp_rank, tp_rank]
                mine = None if local is None else local[tile.target_box.slices]
                _move(mine, weight, tile, dtype, owner=owner, dst=dst, replica=replica)
            if weight is not None:
                advance(weight.nbytes)
                yield HFWeightTuple(
                    name, weight if weight_dtype is None else weight.to(weight_dtype)
                )


def refuse_no_float(dtype: torch.dtype | None, *, name: str = "weight_dtype") -> None:
    """Refuse a dtype that weights are not rounded to but mangled in: integers, float8 unscaled.

    Raises:
        UsageError: BR001, naming it.
    """
    if dtype is not None and not dtype_named(str(dtype)).is_floating:
        raise UsageError(
            f"weights are not held in {dtype}",
            where=f"{name}={dtype}",
            hint="choose torch.bfloat16, torch.float16, torch.float32 or torch.float64",
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Replica:
    """The ranks that hold one model together, as one of them sees them.

    Args:
        rank: This process's global rank.
        pp_rank: This process's.
        group: All of them.
        places: Global rank by (pp_rank, tp_rank).
        tensors: This rank's shards by the parameter's name.
        dtypes: Of the parameters, by pipeline rank and name.
    """

    rank: int
    pp_rank: int
    group: torch.distributed.ProcessGroup
    places: Mapping[tuple[int, int], int]
    tensors: Mapping[str, torch.Tensor]
    dtypes: Mapping[tuple[int, str], torch.dtype]


def _join_replica(
    model_parts: Sequence[GPTModel],
    spec: ModelSpec,
    layout: ParallelLayout,
    weight_dtype: torch.dtype | None,
    only: Collection[str] | None,
) -> _Replica:
    from megatron.core import parallel_state

    group = parallel_state.get_model_parallel_group()
    rank = torch.distributed.get_rank()
    pp_rank = parallel_state.get_pipeline_model_parallel_rank()
    tp_rank = parallel_state.get_tensor_model_parallel_rank()
    tensors: dict[str, torch.Tensor] = {}
    error: BridgeError | None = None
    try:
        overflows: dict[str, int] = {}
        for one, parameter in matched(model_parts, spec, layout):
            tensors[one.name] = one.tensor.detach()
            if weight_dtype is not None and (only is None or one.name in only):
                tiles = parameter.shard(tp_rank, layout.tensor_model_parallel_size).tiles
                overflows |= _overflows(tensors[one.name], tiles, weight_dtype)
        # Now, and not when a tensor is put together: the ranks that send it would wait for ever.
        if overflows and weight_dtype is not None:
            raise _overflow_error(overflows, weight_dtype)
    except BridgeError as found:
        error = found  # the others are about to wait for this rank
    mine = rank, pp_rank, tp_rank, {name: one.dtype for name, one in tensors.items()}, error
    told = [mine] * torch.distributed.get_world_size(group)
    torch.distributed.all_gather_object(told, mine, group=group)
    for *_, failed in told:
        if failed is not None:
            raise failed
    return _Replica(
        rank=rank,
        pp_rank=pp_rank,
        group=group,
        places={(pp, tp): global_rank for global_rank, pp, tp, *_ in told},
        tensors=tensors,
        dtypes={(pp, name): one for _, pp, _, of, _ in told for name, one in of.items()},
    )


def _overflows(
    shard: torch.Tensor, tiles: Sequence[Tile], weight_dtype: torch.dtype
) -> dict[str, int]:
    """How many finite elements become infinite, by Hugging Face tensor; only those that any do."""
    found: dict[str, int] = {}
    if not shard.is_floating_point() or (
        torch.finfo(weight_dtype).max >= torch.finfo(shard.dtype).max
    ):
        return found
    for tile in tiles:
        if tile.source is not None:
            mine = shard[tile.target_box.slices]
            count = int((mine.to(weight_dtype).isinf() & mine.isfinite()).sum())
            if count:
                found[tile.source] = found.get(tile.source, 0) + count
    return found


def _overflow_error(overflows: Mapping[str, int], weight_dtype: torch.dtype) -> DtypeMismatchError:
    dtype = dtype_named(str(weight_dtype))
    return DtypeMismatchError(
        f"{sum(overflows.values())} elements of {len(overflows)} tensors are too large for "
        f"{dtype.name}, whose largest value is {largest_finite(dtype):g}",
        where=[f"{name}: {count}" for name, count in overflows.items()],
        hint="choose torch.bfloat16 or torch.float32; nothing was written",
    )


def owners(spec: ModelSpec, layout: ParallelLayout) -> Iterator[tuple[Parameter, Stage]]:
    """Every parameter in the order the model runs, and the stage that gives it away."""
    stages = list(layout.stages())
    of_layer = {layer_idx: stage for stage in stages for layer_idx in stage.layers}
    rows = spec.padded_vocab_size(
        layout.tensor_model_parallel_size,
        make_vocab_size_divisible_by=layout.make_vocab_size_divisible_by,
    )
    for parameter in parameters(spec, padded_vocab_size=rows).values():
        if parameter.layer_idx is not None:
            yield parameter, of_layer[parameter.layer_idx]
        else:
            first = parameter.name.startswith("embedding.")
            yield parameter, stages[0 if first else -1]


def _pieces(parameter: Parameter, tp: int) -> dict[str, list[tuple[int, Tile]]]:
    """By Hugging Face tensor: the TP ranks' tiles of it. A parameter not sharded is rank 0's."""
    found: dict[str, list[tuple[int, Tile]]] = {
        tile.source: [] for tile in parameter.tiling.tiles if tile.source is not None
    }
    for tp_rank in range(1 if parameter.tp_axis is None else tp):
        for tile in parameter.shard(tp_rank, tp).tiles:
            if tile.source is not None:
                found[tile.source].append((tp_rank, tile))
    return found


def _move(
    mine: torch.Tensor | None,
    weight: torch.Tensor | None,
    tile: Tile,
    dtype: torch.dtype,
    *,
    owner: int,
    dst: int | None,
    replica: _Replica,
) -> None:
    """Bring one tile from the rank that owns it into the tensor, wherever that is being made."""
    owned = replica.rank == owner
    alone = dst == owner or len(replica.places) == 1
    if not alone:
        mine = _exchange(
            mine if owned else None, tile.source_box.shape, dtype,
            owner=owner, dst=dst, replica=replica,
        )  # fmt: skip
    if weight is not None and mine is not None:
        weight[tile.source_box.slices] = mine


def _exchange(
    mine: torch.Tensor | None,
    shape: Shape,
    dtype: torch.dtype,
    *,
    owner: int,
    dst: int | None,
    replica: _Replica,
) -> torch.Tensor | None:
    """Send a tile from its owner to `dst`, or to all; None for those who get nothing."""
    if dst is not None and replica.rank not in (owner, dst):
        return None
    group = replica.group
    device = current_device()
    # gloo sends host memory only; it serves GPUs where several ranks share one.
    if torch.distributed.get_backend(group) == "gloo":
        device = torch.device("cpu")
    if mine is None:
        wire = torch.empty(shape, dtype=dtype, device=device)
    else:
        wire = mine.to(device).contiguous()
    # Bytes, for then no backend has to know the dtype, nor can it touch a NaN.
    data = wire.view(torch.uint8)
    if dst is None:
        torch.distributed.broadcast(data, owner, group=group)
    elif mine is not None:
        torch.distributed.send(data, dst, group=group)
    else:
        torch.distributed.recv(data, owner, group=group)
    return wire
