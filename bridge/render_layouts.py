"""What `inspect` says of memory and of layouts that fit: plain data first, text second."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, Final

from bridge.console import gib, stdout, table

if TYPE_CHECKING:
    from bridge.layout_search import Machine, Suggestion
    from bridge.memory import RankMemory
    from bridge.workload import Workload

_SHOWN: Final = 6
_DIVISOR: Final = 128
_PARTS: Final[Mapping[str, str]] = {
    "weights": "weights",
    "gradients": "gradients",
    "optimizer": "optimizer",
    "activations": "activations",
    "kv_cache": "KV cache",
    "total": "total",
}


def memory_as_data(ranks: Sequence[RankMemory], work: Workload) -> dict[str, Any]:
    """The memory of each pipeline rank, and what it was counted for. Bytes."""
    return {
        "workload": asdict(work),
        "pp_ranks": [asdict(rank) | {"total": rank.total} for rank in ranks],
    }


def suggestions_as_data(
    found: Sequence[Suggestion], machine: Machine, *, dtype: str | None = None
) -> dict[str, Any]:
    """Every layout that fits, the best first. Bytes.

    Args:
        found: The layouts.
        machine: What they fit.
        dtype: What an import must round to, if the model is not to be as stored.
    """
    return {
        "machine": asdict(machine) | {"usable": machine.usable},
        "suggestions": [_suggestion(one, dtype) for one in found],
    }


def _suggestion(one: Suggestion, dtype: str | None) -> dict[str, Any]:
    layout = one.layout
    return {
        "layout": layout.name,
        "tensor_model_parallel_size": layout.tensor_model_parallel_size,
        "pipeline_model_parallel_size": layout.pipeline_model_parallel_size,
        "sequence_parallel": layout.sequence_parallel,
        "data_parallel_size": one.work.data_parallel_size,
        "num_layers_per_stage": list(layout.num_layers_per_stage),
        "ranks_per_replica": layout.world_size,
        "imbalance": one.imbalance,
        "fullest_pp_rank": one.fullest.pp_rank,
        "memory": memory_as_data(one.ranks, one.work),
        "megatron_flags": _megatron_flags(one),
        "import_flags": _import_flags(one, dtype),
    }


def _megatron_flags(one: Suggestion) -> list[str]:
    from bridge.megatron_args import layout_flags

    flags = layout_flags(one.layout) + _vocabulary_flags(one)
    if one.work.purpose == "training":
        flags += ["--seq-length", str(one.work.sequence_length)]
        flags += ["--micro-batch-size", str(one.work.micro_batch_size)]
        if one.work.distributed_optimizer:
            flags.append("--use-distributed-optimizer")
        if one.work.recompute == "full":
            flags += ["--recompute-granularity", "full", "--recompute-method", "uniform"]
            flags += ["--recompute-num-layers", "1"]
    return flags


def _import_flags(one: Suggestion, dtype: str | None) -> list[str]:
    layout = one.layout
    flags = ["--tp", str(layout.tensor_model_parallel_size)]
    flags += ["--pp", str(layout.pipeline_model_parallel_size), *_vocabulary_flags(one)]
    return flags if dtype is None else [*flags, "--dtype", dtype]


def _vocabulary_flags(one: Suggestion) -> list[str]:
    """The padding, unless it is what Megatron-LM and `import` do by themselves."""
    divisor = one.layout.make_vocab_size_divisible_by
    return [] if divisor == _DIVISOR else ["--make-vocab-size-divisible-by", str(divisor)]


def print_memory(found: Mapping[str, Any]) -> None:
    """One row per pipeline rank of what `memory_as_data` gives."""
    work, console = found["workload"], stdout()
    training = work["purpose"] == "training"
    unused = {"kv_cache"} if training else {"gradients", "optimizer"}
    parts = {part: name for part, name in _PARTS.items() if part not in unused}
    tokens = f"{work['micro_batch_size']} x {work['sequence_length']} tokens"
    notes = [f"{work['purpose']} of {tokens} in {work['params_dtype']}"]
    if training:
        shared = work["distributed_optimizer"] and work["data_parallel_size"] > 1
        among = f" shared by {work['data_parallel_size']} replicas" if shared else ""
        notes.append(f"Adam's state{among}")
        notes.append(f"recompute {work['recompute']}")
    console.print(f"\nmemory of each rank: {', '.join(notes)}; activations are an estimate")
    columns = ("pp rank", "parameters", *parts.values())
    rows = table(*columns, right=columns)
    for rank in found["pp_ranks"]:
        sizes = (gib(rank[part]) for part in parts)
        rows.add_row(str(rank["pp_rank"]), f"{rank['num_parameters']:,}", *sizes)
    console.print(rows)


def print_suggestions(model: str, found: Mapping[str, Any]) -> None:
    """The layouts that fit, why the first is the first, what its ranks hold, and its flags."""
    console, machine = stdout(), found["machine"]
    suggestions = found["suggestions"]
    best, usable = suggestions[0], machine["usable"]
    work = best["memory"]["workload"]
    console.print(
        f"{model}, {work['purpose']} on {machine['num_gpus']} GPUs of {gib(machine['memory'])}, "
        f"{machine['gpus_per_node']} to a node; a layout may fill {gib(usable)} of each, the rest "
        f"is for what the estimate leaves out\n"
    )
    columns = ("layout", "ranks/replica", "replicas", "imbalance", "fullest rank", "free")
    rows = table("", *columns, right=("", *columns[1:]))
    for place, one in enumerate(suggestions[:_SHOWN], start=1):
        total = _fullest(one)
        rows.add_row(
            str(place), one["layout"], str(one["ranks_per_replica"]),
            str(one["data_parallel_size"]), f"{one['imbalance']:.1%}", gib(total),
            gib(usable - total),
        )  # fmt: skip
    console.print(rows)
    if len(suggestions) > _SHOWN:
        console.print(f"and {len(suggestions) - _SHOWN} more that fit: --json has them all")
    console.print(f"\n{best['layout']} is first: {_why(best)}")
    print_memory(best["memory"])
    console.print(f"\nMegatron-LM:     {shlex.join(best['megatron_flags'])}")
    console.print(f"nemotron-bridge: import ... {shlex.join(best['import_flags'])}")
    console.print(f"                 verify ... --layouts {best['layout']}")


def _fullest(one: Mapping[str, Any]) -> int:
    return max(int(rank["total"]) for rank in one["memory"]["pp_ranks"])


def _why(best: Mapping[str, Any]) -> str:
    tp, pp = best["tensor_model_parallel_size"], best["pipeline_model_parallel_size"]
    ranks = best["ranks_per_replica"]
    reasons = [
        "it fits one rank per replica"
        if ranks == 1
        else f"no layout with fewer than {ranks} ranks per replica fits"
    ]
    if tp > 1:
        reasons.append(f"its {tp} TP ranks are within a node")
    if pp > 1:
        reasons.append(
            f"of as many ranks it has the fewest pipeline stages, {pp}, "
            f"the largest {best['imbalance']:.1%} above their mean"
        )
    elif ranks > 1:
        reasons.append("it needs no pipeline")
    return "; ".join(reasons)
