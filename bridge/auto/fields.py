"""What a provider's attributes may be set to: everything has a fate, as in a configuration.

honoured   a setting of this bridge: sizes, dtype, stages (the provider's own fields)
handed on  Megatron-Core's, about how it computes and not what; it gets them as they are
fixed      the model's, or of one value here; another is refused by name
other      Megatron-Core's, not handed on: its default is fine, anything else is refused
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final, get_args

import torch

from bridge.dtypes import dtype_named
from bridge.errors import UsageError
from bridge.hf_fields import same_value
from bridge.megatron_config import (
    AttentionBackend,
    Layers,
    heterogeneous_layers_json,
    model_wide_sizes,
)
from bridge.spec import ModelSpec

HANDED_ON: Final = frozenset({
    "async_tensor_model_parallel_allreduce",
    "attention_dropout",
    "attention_softmax_in_fp32",
    "autocast_dtype",
    "barrier_with_L1_time",
    "batch_p2p_comm",
    "batch_p2p_sync",
    "bias_activation_fusion",
    "bias_dropout_fusion",
    "calculate_per_token_loss",
    "cross_entropy_fusion_impl",
    "cross_entropy_loss_fusion",
    "deallocate_pipeline_outputs",
    "defer_embedding_wgrad_compute",
    "deterministic_mode",
    "distribute_saved_activations",
    "enable_autocast",
    "finalize_model_grads_func",
    "grad_scale_func",
    "grad_sync_func",
    "gradient_accumulation_fusion",
    "hidden_dropout",
    "init_method_std",
    "microbatch_group_size_per_vp_stage",
    "no_sync_func",
    "num_microbatches_with_partial_activation_checkpoints",
    "overlap_p2p_comm",
    "overlap_p2p_comm_warmup_flush",
    "param_sync_func",
    "perform_initialization",
    "persist_layer_norm",
    "recompute_granularity",
    "recompute_method",
    "recompute_modules",
    "recompute_num_layers",
    "timers",
    "tp_comm_overlap",
    "variable_seq_lengths",
    "wgrad_deferral_limit",
})  # fmt: skip

# The first value is what a provider says when it is asked.
_FIXED: Final[Mapping[str, tuple[object, ...]]] = {
    "account_for_embedding_in_pipeline_split": (False,),
    "account_for_loss_in_pipeline_split": (False,),
    "add_bias_linear": (False,),
    "add_qkv_bias": (False,),
    "context_parallel_size": (1, None),
    "expert_model_parallel_size": (1, None),
    "expert_tensor_parallel_size": (1, None),
    "fp16_lm_cross_entropy": (False,),
    "gated_linear_unit": (True,),
    "init_model_with_meta_device": (False, None),
    "mtp_enabled": (False,),
    "normalization": ("RMSNorm",),
    "parallel_output": (True,),
    "pipeline_model_parallel_layout": (None,),
    "position_embedding_type": ("rope",),
    "restore_modelopt_state": (False,),
    "rotary_percent": (1.0,),
    "scatter_embedding_sequence_parallel": (True,),
    "seq_len_interpolation_factor": (None,),
    "transformer_layer_spec": (None,),
    "use_arbitrary_attention_mask": (None,),
    "use_transformer_engine_full_layer_spec": (False,),
    "use_transformer_engine_op_fuser": (False,),
}

_HINTS: Final = {
    "pipeline_model_parallel_layout": "set num_layers_per_stage, the layers of each stage",
    "transformer_layer_spec": "set layers to 'local' or 'te'",
}


def facts_of(spec: ModelSpec) -> dict[str, object]:
    """What a model is, in the names that Megatron-Bridge's provider has for it."""
    scaling = spec.rope.scaling
    return {
        "num_layers": spec.num_layers,
        "hidden_size": spec.hidden_size,
        "num_attention_heads": spec.num_attention_heads,
        "kv_channels": spec.kv_channels,
        **model_wide_sizes(spec),
        "vocab_size": spec.vocab_size,
        "layernorm_epsilon": spec.layernorm_epsilon,
        "rotary_base": spec.rope.rotary_base,
        "rope_scaling": scaling is not None,
        "rope_scaling_factor": 1.0 if scaling is None else scaling.factor,
        "share_embeddings_and_output_weights": spec.share_embeddings_and_output_weights,
        "heterogeneous_block_specs": spec.heterogeneous_block_specs,
        "heterogeneous_layers_config_encoded_json": (
            heterogeneous_layers_json(spec) if spec.heterogeneous_block_specs else ""
        ),
    }


