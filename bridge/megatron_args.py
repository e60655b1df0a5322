"""The `args` Megatron-LM keeps in a checkpoint's `common.pt`, and the flags they do not replace.

`--use-checkpoint-args` rebuilds the model from them. They are also all that says what a checkpoint
from a training run is, so the way back reads every value it needs from them or asks for it by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from bridge.dtypes import dtype_named
from bridge.errors import BridgeError, InconsistentConfigError, UnsupportedFieldError
from bridge.hf_fields import FieldReader, Findings, is_number, same_value
from bridge.megatron_config import (
    blocks_from_heterogeneous_json,
    heterogeneous_layers_json,
    model_wide_sizes,
    pipeline_model_parallel_layout,
)
from bridge.spec import (
    MAX_LAYERS,
    BlockSpec,
    GroupedQueryAttention,
    Llama3Scaling,
    ModelSpec,
    ParallelLayout,
    RopeSpec,
    SwiGLU,
)

_WHERE: Final = "common.pt: args"

# What Megatron computes with when --use-rope-scaling is given: only the factor is a flag.
# Source: megatron-core 0.16.1 RotaryEmbedding._apply_scaling.
_LOW_FREQ_FACTOR: Final = 1.0
_HIGH_FREQ_FACTOR: Final = 4.0
_ORIGINAL_MAX_POSITION_EMBEDDINGS: Final = 8192

# Args that define the architecture and have one value in this family. All but the first group may
# be absent, which is Megatron's own default.
_REQUIRED: Final[Mapping[str, object]] = {
    "swiglu": True,
    "normalization": "RMSNorm",
    "add_bias_linear": False,
    "position_embedding_type": "rope",
}
_FIXED: Final[Mapping[str, tuple[object, ...]]] = {
    "rotary_percent": (1.0,),
    "rotary_interleaved": (False,),
    "rotary_seq_len_interpolation_factor": (None, 1, 1.0),
    "no_rope_freq": (None,),
    "add_qkv_bias": (False,),
    "qk_layernorm": (False,),
    "qk_l2_norm": (False,),
    "attention_output_gate": (None, False),
    "multi_latent_attention": (False,),
    "experimental_attention_variant": (None,),
    "linear_attention_freq": (None,),
    "window_size": (None,),
    "softmax_type": (None, "vanilla"),
    "apply_layernorm_1p": (False,),
    "apply_residual_connection_post_layernorm": (False,),
    "squared_relu": (False,),
    "quick_geglu": (False,),
    "glu_linear_offset": (None, 0.0),
    "activation_func_clamp_value": (None,),
    "num_experts": (None,),
    "mtp_num_layers": (None, 0),
    "is_hybrid_model": (None, False),
    "hybrid_override_pattern": (None,),
}


def checkpoint_args(spec: ModelSpec, layout: ParallelLayout) -> dict[str, Any]:
    """The `args` of `common.pt` for a checkpoint of this model.

    Args:
        spec: The model.
        layout: Only its vocabulary padding matters: a checkpoint is written whole and may be loaded
            at any parallel size that divides `padded_vocab_size`.

    Returns:
        Plain values and one `Dtype`, which is stored as torch's own: `weights_only` loading allows
        them. All four values of llama3 RoPE scaling are there, three of them under names of our own
        that Megatron-LM ignores, so that an export restores them.
    """
    scaling = spec.rope.scaling
    base = spec.rope.rotary_base
    args: dict[str, Any] = {
        "num_layers": spec.num_layers,
        "hidden_size": spec.hidden_size,
        "num_attention_heads": spec.num_attention_heads,
        "group_query_attention": True,
        "kv_channels": spec.kv_channels,
        **model_wide_sizes(spec),
        "max_position_embeddings": spec.max_position_embeddings,
        "position_embedding_type": "rope",
        # Megatron-LM's default, which it compares with the run's own; with RoPE nothing is added.
        "add_position_embedding": True,
        # --rotary-base is an integer flag.
        "rotary_base": int(base) if float(base).is_integer() else base,
        "rotary_percent": 1.0,
        "rotary_interleaved": False,
        "use_rope_scaling": scaling is not None,
        "swiglu": True,
        "normalization": "RMSNorm",
        "norm_epsilon": spec.layernorm_epsilon,
        "apply_layernorm_1p": False,
        "add_bias_linear": False,
        "add_qkv_bias": False,
        "qk_layernorm": False,
        "squared_relu": False,
        "num_experts": None,
        "multi_latent_attention": False,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "untie_embeddings_and_output_weights": not spec.share_embeddings_and_output_weights,
        "vocab_size": spec.vocab_size,
        "padded_vocab_size": spec.padded_vocab_size(
            layout.tensor_model_parallel_size,
            make_vocab_size_divisible_by=layout.make_vocab_size_divisible_by,
        ),
        "make_vocab_size_divisible_by": layout.make_vocab_size_divisible_by,
        "params_dtype": dtype_named(spec.params_dtype),
        "bf16": spec.params_dtype == "bfloat16",
        "fp16": spec.params_dtype == "float16",
        "tensor_model_parallel_size": 1,
        "pipeline_model_parallel_size": 1,
        "virtual_pipeline_model_parallel_size": None,
        "context_parallel_size": 1,
        "expert_model_parallel_size": 1,
        "sequence_parallel": False,
        "ckpt_format": "torch_dist",
        "no_save_optim": True,
        "no_save_rng": True,
    }
    if scaling is not None:
        args |= {
            "rope_scaling_factor": scaling.factor,
            "rope_scaling_low_freq_factor": scaling.low_freq_factor,
            "rope_scaling_high_freq_factor": scaling.high_freq_factor,
            "rope_scaling_original_max_position_embeddings": (
                scaling.original_max_position_embeddings
            ),
        }
    if spec.heterogeneous_block_specs:
        # A path of None would make Megatron-LM build a homogeneous model; "" will do.
        args["heterogeneous_layers_config_path"] = ""
        args["heterogeneous_layers_config_encoded_json"] = heterogeneous_layers_json(spec)
    return args


def spec_from_checkpoint_args(
    args: Mapping[str, Any],
    *,
    vocab_size: int | None = None,
    rope: RopeSpec | None = None,
    where: str = _WHERE,
) -> ModelSpec:
    """Say which model a checkpoint's args describe, or refuse it.

    Args:
        args: `vars()` of the Namespace in `common.pt`, ours or a training run's.
        vocab_size: Entries of the vocabulary. Overrides the args; needed when they hold only the
            padded size, as most training runs' do.
        rope: Overrides the args; needed when they do not say whether RoPE is scaled.
        where: What to call the args in errors.

    Raises:
        UnsupportedFieldError: BR103, another architecture; all offending args in one error.
        InconsistentConfigError: BR104, missing or contradictory args.
    """
    findings = Findings()
    reader = FieldReader(args, findings)
    for name, wanted in _REQUIRED.items():
        if name not in args:
            findings.inconsistent.append(f"{name} is missing")
        elif not same_value(args[name], wanted):
            findings.unsupported.append(f"{name}={args[name]!r}")
    for name, allowed in _FIXED.items():
        if name in args and not any(same_value(args[name], one) for one in allowed):
            findings.unsupported.append(f"{name}={args[name]!r}")
    hidden, heads = reader.count("hidden_size"), reader.count("num_attention_heads")
    num_layers = reader.count("num_layers")
    if num_layers > MAX_LAYERS:  # before there is a tuple of so many
        findings.inconsistent.append(f"num_layers={num_layers} is beyond any model")
    kv_channels = reader.count("kv_channels")
    max_position_embeddings = reader.count("max_position_embeddings")
    layernorm_epsilon = reader.number("norm_epsilon")
    vocab = _vocab_size(args, vocab_size, reader)
    found_rope = rope if rope is not None else _rope(args, reader)
    dtype = _params_dtype(args, findings)
    if "untie_embeddings_and_output_weights" not in args:
        findings.inconsistent.append("untie_embeddings_and_output_weights is missing")
    untied = reader.flag("untie_embeddings_and_output_weights")
    encoded = args.get("heterogeneous_layers_config_encoded_json")
    width = groups = 1
    if not encoded:
        width = reader.count("ffn_hidden_size")
        grouped = reader.flag("group_query_attention")
        groups = reader.count("num_query_groups") if grouped else heads
    findings.raise_if_any(where)
    block = BlockSpec(
        attention=GroupedQueryAttention(num_query_groups=groups), ffn=SwiGLU(ffn_hidden_size=width)
    )
    return ModelSpec(
        hidden_size=hidden,
        num_attention_heads=heads,
        kv_channels=kv_channels,
        vocab_size=vocab,
        max_position_embeddings=max_position_embeddings,
        layernorm_epsilon=layernorm_epsilon,
        rope=found_rope,
        share_embeddings_and_output_weights=not untied,
        params_dtype=dtype,
        blocks=blocks_from_heterogeneous_json(
            str(encoded),
            hidden_size=hidden,
            num_attention_heads=heads,
            num_layers=num_layers,
            where=f"{where}: heterogeneous_layers_config_encoded_json",
        )
        if encoded
        else (block,) * num_layers,
        heterogeneous_block_specs=bool(encoded),
    )


def _vocab_size(args: Mapping[str, Any], vocab_size: int | None, reader: FieldReader) -> int:
    padded = reader.count("padded_vocab_size")
    if vocab_size is None and args.get("vocab_size") is None:
        reader.findings.inconsistent.append(
            f"vocab_size is missing (only the padded {padded} is known): pass vocab_size"
        )
        return padded
    found = reader.count("vocab_size") if vocab_size is None else vocab_size
    if not 0 < found <= padded:
        reader.findings.inconsistent.append(f"vocab_size={found} with padded_vocab_size={padded}")
    return found


def _rope(args: Mapping[str, Any], reader: FieldReader) -> RopeSpec:
    base = reader.number("rotary_base")
    scaled = args.get("use_rope_scaling")
    if not isinstance(scaled, bool):
        reader.findings.inconsistent.append(
            "use_rope_scaling is missing: pass rope, scaled or not, as the model was trained"
        )
        return RopeSpec(rotary_base=base)
    if not scaled:
        return RopeSpec(rotary_base=base)
    original = args.get(
        "rope_scaling_original_max_position_embeddings", _ORIGINAL_MAX_POSITION_EMBEDDINGS
    )
    values = {
        "factor": args.get("rope_scaling_factor"),
        "low_freq_factor": args.get("rope_scaling_low_freq_factor", _LOW_FREQ_FACTOR),
        "high_freq_factor": args.get("rope_scaling_high_freq_factor", _HIGH_FREQ_FACTOR),
    }
    bad = [name for name, value in values.items() if not is_number(value)]
    if bad or not is_number(original):
        reader.findings.inconsistent.append(
            f"use_rope_scaling without a number for {', '.join(bad) or 'the original length'}"
        )
        return RopeSpec(rotary_base=base)
    try:
        scaling = Llama3Scaling(
            **{name: float(value) for name, value in values.items()},
            original_max_position_embeddings=int(original),
        )
    except InconsistentConfigError as error:
        reader.findings.inconsistent.append(error.message)
        return RopeSpec(rotary_base=base)
    return RopeSpec(rotary_base=base, scaling=scaling)


def _params_dtype(args: Mapping[str, Any], findings: Findings) -> str:
    if args.get("params_dtype") is None:
        findings.inconsistent.append("params_dtype is missing")
        return "float32"
    try:
        return dtype_named(str(args["params_dtype"])).name
    except BridgeError as error:
        findings.unsupported.append(error.message)
        return "float32"


def megatron_lm_flags(spec: ModelSpec, layout: ParallelLayout | None = None) -> list[str]:
    """What a Megatron-LM command needs beside `--load DIR --use-checkpoint-args`.

    Megatron-LM restores the dimensions from the checkpoint, but not the RoPE scaling, the norm's
    epsilon or the precision: without these flags it runs another model and says nothing. Of
    llama3's four values it takes only the factor; low 1, high 4 and 8192 are built in, so a model
    with others runs in `bridge.model` and cannot run in Megatron-LM.

    Args:
        spec: The model.
        layout: Adds the parallel sizes and, where the split is uneven or interleaved, the stages.

    Raises:
        UnsupportedFieldError: BR103, RoPE values that Megatron-LM has no flags for.
    """
    flags = ["--norm-epsilon", repr(spec.layernorm_epsilon)]
    scaling = spec.rope.scaling
    if scaling is not None:
        built_in = Llama3Scaling(
            factor=scaling.factor,
            low_freq_factor=_LOW_FREQ_FACTOR,
            high_freq_factor=_HIGH_FREQ_FACTOR,
            original_max_position_embeddings=_ORIGINAL_MAX_POSITION_EMBEDDINGS,
        )
        if scaling != built_in:
            raise UnsupportedFieldError(
                "Megatron-LM cannot run this RoPE scaling: only its factor is a flag",
                where=f"{scaling}",
                hint="low_freq_factor 1, high_freq_factor 4 and 8192 original positions are built "
                "into Megatron-LM; the checkpoint itself is sound and runs through bridge.model",
            )
        flags += ["--use-rope-scaling", "--rope-scaling-factor", repr(scaling.factor)]
    match spec.params_dtype:
        case "bfloat16":
            flags.append("--bf16")
        case "float16":
            flags.append("--fp16")
        case _:
            pass
    if layout is not None:
        flags += layout_flags(layout)
    return flags


def layout_flags(layout: ParallelLayout) -> list[str]:
    """Say what of Megatron-LM's flags cuts a model like this."""
    flags = [
        *("--tensor-model-parallel-size", str(layout.tensor_model_parallel_size)),
        *("--pipeline-model-parallel-size", str(layout.pipeline_model_parallel_size)),
    ]
    stages = pipeline_model_parallel_layout(layout)
    if stages is not None:
        letters = {"embedding": "E", "decoder": "t", "loss": "L"}
        text = "|".join("".join(letters[layer] for layer in stage) for stage in stages)
        flags += ["--pipeline-model-parallel-layout", text]
    if layout.sequence_parallel:
        flags.append("--sequence-parallel")
    return flags
