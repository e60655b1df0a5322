"""The real thing: a Megatron-Core GPTModel for a layout, filled straight from a checkpoint.

Each rank builds only its own stages and reads only its own slices. `forward` runs the result.
"""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Literal

import torch

from bridge.errors import EnvironmentMissingError, PlanError
from bridge.forward import forward
from bridge.loading import DEFAULT_LIMITS, fill, tiling_from_megatron, unwatched
from bridge.megatron_config import Layers, transformer_config
from bridge.parameters import (
    EMBEDDING_ROW,
    FINAL_NORM_ROW,
    OUTPUT_ROW,
    Parameter,
    hf_tensors,
    parameters,
)
from bridge.pipeline import refuse_broken_layout
from bridge.rotary import PositionedRotaryEmbedding, inv_freq
from bridge.spec import ModelSpec, ParallelLayout, Stage
from bridge.storage.source import TensorSource
from bridge.transfer import Advance, TransferLimits

if TYPE_CHECKING:
    from megatron.core.models.gpt import GPTModel

__all__ = [
    "LocalParameter",
    "build_block",
    "build_model",
    "forward",
    "load_hf",
    "load_megatron",
    "local_parameters",
]

_LAYER: Final = re.compile(r"decoder\.layers\.(\d+)\.(.+)")
_EMBEDDING: Final = EMBEDDING_ROW.name
_OUTPUT: Final = OUTPUT_ROW.name
_FINAL_NORM: Final = FINAL_NORM_ROW.name


class TokenwiseRMSNorm(torch.nn.RMSNorm):
    """RMSNorm for local layers under sequence parallelism.

    Megatron's own local norm refuses sequence parallelism, though a norm over the hidden size does
    not care which tokens a rank holds. Its weight's gradient does: each rank sees only its tokens,
    and the mark makes Megatron add the shares up, as it does for Transformer Engine's norm.
    """

    def __init__(self, config: Any, hidden_size: int, eps: float) -> None:  # noqa: ANN401, ARG002 - Megatron's call
        super().__init__(hidden_size, eps=eps)
        self.weight.sequence_parallel = True  # type: ignore[attr-defined]  # Megatron's mark


def build_model(
    spec: ModelSpec,
    layout: ParallelLayout,
    *,
    params_dtype: str,
    layers: Layers | Literal["auto"] = "auto",
    device: Literal["cpu", "cuda"] = "cpu",
) -> list[GPTModel]:
    """Build the calling rank's stages, weights uninitialised.

    `bridge.platform.initialize` must have run with the same layout.

    Args:
        spec: The model.
        layout: How it is cut.
        params_dtype: torch's name of the dtype to hold and compute in.
        layers: Megatron-Core's local layers, Transformer Engine's, or the latter where they are
            installed and there is a GPU.
        device: Where the weights go.

    Returns:
        One model part per virtual stage, in `eval` mode, `parallel_output` on. RoPE's frequencies
        are the spec's own, all four llama3 values honoured, float32 whatever `params_dtype` is.

    Raises:
        LayoutError: BR200 or BR201, the layout does not fit the model.
        EnvironmentMissingError: BR500, Transformer Engine is asked for and not there.
    """
    from megatron.core import parallel_state

    layout.validate_for(spec)
    refuse_broken_layout(spec, layout)
    chosen = _choose_layers(layers, device)
    config = transformer_config(
        spec, layout, params_dtype=params_dtype, layers=chosen, device=device
    )
    stages = layout.stages_of(parallel_state.get_pipeline_model_parallel_rank())
    return [_build_part(spec, layout, config, stage, chosen) for stage in stages]


def build_block(
    spec: ModelSpec,
    *,
    params_dtype: str,
    layers: Layers | Literal["auto"] = "auto",
    device: Literal["cpu", "cuda"] = "cpu",
    pre_process: bool = False,
    post_process: bool = False,
) -> GPTModel:
    """Build one block as the only one of its pipeline stage, weights uninitialised.

    `bridge.platform.initialize` must have run, without tensor or pipeline parallelism.

    Args:
        spec: A model of this one block. Its vocabulary is not padded.
        params_dtype: As `build_model` takes it.
        layers: As `build_model` takes it.
        device: As `build_model` takes it.
        pre_process: Put the embedding before it.
        post_process: Put the final norm and the output layer behind it.

    Returns:
        The model part, in `eval` mode, as `build_model` gives it. Without the embedding its input
        is what `set_input_tensor` was given, (seq, batch, hidden_size).

    Raises:
        EnvironmentMissingError: BR500, Transformer Engine is asked for and not there.
    """
    layout = ParallelLayout(num_layers_per_stage=(spec.num_layers,), make_vocab_size_divisible_by=1)
    stage = Stage(
        pp_rank=0,
        vp_stage=0,
        layers=range(spec.num_layers),
        pre_process=pre_process,
        post_process=post_process,
    )
    chosen = _choose_layers(layers, device)
    config = transformer_config(
        spec, layout, params_dtype=params_dtype, layers=chosen, device=device
    )
    return _build_part(spec, layout, config, stage, chosen)


