"""What a rank's memory is made of, for a layout and a workload. Imports no torch.

Bytes of weights are exact, and those of gradients and optimizer follow from them (the distributed
optimizer's padding of its buckets, a few KiB, is left out). Activations are an estimate:
`bridge.activations` says of what. The CUDA context, NCCL's buffers and fragmentation are in none
of these; see `bridge.layout_search.Machine`, which keeps room for them.
"""

from __future__ import annotations

from dataclasses import dataclass

from bridge.activations import inference_activations, kv_cache, training_activations
from bridge.describe import rank_num_parameters
from bridge.dtypes import dtype_named
from bridge.spec import ModelSpec, ParallelLayout, Stage
from bridge.workload import MAIN_GRADIENT, OPTIMIZER, Workload


@dataclass(frozen=True, slots=True, kw_only=True)
class RankMemory:
    """Bytes on each rank of one pipeline rank, over its virtual stages; its TP ranks are alike."""

    pp_rank: int
    num_parameters: int
    weights: int
    gradients: int = 0
    optimizer: int = 0
    activations: int = 0
    kv_cache: int = 0

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.gradients + self.optimizer + self.activations + self.kv_cache


def rank_memory(spec: ModelSpec, layout: ParallelLayout, work: Workload) -> tuple[RankMemory, ...]:
    """The memory of each pipeline rank, in order.

    Args:
        spec: The model.
        layout: How one replica of it is cut.
        work: What is done with it.
    """
    return tuple(
        _one_rank(spec, layout, work, pp_rank)
        for pp_rank in range(layout.pipeline_model_parallel_size)
    )


def least_memory(spec: ModelSpec, layout: ParallelLayout, work: Workload, stage: Stage) -> int:
    """Bytes of a rank that holds this stage, or more, without the optimizer's state.

    Args:
        spec: The model.
        layout: With PP 1, so that one micro batch is in flight.
        work: What is done with it.
        stage: What the rank holds at least.
    """
    found = _of_stages(spec, layout, work, 0, (stage,))
    return found.total - found.optimizer


def _one_rank(spec: ModelSpec, layout: ParallelLayout, work: Workload, pp_rank: int) -> RankMemory:
    return _of_stages(spec, layout, work, pp_rank, layout.stages_of(pp_rank))


def _of_stages(
    spec: ModelSpec,
    layout: ParallelLayout,
    work: Workload,
    pp_rank: int,
    stages: tuple[Stage, ...],
) -> RankMemory:
    held = sum(rank_num_parameters(spec, layout, stage) for stage in stages)
    weights = held * dtype_named(work.params_dtype).itemsize
    if work.purpose == "inference":
        return RankMemory(
            pp_rank=pp_rank,
            num_parameters=held,
            weights=weights,
            activations=inference_activations(spec, layout, work, stages),
            kv_cache=kv_cache(spec, layout, work, stages),
        )
    replicas = work.data_parallel_size if work.distributed_optimizer else 1
    return RankMemory(
        pp_rank=pp_rank,
        num_parameters=held,
        weights=weights,
        gradients=held * MAIN_GRADIENT[work.params_dtype],
        optimizer=-(-held // replicas) * OPTIMIZER[work.params_dtype],
        activations=training_activations(spec, layout, work, stages),
    )
