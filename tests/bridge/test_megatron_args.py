"""What Megatron-LM keeps beside a checkpoint says which model it is, all of it or an error."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from bridge.dtypes import Dtype, dtype_named
from bridge.errors import BridgeError, InconsistentConfigError, UnsupportedFieldError
from bridge.megatron_args import checkpoint_args, megatron_lm_flags, spec_from_checkpoint_args
from bridge.pipeline import parse_layout
from bridge.spec import (
    BlockSpec,
    GroupedQueryAttention,
    Linear,
    Llama3Scaling,
    ModelSpec,
    NoOp,
    ParallelLayout,
    RopeSpec,
    SwiGLU,
)

SCALING = Llama3Scaling(
    factor=16.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192
)
ODD_SCALING = dataclasses.replace(SCALING, low_freq_factor=2.0)
LLAMA = ModelSpec(
    hidden_size=40,
    num_attention_heads=8,
    kv_channels=6,
    vocab_size=131,
    max_position_embeddings=1024,
    layernorm_epsilon=3e-6,
    rope=RopeSpec(rotary_base=500000.0, scaling=SCALING),
    share_embeddings_and_output_weights=False,
    params_dtype="bfloat16",
    blocks=(
        BlockSpec(
            attention=GroupedQueryAttention(num_query_groups=2), ffn=SwiGLU(ffn_hidden_size=56)
        ),
    )
    * 4,
    heterogeneous_block_specs=False,
)
DECILM = dataclasses.replace(
    LLAMA,
    heterogeneous_block_specs=True,
    share_embeddings_and_output_weights=True,
    blocks=(
        BlockSpec(attention=NoOp(), ffn=SwiGLU(ffn_hidden_size=8)),
        BlockSpec(attention=Linear(), ffn=NoOp()),
        BlockSpec(attention=GroupedQueryAttention(num_query_groups=8), ffn=Linear()),
    ),
)
SPECS = {
    "llama": LLAMA,
    "decilm": DECILM,
    "plain rope": dataclasses.replace(LLAMA, rope=RopeSpec(rotary_base=10000.0)),
    "odd rope": dataclasses.replace(LLAMA, rope=RopeSpec(rotary_base=12345.5, scaling=ODD_SCALING)),
    "float32": dataclasses.replace(LLAMA, params_dtype="float32"),
}


def args_of(spec: ModelSpec, **changes: Any) -> dict[str, Any]:  # noqa: ANN401 - any arg
    """The args of a model, some changed."""
    return checkpoint_args(spec, parse_layout("tp2", spec)) | changes


@pytest.mark.parametrize("name", SPECS)
def test_args_give_the_model_back(name: str) -> None:
    """Everything, RoPE values that Megatron-LM has no flags for included."""
    assert spec_from_checkpoint_args(args_of(SPECS[name])) == SPECS[name]


@pytest.mark.parametrize("name", SPECS)
def test_args_hold_only_what_loads_without_trust(name: str) -> None:
    """Plain values and the dtype: torch's `weights_only` loading refuses anything else."""
    found = args_of(SPECS[name])
    assert isinstance(found.pop("params_dtype"), Dtype)
    assert {type(value) for value in found.values()} <= {int, float, bool, str, type(None)}


def test_args_are_what_megatron_lm_reads() -> None:
    """Its names and types, by hand: 131 rows padded to a multiple of 2 x 128."""
    expected = {
        "num_layers": 4,
        "hidden_size": 40,
        "ffn_hidden_size": 56,
        "num_attention_heads": 8,
        "group_query_attention": True,
        "num_query_groups": 2,
        "kv_channels": 6,
        "position_embedding_type": "rope",
        "rotary_base": 500000,
        "rotary_percent": 1.0,
        "use_rope_scaling": True,
        "rope_scaling_factor": 16.0,
        "swiglu": True,
        "normalization": "RMSNorm",
        "norm_epsilon": 3e-6,
        "untie_embeddings_and_output_weights": True,
        "add_bias_linear": False,
        "padded_vocab_size": 256,
        "params_dtype": dtype_named("bfloat16"),
        "tensor_model_parallel_size": 1,
        "pipeline_model_parallel_size": 1,
        "ckpt_format": "torch_dist",
        "no_save_optim": True,
        "no_save_rng": True,
    }
    found = args_of(LLAMA)
    assert expected == {name: found[name] for name in expected}
    assert isinstance(found["rotary_base"], int)
    assert "heterogeneous_layers_config_path" not in found


def test_a_heterogeneous_model_has_a_path_that_is_not_none() -> None:
    """None would make Megatron-LM build a homogeneous model, silently."""
    found = args_of(DECILM)
    assert found["heterogeneous_layers_config_path"] == ""
    assert found["heterogeneous_layers_config_encoded_json"].startswith('{"block_configs":[')
    # No block's own sizes: block 0 is a no-op, the others differ.
    assert (found["num_query_groups"], found["ffn_hidden_size"]) == (8, 160)


def test_a_training_run_that_says_less_is_asked_for_the_rest() -> None:
    """Vocabulary size and RoPE scaling are never guessed; given, they complete the model."""
    args = args_of(LLAMA, vocab_size=None)
    for name in list(args):
        if "rope_scaling" in name:
            del args[name]
    with pytest.raises(InconsistentConfigError) as caught:
        spec_from_checkpoint_args(args)
    assert [place.split(" is missing")[0] for place in caught.value.where] == [
        "common.pt: args: vocab_size",
        "common.pt: args: use_rope_scaling",
    ]
    assert spec_from_checkpoint_args(args, vocab_size=131, rope=LLAMA.rope) == LLAMA


