"""How a live Megatron model is cut, read off the model itself.

Whoever built it: the parts may come from `bridge.model`, from Megatron-LM or from a training loop,
bare or inside the wrappers of mixed precision and data parallelism.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final

import torch

from bridge.errors import LayoutError
from bridge.spec import ModelSpec, ParallelLayout

if TYPE_CHECKING:
    from megatron.core.models.gpt import GPTModel

_DIVISORS: Final = (128, 64, 32, 16, 8, 4, 2, 1)


def bare_parts(model: Any) -> list[GPTModel]:  # noqa: ANN401 - one module or several, wrapped or not
    """This rank's model parts without `Float16Module`, `DistributedDataParallel` and the like."""
    found = []
    for part in model if isinstance(model, Sequence | torch.nn.ModuleList) else [model]:
        inner: Any = part
        while hasattr(inner, "module"):
            inner = inner.module
        found.append(inner)
    return found


def layout_of(model_parts: Sequence[GPTModel], spec: ModelSpec) -> ParallelLayout:
    """The layout of a live model. All ranks of its pipeline make this call.

    Args:
        model_parts: This rank's, bare.
        spec: The model it is meant to be.

    Raises:
        LayoutError: BR200, Megatron-Core's groups are not formed, or the parts are of another model
            or use parallelism that the bridge does not know.
    """
    from megatron.core import parallel_state

    refuse_no_groups()
    refuse_other_parallelism()
    pp = parallel_state.get_pipeline_model_parallel_world_size()
    told: list[list[int] | str] = [[] for _ in range(pp)]
    group = parallel_state.get_pipeline_model_parallel_group()
    torch.distributed.all_gather_object(told, _num_layers(model_parts), group=group)
    odd = [f"pipeline rank {rank}: {one}" for rank, one in enumerate(told) if isinstance(one, str)]
    if odd:
        raise LayoutError(
            "these are no parts of a GPTModel", where=odd, hint="give what the provider built"
        )
    counts = [one for one in told if not isinstance(one, str)]
    mine = counts[parallel_state.get_pipeline_model_parallel_rank()]
    if len({len(stages) for stages in counts}) != 1 or not mine:
        raise LayoutError(
            "pipeline ranks hold different numbers of model parts",
            where=[f"pipeline rank {rank}: {len(stages)}" for rank, stages in enumerate(counts)],
        )
    tp = parallel_state.get_tensor_model_parallel_world_size()
    layout = ParallelLayout(
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        virtual_pipeline_model_parallel_size=len(mine) if len(mine) > 1 else None,
        num_layers_per_stage=tuple(
            counts[pp_rank][vp_stage] for vp_stage in range(len(mine)) for pp_rank in range(pp)
        ),
        sequence_parallel=model_parts[0].config.sequence_parallel,
        make_vocab_size_divisible_by=_divisor(spec, tp, model_parts[0].vocab_size),
    )
    layout.validate_for(spec)
    return layout


def _num_layers(model_parts: Sequence[GPTModel]) -> list[int] | str:
    """Of each part; of anything else its type, for the other ranks are about to wait for this."""
    try:
        return [len(part.decoder.layers) for part in model_parts]
    except AttributeError:
        return ", ".join(type(part).__name__ for part in model_parts)


def refuse_no_groups() -> None:
    """Raise LayoutError BR200 where Megatron-Core's groups are not formed in this process."""
    from megatron.core import parallel_state

    if not parallel_state.is_initialized():
        raise LayoutError(
            "Megatron-Core's parallel groups are not formed in this process",
            hint="a live model exists while they do; call initialize_model_parallel first",
        )


def refuse_other_parallelism() -> None:
    """Raise LayoutError BR200 where this process's groups cut a model in ways unknown here."""
    from megatron.core import parallel_state

    found = {
        "context_parallel_size": parallel_state.get_context_parallel_world_size(),
        "expert_model_parallel_size": parallel_state.get_expert_model_parallel_world_size(),
    }
    odd = [f"{name}={size}" for name, size in found.items() if size > 1]
    if odd:
        raise LayoutError(
            "Megatron-Core's groups are formed for parallelism that the bridge does not know",
            where=odd,
            hint="form them with tensor, pipeline and data parallelism only",
        )


def _divisor(spec: ModelSpec, tp: int, rows: int) -> int:
    """A divisor that pads this model's vocabulary to these rows, Megatron's usual ones first."""
    for divisor in _DIVISORS:
        if spec.padded_vocab_size(tp, make_vocab_size_divisible_by=divisor) == rows:
            return divisor
    return max(1, rows // tp)