def _build_part(
    spec: ModelSpec,
    layout: ParallelLayout,
    config: Any,  # noqa: ANN401 - TransformerConfig, which ships no types
    stage: Stage,
    layers: Layers,
) -> GPTModel:
    from megatron.core.models.gpt import GPTModel
    from megatron.core.process_groups_config import ProcessGroupCollection

    groups = ProcessGroupCollection.use_mpu_process_groups()
    # Both copies of a tied embedding are loaded; without the group the constructor leaves out
    # the all-reduce that would first make them equal, and which moves them to a GPU.
    groups.embd = None
    vp_stage = None if layout.virtual_pipeline_model_parallel_size is None else stage.vp_stage
    with _no_alarm_over_no_ops():
        part = GPTModel(
            config,
            _block_submodules(spec, config, stage, vp_stage, layers),
            vocab_size=spec.padded_vocab_size(
                layout.tensor_model_parallel_size,
                make_vocab_size_divisible_by=layout.make_vocab_size_divisible_by,
            ),
            max_sequence_length=spec.max_position_embeddings,
            pre_process=stage.pre_process,
            post_process=stage.post_process,
            parallel_output=True,
            share_embeddings_and_output_weights=spec.share_embeddings_and_output_weights,
            position_embedding_type="rope",
            rotary_base=spec.rope.rotary_base,
            pg_collection=groups,
            vp_stage=vp_stage,
        )
    on_cpu = config.use_cpu_initialization
    frequencies = inv_freq(spec.rope, spec.kv_channels)
    part.rotary_pos_emb = PositionedRotaryEmbedding(
        part.rotary_pos_emb, frequencies.to("cpu" if on_cpu else torch.cuda.current_device())
    )
    # Local norms are born float32 on the CPU; Megatron-LM's Float16Module casts them too.
    for parameter in part.parameters():
        parameter.data = parameter.data.to(
            dtype=config.params_dtype, device=part.rotary_pos_emb.inv_freq.device
        )
    found: GPTModel = part.eval()
    return found


@contextlib.contextmanager
def _no_alarm_over_no_ops() -> Iterator[None]:
    """Drop Megatron's warning about every feed-forward that is a no-op or a linear."""

    def is_news(record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith("Unknown MLP type")

    logger = logging.getLogger("megatron.core.transformer.transformer_layer")
    logger.addFilter(is_news)
    try:
        yield
    finally:
        logger.removeFilter(is_news)


def _choose_layers(layers: Layers | Literal["auto"], device: str) -> Layers:
    installed = importlib.util.find_spec("transformer_engine") is not None
    if layers == "te" and not (installed and device == "cuda"):
        raise EnvironmentMissingError(
            "Transformer Engine layers need the transformer-engine package and a GPU",
            hint="use local layers, or install nemotron-bridge[te] on a machine with a GPU",
        )
    if layers == "auto":
        return "te" if installed and device == "cuda" else "local"
    return layers


def _block_submodules(
    spec: ModelSpec,
    config: Any,  # noqa: ANN401 - TransformerConfig, which ships no types
    stage: Stage,
    vp_stage: int | None,
    layers: Layers,
) -> Any:  # noqa: ANN401 - TransformerBlockSubmodules, which ships no types
    from megatron.core.models.gpt import gpt_layer_specs
    from megatron.core.models.gpt.heterogeneous.heterogeneous_layer_specs import (
        get_gpt_heterogeneous_layer_spec,
    )
    from megatron.core.transformer.torch_norm import WrappedTorchNorm
    from megatron.core.transformer.transformer_block import TransformerBlockSubmodules

    if spec.heterogeneous_block_specs:
        submodules = get_gpt_heterogeneous_layer_spec(
            config, use_te=layers == "te", vp_stage=vp_stage, pp_rank=stage.pp_rank
        )
    elif layers == "te":
        from megatron.core.extensions.transformer_engine import TENorm

        layer = gpt_layer_specs.get_gpt_layer_with_transformer_engine_spec()
        submodules = TransformerBlockSubmodules([layer] * len(stage.layers), layer_norm=TENorm)
    else:
        layer = gpt_layer_specs.get_gpt_layer_local_spec(normalization="RMSNorm")
        # Named here, for Megatron would take Transformer Engine's wherever that is installed.
        submodules = TransformerBlockSubmodules(
            [layer] * len(stage.layers), layer_norm=WrappedTorchNorm
        )
    if config.sequence_parallel and layers == "local":
        submodules.layer_norm = TokenwiseRMSNorm
        for layer in submodules.layer_specs:
            for place in ("input_layernorm", "pre_mlp_layernorm"):
                if getattr(layer.submodules, place) is WrappedTorchNorm:
                    setattr(layer.submodules, place, TokenwiseRMSNorm)
    return submodules


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
    pairs = _matched(model_parts, spec, layout)
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
    for one, parameter in _matched(model_parts, spec, layout):
        whole, shapes[one.name] = tiling_from_megatron(parameter, spec, source)
        boxes = parameter.shard_boxes(tp_rank, tp)
        wanted.append((one.name, one.tensor, whole.restrict(boxes, axis=parameter.tp_axis or 0)))
    fill(wanted, source, shapes, limits=limits, advance=advance)


def _tp(layout: ParallelLayout) -> tuple[int, int]:
    from megatron.core import parallel_state

    rank: int = parallel_state.get_tensor_model_parallel_rank()
    return rank, layout.tensor_model_parallel_size


def _matched(
    model_parts: Sequence[GPTModel], spec: ModelSpec, layout: ParallelLayout
) -> list[tuple[LocalParameter, Parameter]]:
    """Pair live parameters with the table, one to one, shapes included, or say what is odd."""
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