def test_a_run_with_rope_scaling_used_the_values_built_into_megatron() -> None:
    """Low 1, high 4 and 8192, when the args hold only the factor."""
    args = args_of(LLAMA)
    for part in ("low_freq_factor", "high_freq_factor", "original_max_position_embeddings"):
        del args[f"rope_scaling_{part}"]
    assert spec_from_checkpoint_args(args).rope.scaling == SCALING


def test_a_dtype_of_torchs_own_is_read_too() -> None:
    """As a caller that unpickled the args with torch has it."""
    assert spec_from_checkpoint_args(args_of(LLAMA, params_dtype=torch.bfloat16)) == LLAMA


def test_attention_without_groups_has_one_per_head() -> None:
    """Megatron-LM's default when `group_query_attention` is off, whatever the count says."""
    found = spec_from_checkpoint_args(args_of(LLAMA, group_query_attention=False))
    assert found.blocks[0].attention == GroupedQueryAttention(num_query_groups=8)


@pytest.mark.parametrize(
    ("changes", "error", "says"),
    [
        ({"swiglu": False}, UnsupportedFieldError, "swiglu=False"),
        ({"normalization": "LayerNorm"}, UnsupportedFieldError, "normalization"),
        ({"add_qkv_bias": True}, UnsupportedFieldError, "add_qkv_bias"),
        ({"rotary_percent": 0.5}, UnsupportedFieldError, "rotary_percent"),
        ({"qk_layernorm": True}, UnsupportedFieldError, "qk_layernorm"),
        ({"num_experts": 8}, UnsupportedFieldError, "num_experts=8"),
        ({"window_size": (128, 0)}, UnsupportedFieldError, "window_size"),
        ({"apply_layernorm_1p": True}, UnsupportedFieldError, "apply_layernorm_1p"),
        ({"params_dtype": torch.complex64}, UnsupportedFieldError, "complex64"),
        ({"vocab_size": 300}, InconsistentConfigError, "vocab_size=300"),
        ({"hidden_size": None}, InconsistentConfigError, "hidden_size"),
        ({"norm_epsilon": "small"}, InconsistentConfigError, "norm_epsilon"),
        ({"rope_scaling_factor": None}, InconsistentConfigError, "without a number for factor"),
        ({"rope_scaling_factor": 0.5}, InconsistentConfigError, "factor >= 1"),
    ],
)
def test_another_architecture_is_refused(
    changes: dict[str, object], error: type[BridgeError], says: str
) -> None:
    """By the name of the arg that says so."""
    with pytest.raises(error, match=says):
        spec_from_checkpoint_args(args_of(LLAMA, **changes))


@pytest.mark.parametrize(
    "name",
    [
        "swiglu", "normalization", "add_bias_linear", "position_embedding_type", "num_layers",
        "kv_channels", "norm_epsilon", "rotary_base", "padded_vocab_size", "params_dtype",
        "untie_embeddings_and_output_weights", "num_query_groups", "ffn_hidden_size",
        "max_position_embeddings",
    ],
)  # fmt: skip
def test_a_missing_arg_is_named(name: str) -> None:
    """No default stands in for what defines the model."""
    args = args_of(LLAMA)
    del args[name]
    with pytest.raises(InconsistentConfigError, match=name):
        spec_from_checkpoint_args(args)


def test_flags_are_those_that_args_do_not_restore() -> None:
    """RoPE scaling, the norm's epsilon and the precision."""
    assert megatron_lm_flags(LLAMA) == [
        "--norm-epsilon", "3e-06", "--use-rope-scaling", "--rope-scaling-factor", "16.0", "--bf16",
    ]  # fmt: skip
    plain = dataclasses.replace(SPECS["plain rope"], params_dtype="float32")
    assert megatron_lm_flags(plain) == ["--norm-epsilon", "3e-06"]


def test_flags_spell_out_a_layout() -> None:
    """Uneven stages in Megatron-LM's letters, which its own parser reads as ours."""
    from megatron.core.transformer.pipeline_parallel_layer_layout import (
        PipelineParallelLayerLayout,
    )

    layout = ParallelLayout(
        tensor_model_parallel_size=2,
        pipeline_model_parallel_size=3,
        num_layers_per_stage=(0, 3, 1),
        sequence_parallel=True,
    )
    flags = megatron_lm_flags(LLAMA, layout)
    assert flags[6:] == [
        "--tensor-model-parallel-size", "2", "--pipeline-model-parallel-size", "3",
        "--pipeline-model-parallel-layout", "E|ttt|tL", "--sequence-parallel",
    ]  # fmt: skip
    parsed = PipelineParallelLayerLayout("E|ttt|tL", 3)
    parsed.validate_layer_layout(num_layers=4, mtp_num_layers=0)
    assert megatron_lm_flags(LLAMA, parse_layout("pp2", LLAMA))[6:] == [
        "--tensor-model-parallel-size", "1", "--pipeline-model-parallel-size", "2",
    ]  # fmt: skip


def test_rope_values_without_a_flag_are_refused() -> None:
    """Megatron-LM would run another model and say nothing."""
    with pytest.raises(UnsupportedFieldError, match="only its factor is a flag"):
        megatron_lm_flags(SPECS["odd rope"])


def test_layers_beyond_any_model_are_refused_before_there_are_any() -> None:
    """10^12 of them would take all memory."""
    args = args_of(LLAMA, num_layers=10**12 // 2)
    with pytest.raises(InconsistentConfigError) as caught:
        spec_from_checkpoint_args(args)
    assert any("num_layers" in place for place in caught.value.where)
