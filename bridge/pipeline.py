"""Deal the layers of a model out over pipeline stages.

A homogeneous model whose layers divide evenly is split evenly, as Megatron does. Any other is
balanced by parameters, the embedding counted on the first stage and the output layer on the last:
Ultra has 162 layers, and a single one of them holds 20.9 billion of its 253 billion parameters
while 81 have no feed-forward at all, so equal layer counts are useless. Nothing here imports torch.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from itertools import accumulate, pairwise
from typing import Final

from bridge.errors import LayoutError, PipelineParallelError, TensorParallelError
from bridge.parameters import (
    block_num_parameters,
    embedding_num_parameters,
    output_num_parameters,
)
from bridge.spec import Linear, ModelSpec, ParallelLayout

_NAME_PART: Final = re.compile(r"(tp|pp|vp)([1-9][0-9]{0,5})|(sp)|l([0-9]{1,6}(?:\.[0-9]{1,6})*)")
_FARTHEST_MOVE: Final = 4
"""Layers a boundary may jump at once while pipeline ranks are evened out over their stages."""


def plan_layout(
    spec: ModelSpec,
    *,
    tensor_model_parallel_size: int = 1,
    pipeline_model_parallel_size: int = 1,
    virtual_pipeline_model_parallel_size: int | None = None,
    num_layers_per_stage: Sequence[int] | None = None,
    sequence_parallel: bool = False,
    make_vocab_size_divisible_by: int = 128,
) -> ParallelLayout:
    """Cut a model over ranks, choosing the layers of each pipeline stage.

    Args:
        spec: The model.
        tensor_model_parallel_size: TP.
        pipeline_model_parallel_size: PP.
        virtual_pipeline_model_parallel_size: Model parts per pipeline rank; None, or 1, without
            interleaving.
        num_layers_per_stage: Layers of each of the PP x VPP stages in the order the model runs, to
            be taken as they are (0 is allowed: a stage of only the embedding or the output layer).
            None balances them here.
        sequence_parallel: Shard activations along the sequence outside the TP regions.
        make_vocab_size_divisible_by: The vocabulary is padded to a multiple of this times TP.

    Returns:
        A layout that has passed `ParallelLayout.validate_for`. Chosen stages hold at least one
        layer each. Without interleaving no other split has a smaller largest stage; with it,
        pipeline ranks are evened out from that split by moving boundaries.

    Raises:
        PipelineParallelError: BR202, more stages than layers, or stages that do not add up.
        TensorParallelError: BR201, sizes that TP does not divide, or sequence parallelism without
            TP.
        LayoutError: BR200, sizes that contradict one another, or see `refuse_broken_layout`.
    """
    tp, pp = tensor_model_parallel_size, pipeline_model_parallel_size
    vpp = (
        None if virtual_pipeline_model_parallel_size == 1 else virtual_pipeline_model_parallel_size
    )
    if min(tp, pp, 1 if vpp is None else vpp, make_vocab_size_divisible_by) < 1:
        raise LayoutError(
            f"parallel sizes must be positive, got tensor {tp}, pipeline {pp}, virtual pipeline "
            f"{vpp}, make_vocab_size_divisible_by {make_vocab_size_divisible_by}"
        )
    if vpp is not None and pp == 1:
        raise PipelineParallelError(
            f"virtual_pipeline_model_parallel_size={vpp} with pipeline_model_parallel_size=1",
            hint="interleaving needs at least two pipeline ranks",
        )
    if sequence_parallel and tp == 1:
        raise TensorParallelError(
            "sequence_parallel with tensor_model_parallel_size=1",
            hint="sequence parallelism shards over the tensor parallel ranks: use at least two",
        )
    if num_layers_per_stage is None:
        stages = _choose_stages(spec, pp=pp, vpp=vpp or 1)
    else:
        stages = tuple(num_layers_per_stage)
        _check_stages(spec, stages, num_stages=pp * (vpp or 1))
    layout = ParallelLayout(
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        virtual_pipeline_model_parallel_size=vpp,
        num_layers_per_stage=stages,
        sequence_parallel=sequence_parallel,
        make_vocab_size_divisible_by=make_vocab_size_divisible_by,
    )
    layout.validate_for(spec)
    refuse_broken_layout(spec, layout)
    return layout


def refuse_broken_layout(spec: ModelSpec, layout: ParallelLayout) -> None:
    """Refuse a layout that Megatron-Core builds and then fails to run.

    Raises:
        LayoutError: BR200, linear replacements under sequence parallelism. Source: megatron-core
            0.16.1 `_gather_from_tensor_parallel_region` pads the sequence where it means the
            hidden size (`F.pad` counts dimensions from the last), so shapes no longer match.
    """
    linears = [
        f"block {layer_idx}"
        for layer_idx, block in enumerate(spec.blocks)
        if Linear() in (block.attention, block.ffn)
    ]
    if layout.sequence_parallel and linears:
        raise LayoutError(
            "Megatron-Core cannot run linear replacements under sequence parallelism",
            where=linears,
            hint=f"use {layout.name.removesuffix('-sp')}",
        )


def parse_layout(
    name: str, spec: ModelSpec, *, make_vocab_size_divisible_by: int = 128
) -> ParallelLayout:
    """Plan the layout that a name such as `tp2-pp2-vp2-sp` asks for; parts left out are 1.

    `tp1-pp2-l5.3` gives the layers of each stage, in the model's order; without it `plan_layout`
    chooses them. Inverse: `ParallelLayout.name`, for layouts whose stages were chosen.

    Raises:
        LayoutError: BR200, not a layout name; and whatever `plan_layout` raises.
    """
    sizes: dict[str, int] = {}
    stages: tuple[int, ...] | None = None
    for part in name.split("-"):
        match = _NAME_PART.fullmatch(part)
        if match is not None and match[4] and stages is None:
            stages = tuple(map(int, match[4].split(".")))
            continue
        key = (match[1] or match[3]) if match else None
        if match is None or key is None or key in sizes:
            raise LayoutError(
                f"{name!r} is not a parallel layout",
                where=f"part {part!r}",
                hint="write it as tp2-pp1, tp2-pp2-vp2, tp4-pp1-sp or tp1-pp2-l5.3, each part once",
            )
        sizes[key] = int(match[2] or 1)
    return plan_layout(
        spec,
        tensor_model_parallel_size=sizes.get("tp", 1),
        pipeline_model_parallel_size=sizes.get("pp", 1),
        virtual_pipeline_model_parallel_size=sizes.get("vp"),
        sequence_parallel="sp" in sizes,
        num_layers_per_stage=stages,
        make_vocab_size_divisible_by=make_vocab_size_divisible_by,
    )


def stage_num_parameters(spec: ModelSpec, layout: ParallelLayout) -> tuple[int, ...]:
    """Number of parameters of each stage, over all TP ranks, in the order the model runs.

    A tied embedding counts on the first stage only; the last holds a copy when PP is above 1.
    """
    return tuple(
        sum(block_num_parameters(spec, layer_idx) for layer_idx in stage.layers)
        + (embedding_num_parameters(spec) if stage.pre_process else 0)
        + (output_num_parameters(spec) if stage.post_process else 0)
        for stage in layout.stages()
    )


def _check_stages(spec: ModelSpec, stages: tuple[int, ...], *, num_stages: int) -> None:
    if len(stages) != num_stages:
        raise PipelineParallelError(
            f"{len(stages)} stages given, the layout has {num_stages}",
            hint="give one layer count per pipeline rank and virtual stage, in the model's order",
        )
    if any(count < 0 for count in stages):
        raise PipelineParallelError(f"negative layer count in {list(stages)}")
    if sum(stages) != spec.num_layers:
        raise PipelineParallelError(
            f"the stages hold {sum(stages)} layers, the model has {spec.num_layers}",
            where=f"num_layers_per_stage={list(stages)}",
            hint=f"make the counts add up to {spec.num_layers}",
        )


@lru_cache(maxsize=256)
def _choose_stages(spec: ModelSpec, *, pp: int, vpp: int) -> tuple[int, ...]:
    num_stages = pp * vpp
    if num_stages > spec.num_layers:
        fits = max(1, spec.num_layers // vpp)
        raise PipelineParallelError(
            f"{num_stages} pipeline stages for {spec.num_layers} layers",
            hint=f"use pipeline_model_parallel_size {fits} or less"
            + (f" at virtual_pipeline_model_parallel_size {vpp}" if vpp > 1 else ""),
        )
    if not spec.heterogeneous_block_specs and spec.num_layers % num_stages == 0:
        return (spec.num_layers // num_stages,) * num_stages
    weights = [block_num_parameters(spec, layer_idx) for layer_idx in range(spec.num_layers)]
    weights[0] += embedding_num_parameters(spec)
    weights[-1] += output_num_parameters(spec)
    stages = _smallest_largest_stage(weights, num_stages)
    return _even_out_ranks(weights, stages, pp=pp) if vpp > 1 else stages


def _smallest_largest_stage(weights: Sequence[int], num_stages: int) -> tuple[int, ...]:
    """Contiguous stages of at least one layer whose largest is as small as can be, exactly.

    Of the splits with that largest stage it takes the one with the smallest sum of squares, so
    the other stages are even too, and of those the one whose first stages are the shortest: the
    answer does not depend on the order of the search.
    """
    num_layers = len(weights)
    prefix = [0, *accumulate(weights)]
    bound = _largest_stage(weights, num_stages)
    # By stages left: first layer of the first of them -> smallest sum of squares within the bound.
    least: list[dict[int, int]] = [{num_layers: 0}]

    def ways(start: int, following: Mapping[int, int]) -> Iterator[tuple[int, int]]:
        for stop in range(start + 1, num_layers + 1):
            size = prefix[stop] - prefix[start]
            if size > bound:
                return
            if stop in following:
                yield size * size + following[stop], stop

    for _ in range(num_stages):
        found = {start: min(ways(start, least[-1]), default=None) for start in range(num_layers)}
        least.append({start: way[0] for start, way in found.items() if way is not None})
    bounds = [0]
    for following in reversed(least[:-1]):
        bounds.append(min(ways(bounds[-1], following))[1])
    return tuple(stop - start for start, stop in pairwise(bounds))


def _largest_stage(weights: Sequence[int], num_stages: int) -> int:
    """The smallest possible size of the largest stage, every stage holding a layer or more.

    A stage that holds more than one layer can be split, so as many stages as a bound needs or more
    is enough.
    """

    def fits(bound: int) -> bool:
        stages, size = 1, 0
        for weight in weights:
            size += weight
            if size > bound:
                stages, size = stages + 1, weight
        return stages <= num_stages

    sizes = range(max(weights), sum(weights))
    return sizes.start + bisect_left(sizes, x=True, key=fits)


def _even_out_ranks(weights: Sequence[int], stages: tuple[int, ...], *, pp: int) -> tuple[int, ...]:
    """Move stage boundaries while that lowers the largest pipeline rank, then the largest stage.

    A rank's load is the sum over its virtual stages, so the split with the smallest largest stage
    may still give one rank all the heavy ones. Steepest descent, deterministic.
    """
    prefix = [0, *accumulate(weights)]
    num_stages = len(stages)

    def cost(bounds: Sequence[int]) -> tuple[int, int, int]:
        sizes = [prefix[stop] - prefix[start] for start, stop in pairwise(bounds)]
        ranks = [sum(sizes[rank::pp]) for rank in range(pp)]
        return max(ranks), max(sizes), sum(size * size for size in ranks)

    bounds = [0, *accumulate(stages)]
    current = cost(bounds)
    while True:
        neighbours = []
        for boundary in range(1, num_stages):
            for step in range(-_FARTHEST_MOVE, _FARTHEST_MOVE + 1):
                moved = bounds.copy()
                moved[boundary] += step
                if moved[boundary - 1] < moved[boundary] < moved[boundary + 1]:
                    neighbours.append((cost(moved), moved))
        nearest = min(neighbours, default=(current, bounds))
        if nearest[0] >= current:
            return tuple(b - a for a, b in pairwise(bounds))
        current, bounds = nearest
