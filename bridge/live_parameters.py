"""What a rank holds of a live Megatron model: its parameters by name, filled from a checkpoint.

Each rank reads only its own slices.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import torch

from bridge.errors import PlanError
from bridge.loading import DEFAULT_LIMITS, fill, tiling_from_megatron, unwatched
from bridge.parameters import (
    EMBEDDING_ROW,
    FINAL_NORM_ROW,
    OUTPUT_ROW,
    Parameter,
    hf_tensors,
    parameters,
)
from bridge.progress import Advance
from bridge.spec import ModelSpec, ParallelLayout, Stage
from bridge.storage.source import TensorSource
from bridge.transfer import TransferLimits

if TYPE_CHECKING:
    from megatron.core.models.gpt import GPTModel

_LAYER: Final = re.compile(r"decoder\.layers\.(\d+)\.(.+)")
_EMBEDDING: Final = EMBEDDING_ROW.name
_OUTPUT: Final = OUTPUT_ROW.name
_FINAL_NORM: Final = FINAL_NORM_ROW.name


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalParameter:
    """One parameter of a live model part on this rank.

    Args:
        name: In the checkpoint, with the layer's index over the whole model. The copy of a tied
            embedding on the last stage has the embedding's name.
        live_name: In the model part.
        tensor: This rank's shard.
        stage: The model part.
    """

    name: str
    live_name: str
    tensor: torch.nn.Parameter
    stage: Stage


def local_parameters(
    model_parts: Sequence[GPTModel], layout: ParallelLayout
) -> Iterator[LocalParameter]:
    """Every parameter this rank holds, under its name in the checkpoint.

    Names come from Megatron's own `sharded_state_dict_keys_map` and layer numbers, not from our
    table, so that each checks the other.
    """
    from megatron.core import parallel_state

    stages = layout.stages_of(parallel_state.get_pipeline_model_parallel_rank())
    for stage, part in zip(stages, model_parts, strict=True):
        for live_name, tensor in part.named_parameters():
            yield LocalParameter(
                name=_checkpoint_name(part, live_name),
                live_name=live_name,
                tensor=tensor,
                stage=stage,
            )


def _checkpoint_name(part: Any, live_name: str) -> str:  # noqa: ANN401 - GPTModel, which ships no types
    if live_name == _OUTPUT and part.share_embeddings_and_output_weights:
        return _EMBEDDING
    match = _LAYER.fullmatch(live_name)
    if match is None:
        return live_name
    layer, name = part.decoder.layers[int(match[1])], match[2]
    for old, new in layer.submodules_config.sharded_state_dict_keys_map.items():
        if name.startswith(old):
            name = new + name.removeprefix(old)
            break
    return f"decoder.layers.{layer.layer_number - 1}.{name}"


def load_hf(
    model_parts: Sequence[GPTModel],
    spec: ModelSpec,
    layout: ParallelLayout,
    source: TensorSource,
    *,
    limits: TransferLimits = DEFAULT_LIMITS,
    advance: Advance = unwatched,
) -> None:
    """Fill this rank's parameters in place from Hugging Face tensors, reading only its slices.

    Each byte is read once, by several threads, and on a GPU while others are being copied there.
    Bit-exact unless the model's dtype differs from the file's; then each element is rounded once.

    Args:
        model_parts: This rank's, as `build_model` gives them.
        spec: The model.
        layout: How it is cut.
        source: The checkpoint.
        limits: Threads that read on this rank, and memory for what is not in its place yet.
        advance: Progress in bytes read; called from several threads.

    Raises:
        PlanError: BR400, live parameters and the table are not the same: nothing has been read.
        AccountingError: BR301, tensors missing or of another shape: nothing has been read.
        DtypeMismatchError: BR303, the source holds something other than floating-point numbers.
        CorruptFileError: BR302, a file ends early: the parameters are filled in part.
    """
    tp_rank, tp = _tp(layout)
    pairs = matched(model_parts, spec, layout)
    fill(
        [(one.name, one.tensor, parameter.shard(tp_rank, tp)) for one, parameter in pairs],
        source,
        hf_tensors(spec),
        limits=limits,
        advance=advance,
    )


def load_megatron(
    model_parts: Sequence[GPTModel],
    spec: ModelSpec,
    layout: ParallelLayout,
    source: TensorSource,
    *,
    limits: TransferLimits = DEFAULT_LIMITS,
    advance: Advance = unwatched,
) -> None:
    """Fill this rank's parameters from a Megatron checkpoint, whole tensors under canonical names.

    A vocabulary that was padded for another TP is padded anew; otherwise every row is taken.
    Arguments, exactness and errors are those of `load_hf`.
    """
    tp_rank, tp = _tp(layout)
    wanted, shapes = [], {}
    for one, parameter in matched(model_parts, spec, layout):
        whole, shapes[one.name] = tiling_from_megatron(parameter, spec, source)
        boxes = parameter.shard_boxes(tp_rank, tp)
        wanted.append((one.name, one.tensor, whole.restrict(boxes, axis=parameter.tp_axis or 0)))
    fill(wanted, source, shapes, limits=limits, advance=advance)


def _tp(layout: ParallelLayout) -> tuple[int, int]:
    from megatron.core import parallel_state

    rank: int = parallel_state.get_tensor_model_parallel_rank()
    return rank, layout.tensor_model_parallel_size


def matched(
    model_parts: Sequence[GPTModel], spec: ModelSpec, layout: ParallelLayout
) -> list[tuple[LocalParameter, Parameter]]:
    """Pair live parameters with the table, one to one, shapes included, or say what is odd.

    Raises:
        PlanError: BR400, the live model and the table are not the same.
    """
    from megatron.core import parallel_state

    table = parameters(
        spec,
        padded_vocab_size=spec.padded_vocab_size(
            layout.tensor_model_parallel_size,
            make_vocab_size_divisible_by=layout.make_vocab_size_divisible_by,
        ),
    )
    pp_rank = parallel_state.get_pipeline_model_parallel_rank()
    tp_rank, tp = _tp(layout)
    live = list(local_parameters(model_parts, layout))
    wanted = Counter(
        (stage.vp_stage, name)
        for stage in layout.stages_of(pp_rank)
        for name in _names_of(stage, table, spec)
    )
    found = Counter((one.stage.vp_stage, one.name) for one in live)
    odd = [f"{name}: no live parameter (vp_stage {vp})" for vp, name in wanted - found]
    odd += [f"{name}: a live parameter too many (vp_stage {vp})" for vp, name in found - wanted]
    pairs = [(one, table[one.name]) for one in live if one.name in table]
    for one, parameter in pairs:
        expected = parameter.shard(tp_rank, tp).shape
        if tuple(one.tensor.shape) != expected:
            odd.append(f"{one.name}: live shape {tuple(one.tensor.shape)}, the table's {expected}")
    if odd:
        raise PlanError(
            f"{len(odd)} differences between the live model and the parameter table", where=odd
        )
    return pairs


def _names_of(stage: Stage, table: Mapping[str, Parameter], spec: ModelSpec) -> list[str]:
    names = [name for name, one in table.items() if one.layer_idx in stage.layers]
    if stage.pre_process:
        names.append(_EMBEDDING)
    if stage.post_process:
        names.append(_FINAL_NORM)
        if not spec.share_embeddings_and_output_weights:
            names.append(_OUTPUT)
        elif not stage.pre_process:
            names.append(_EMBEDDING)
    return names
