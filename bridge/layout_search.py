"""Which layouts of a model fit a cluster, the best first. Imports no torch.

Every TP that divides the model and a node, times every PP that divides what is left; data
parallelism takes the rest. Pipeline stages are those of `bridge.pipeline`, balanced by parameters.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Final

from bridge.dtypes import dtype_named
from bridge.errors import LayoutError, NoLayoutFitsError, UsageError
from bridge.memory import RankMemory, least_memory, rank_memory
from bridge.parameters import block_num_parameters, num_parameters
from bridge.pipeline import plan_layout, refuse_broken_layout
from bridge.spec import ModelSpec, ParallelLayout, Stage, tensor_parallel_problems
from bridge.workload import MAIN_GRADIENT, OPTIMIZER, Workload

_GIB: Final = 1 << 30
_MIB: Final = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """What a model is to run on.

    Args:
        num_gpus: All of them.
        memory: Bytes of each.
        gpus_per_node: TP stays within a node, where links are fast.
        memory_fraction: Share of the memory that a layout may fill by its estimate; the rest is for
            the CUDA context, NCCL's buffers, workspaces and fragmentation, which it leaves out.

    Raises:
        UsageError: BR001, nothing to run on.
    """

    num_gpus: int
    memory: int
    gpus_per_node: int = 8
    memory_fraction: float = 0.9

    def __post_init__(self) -> None:
        """Check each value by itself."""
        if min(self.num_gpus, self.memory, self.gpus_per_node) < 1:
            raise UsageError("a machine has at least one GPU and one byte of memory")
        if not 0 < self.memory_fraction <= 1:
            raise UsageError(f"memory_fraction={self.memory_fraction:g} must lie in (0, 1]")

    @property
    def usable(self) -> int:
        """Bytes that an estimate may come to."""
        return int(self.memory * self.memory_fraction)


@dataclass(frozen=True, slots=True, kw_only=True)
class Suggestion:
    """A layout that fits.

    Args:
        layout: One replica.
        work: With the replicas that the machine then has.
        ranks: What each pipeline rank holds.
    """

    layout: ParallelLayout
    work: Workload
    ranks: tuple[RankMemory, ...]

    @property
    def num_gpus(self) -> int:
        """Ranks of all replicas."""
        return self.layout.world_size * self.work.data_parallel_size

    @property
    def fullest(self) -> RankMemory:
        """The pipeline rank that needs most."""
        return max(self.ranks, key=lambda rank: rank.total)

    @property
    def imbalance(self) -> float:
        """By how much the largest pipeline rank's parameters exceed the mean: 0 is even."""
        sizes = [rank.num_parameters for rank in self.ranks]
        return max(sizes) * len(sizes) / sum(sizes) - 1

    @property
    def order(self) -> tuple[float, ...]:
        """Smaller is better: see `suggest_layouts`."""
        pp = self.layout.pipeline_model_parallel_size
        return self.layout.world_size, pp, self.imbalance