def value_of(name: str, spec: ModelSpec) -> Any:
    """What an attribute that is not the provider's own reads as.

    Raises:
        AttributeError: There is none of that name.
    """
    facts = facts_of(spec)
    if name in facts:
        return facts[name]
    if name in _FIXED:
        return _FIXED[name][0]
    defaults = _megatron_defaults()
    if name in defaults:
        return defaults[name]
    raise AttributeError(f"the provider has no attribute {name!r}")


def check_fixed(name: str, value: object, spec: ModelSpec, honoured: Iterable[str]) -> None:
    """Let an attribute be set to what it is anyway.

    Raises:
        UsageError: BR001, to anything else, or no such attribute.
    """
    facts = facts_of(spec)
    if name in facts:
        _refuse_unless(
            name, value, (facts[name],), f"the model has {name}={_short(facts[name])}",
            "a provider builds the model of its configuration: change the config.json instead",
        )  # fmt: skip
    elif name in _FIXED:
        _refuse_unless(name, value, _FIXED[name], "the bridge does not know it", _HINTS.get(name))
    elif name in (defaults := _megatron_defaults()):
        _refuse_unless(
            name, value, (defaults[name],), "the bridge does not hand it to Megatron-Core", None
        )
    else:
        known = [*honoured, *HANDED_ON, *_FIXED, *facts]
        close = difflib.get_close_matches(name, known, n=3)
        raise UsageError(
            f"the provider has no attribute {name!r}, and setting it would do nothing",
            where=f"provider.{name}",
            hint=f"did you mean {', '.join(close)}?" if close else "docs/migration.md lists them",
        )


def _refuse_unless(
    name: str, value: object, allowed: tuple[object, ...], why: str, hint: str | None
) -> None:
    if any(same_value(value, one) for one in allowed):
        return
    fine = " or ".join(map(_short, allowed))
    raise UsageError(
        f"{name}={_short(value)} is refused: {why}",
        where=f"provider.{name}",
        hint=hint or f"leave it at {fine}",
    )


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


def _megatron_defaults() -> dict[str, object]:
    """Megatron-Core's own configuration, field by field."""
    from megatron.core.transformer import TransformerConfig

    found: dict[str, object] = {}
    for field in dataclasses.fields(TransformerConfig):
        if field.default is not dataclasses.MISSING:
            found[field.name] = field.default
        elif field.default_factory is not dataclasses.MISSING:
            found[field.name] = field.default_factory()
    return found


_CHOICES: Final = {
    "layers": ("auto", *get_args(Layers)),
    "attention_backend": get_args(AttentionBackend),
}
_COUNTS: Final = {
    "tensor_model_parallel_size": False,
    "pipeline_model_parallel_size": False,
    "make_vocab_size_divisible_by": False,
    "seq_length": False,
    "virtual_pipeline_model_parallel_size": True,
    "num_layers_in_first_pipeline_stage": True,
    "num_layers_in_last_pipeline_stage": True,
}
"""Whether None is one of their values."""


def check_settings(provider: Any) -> None:
    """Refuse settings of a provider that are of no use to any model.

    Raises:
        UsageError: BR001, naming all of them.
    """
    wrong = []
    for name, choices in _CHOICES.items():
        value = getattr(provider, name)
        if value not in choices:
            wrong.append(f"{name}={value!r}: one of {', '.join(choices)}")
    for name, optional in _COUNTS.items():
        value = getattr(provider, name)
        if value is None and optional:
            continue
        if not isinstance(value, int) or isinstance(value, bool):
            wrong.append(f"{name}={value!r}: an integer{' or None' if optional else ''}")
        elif value < (0 if name.startswith("num_layers") else 1):
            wrong.append(f"{name}={value!r}: a positive integer")
    stages = provider.num_layers_per_stage
    if stages is not None and (
        isinstance(stages, str)
        or not isinstance(stages, Sequence)
        or not all(isinstance(one, int) and not isinstance(one, bool) for one in stages)
    ):
        wrong.append(f"num_layers_per_stage={stages!r}: a list of integers or None")
    dtype = provider.params_dtype
    if not isinstance(dtype, torch.dtype) or not dtype_named(str(dtype)).is_floating:
        wrong.append(f"params_dtype={dtype!r}: a floating-point dtype of torch")
    if wrong:
        raise UsageError(
            "the provider has settings that no model can be built with",
            where=wrong,
            hint="set what is named, or leave it at its default",
        )
