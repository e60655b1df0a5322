"""The real thing: a Megatron-Core GPTModel for a layout, each rank its own stages.

`bridge.live_parameters` fills it from a checkpoint, `bridge.forward` runs it.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch

from bridge.layer_specs import attention_environment, block_submodules
from bridge.megatron_config import AttentionBackend, Layers, choose_layers, transformer_config
from bridge.pipeline import refuse_broken_layout
from bridge.rotary import PositionedRotaryEmbedding, inv_freq
from bridge.spec import ModelSpec, ParallelLayout, Stage

if TYPE_CHECKING:
    from megatron.core.models.gpt import GPTModel


def build_model(
    spec: ModelSpec,
    layout: ParallelLayout,
    *,
    params_dtype: str,
    layers: Layers | Literal["auto"] = "auto",
    attention_backend: AttentionBackend = "auto",
    device: Literal["cpu", "cuda"] = "cpu",
    further: Mapping[str, object] | None = None,
    vp_stages: Sequence[int] | None = None,
) -> list[GPTModel]:
    """Build the calling rank's stages, weights uninitialised.

    `bridge.platform.initialize` must have run with the same layout.

    Args:
        spec: The model.
        layout: How it is cut.
        params_dtype: torch's name of the dtype to hold and compute in.
        layers: Megatron-Core's local layers, Transformer Engine's, or the latter where they are
            installed and there is a GPU.
        attention_backend: Of Transformer Engine's layers; a process has one.
        device: Where the weights go.
        further: As `transformer_config` takes it; `perform_initialization` draws random weights.
        vp_stages: The virtual stages wanted; None is all.

    Returns:
        One model part per virtual stage, in `eval` mode, `parallel_output` on. RoPE's frequencies
        are the spec's own, all four llama3 values honoured, float32 whatever `params_dtype` is.

    Raises:
        LayoutError: BR200 or BR201, the layout does not fit the model.
        EnvironmentMissingError: BR500, Transformer Engine is asked for and not there.
        UsageError: BR001, the process already has another attention backend.
    """
    from megatron.core import parallel_state

    layout.validate_for(spec)
    refuse_broken_layout(spec, layout)
    stages = layout.stages_of(parallel_state.get_pipeline_model_parallel_rank())
    if vp_stages is not None:
        stages = tuple(stages[vp_stage] for vp_stage in vp_stages)
    return _build_parts(
        spec, layout, stages,
        params_dtype=params_dtype, layers=layers, attention_backend=attention_backend,
        device=device, further=further,
    )  # fmt: skip


def build_block(
    spec: ModelSpec,
    *,
    params_dtype: str,
    layers: Layers | Literal["auto"] = "auto",
    attention_backend: AttentionBackend = "auto",
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
        attention_backend: As `build_model` takes it.
        device: As `build_model` takes it.
        pre_process: Put the embedding before it.
        post_process: Put the final norm and the output layer behind it.

    Returns:
        The model part, in `eval` mode, as `build_model` gives it. Without the embedding its input
        is what `set_input_tensor` was given, (seq, batch, hidden_size).

    Raises:
        EnvironmentMissingError: BR500, Transformer Engine is asked for and not there.
        UsageError: BR001, the process already has another attention backend.
    """
    layout = ParallelLayout(num_layers_per_stage=(spec.num_layers,), make_vocab_size_divisible_by=1)
    stage = Stage(
        pp_rank=0,
        vp_stage=0,
        layers=range(spec.num_layers),
        pre_process=pre_process,
        post_process=post_process,
    )
    (part,) = _build_parts(
        spec, layout, [stage],
        params_dtype=params_dtype, layers=layers, attention_backend=attention_backend,
        device=device,
    )  # fmt: skip
    return part


def _build_parts(
    spec: ModelSpec,
    layout: ParallelLayout,
    stages: Iterable[Stage],
    *,
    params_dtype: str,
    layers: Layers | Literal["auto"],
    attention_backend: AttentionBackend,
    device: Literal["cpu", "cuda"],
    further: Mapping[str, object] | None = None,
) -> list[GPTModel]:
    chosen = choose_layers(layers, device)
    config = transformer_config(
        spec, layout, params_dtype=params_dtype, layers=chosen,
        attention_backend=attention_backend, device=device, further=further,
    )  # fmt: skip
    with attention_environment(chosen, attention_backend):
        return [_build_part(spec, layout, config, stage, chosen) for stage in stages]


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
            block_submodules(spec, config, stage, vp_stage, layers),
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