def suggest_layouts(
    spec: ModelSpec, work: Workload, machine: Machine, *, make_vocab_size_divisible_by: int = 128
) -> list[Suggestion]:
    """Find every layout that fits, the best first.

    The best has the fewest ranks per replica: what they say to one another is the price of cutting
    a model, and what they leave over runs more replicas. Of as many ranks it has the fewest
    pipeline stages, so TP first, up to a node (Narayanan et al. 2021, "Efficient Large-Scale
    Language Model Training on GPU Clusters", takeaway 1), then the most even stages. Training is
    sequence parallel wherever there is TP and Megatron can run the model so.

    Args:
        spec: The model.
        work: What is done with it; its `data_parallel_size` is not looked at.
        machine: Where.
        make_vocab_size_divisible_by: The vocabulary is padded to a multiple of this times TP.

    Raises:
        NoLayoutFitsError: BR203, with the smallest number of GPUs and the smallest memory that do.
    """
    search = _Search(spec=spec, work=work, machine=machine, divisor=make_vocab_size_divisible_by)
    tried = list(search.candidates())
    fits = [one for one in tried if one.fullest.total <= machine.usable]
    if fits:
        return sorted(fits, key=lambda one: one.order)
    best = min(tried, key=lambda one: one.fullest.total)
    least = best.fullest.total / machine.memory_fraction
    unit, name = (_GIB, "GiB") if least > _GIB else (_MIB, "MiB")
    ways = [f"--memory {math.ceil(least / unit)}{name} ({best.layout.name})"]
    more = search.fewest_gpus()
    if more is not None:
        replicas = more.work.data_parallel_size
        ways.append(f"--gpus {more.num_gpus} ({more.layout.name}, data parallel {replicas})")
    each = f"{machine.num_gpus} GPU{'s' if machine.num_gpus > 1 else ''} of {_gib(machine.memory)}"
    need, rank = _gib(best.fullest.total), best.fullest.pp_rank
    where = [f"{best.layout.name} needs least, {need} on each rank of pipeline rank {rank}"]
    where.append(f"{_gib(machine.usable)} of each GPU may be filled, {machine.memory_fraction:.0%}")
    passing = best.fullest.activations + best.fullest.kv_cache
    is_passing = best.fullest.total - passing <= machine.usable
    if is_passing or (more is None and search.is_each_block_small_enough()):
        where.append(_passing_reason(best.fullest, is_all=is_passing))
        ways.append("a smaller --sequence-length or --micro-batch-size")
        if work.purpose == "training" and work.recompute == "none":
            ways.append("--recompute-granularity full")
    elif more is None:
        where.append("no number of such GPUs is enough: some block needs more by itself")
    raise NoLayoutFitsError(
        f"no layout of this model for {work.purpose} fits {each}",
        where=where,
        hint=f"the least that would do is {', or '.join(ways)}",
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Search:
    spec: ModelSpec
    work: Workload
    machine: Machine
    divisor: int

    def candidates(self) -> Iterator[Suggestion]:
        """Every layout that uses all GPUs."""
        for tp in self._tensor_sizes():
            if self.machine.num_gpus % tp:
                continue
            left = self.machine.num_gpus // tp
            for pp in range(1, min(left, self.spec.num_layers) + 1):
                if left % pp == 0:
                    yield self._suggestion(tp, pp, left // pp)

    def is_each_block_small_enough(self) -> bool:
        """Whether the weights of each block, and their gradients, fit at some TP."""
        return any(self._largest <= self._room(tp) for tp in self._tensor_sizes())

    @property
    def _largest(self) -> int:
        spec = self.spec
        return max(block_num_parameters(spec, layer_idx) for layer_idx in range(spec.num_layers))

    def _room(self, tp: int) -> float:
        """How many parameters of a model fit on the TP ranks of a stage."""
        per_parameter = dtype_named(self.work.params_dtype).itemsize
        if self.work.purpose == "training":
            per_parameter += MAIN_GRADIENT[self.work.params_dtype]
        return self.machine.usable * tp / per_parameter

    def fewest_gpus(self) -> Suggestion | None:
        """The layout for the smallest number of GPUs of this memory; None where none is enough.

        More replicas help as well as more stages where they share the optimizer's state.
        """
        best: Suggestion | None = None
        spec, largest = self.spec, self._largest
        for tp in reversed(self._tensor_sizes()):
            room = self._room(tp)
            if largest > room or self._least(tp) > self.machine.usable:
                continue
            for pp in range(math.ceil(num_parameters(spec) / room), spec.num_layers + 1):
                if best is not None and tp * pp >= best.num_gpus:
                    break
                dp = self._fewest_replicas(self._suggestion(tp, pp, 1))
                if dp is not None and (best is None or tp * pp * dp < best.num_gpus):
                    best = self._suggestion(tp, pp, dp)
        return best

    def _least(self, tp: int) -> int:
        """Bytes that some rank holds at this TP whatever the pipeline, Adam's state apart.

        The rank of each layer holds at least that layer, and of activations at least one micro
        batch's; no number of stages changes that, and so none has to be tried.
        """
        one = self._layout(tp, 1)
        if self.work.purpose == "training" and tp > 1:  # the least there is, allowed or not
            one = replace(one, sequence_parallel=True)
        last = self.spec.num_layers - 1
        kinds = {
            (block, layer_idx == 0, layer_idx == last): layer_idx
            for layer_idx, block in enumerate(self.spec.blocks)
        }
        return max(
            least_memory(
                self.spec,
                one,
                self.work,
                Stage(
                    pp_rank=0,
                    vp_stage=0,
                    layers=range(layer_idx, layer_idx + 1),
                    pre_process=is_first,
                    post_process=is_last,
                ),
            )
            for (_, is_first, is_last), layer_idx in kinds.items()
        )

    def _tensor_sizes(self) -> list[int]:
        """TP sizes that divide the model and a node, so that no TP group straddles two."""
        node = self.machine.gpus_per_node
        return [
            tp
            for tp in range(1, min(node, self.spec.num_attention_heads) + 1)  # it divides the heads
            if node % tp == 0 and not tensor_parallel_problems(self.spec, tp)
        ]

    def _layout(self, tp: int, pp: int) -> ParallelLayout:
        layout = plan_layout(
            self.spec,
            tensor_model_parallel_size=tp,
            pipeline_model_parallel_size=pp,
            make_vocab_size_divisible_by=self.divisor,
        )
        if self.work.purpose == "training" and tp > 1:
            layout = _with_sequence_parallelism(self.spec, layout)
        return layout

    def _suggestion(self, tp: int, pp: int, dp: int) -> Suggestion:
        layout = self._layout(tp, pp)
        work = replace(self.work, data_parallel_size=dp)
        return Suggestion(layout=layout, work=work, ranks=rank_memory(self.spec, layout, work))

    def _fewest_replicas(self, one: Suggestion) -> int | None:
        """How many must share the optimizer's state for each rank to fit; None if none do."""
        needed = 1
        for rank in one.ranks:
            room = self.machine.usable - (rank.total - rank.optimizer)
            if rank.optimizer <= room:
                continue
            parameters = room // OPTIMIZER[one.work.params_dtype]
            if parameters < 1 or not one.work.distributed_optimizer:
                return None
            needed = max(needed, -(-rank.num_parameters // parameters))
        return needed


def _with_sequence_parallelism(spec: ModelSpec, layout: ParallelLayout) -> ParallelLayout:
    divided = replace(layout, sequence_parallel=True)
    try:
        refuse_broken_layout(spec, divided)
    except LayoutError:
        return layout
    return divided


def _passing_reason(rank: RankMemory, *, is_all: bool) -> str:
    """That it is not the weights and what belongs to them, or not they alone, that do not fit."""
    parts = {"activations": rank.activations, "KV cache": rank.kv_cache}
    sizes = " and ".join(f"{_gib(size)} of {name}" for name, size in parts.items() if size)
    if not is_all:
        return f"no number of such GPUs is enough for {sizes} besides the weights"
    return f"the rest would fit: {sizes} are too much"


def _gib(nbytes: float) -> str:
    # 0.0 GiB says nothing.
    return f"{nbytes / _GIB:.1f} GiB" if nbytes >= _GIB / 20 else f"{nbytes / _MIB:.1f} MiB"
