"""A provider honours what is set, or refuses it by name; nothing is ignored."""

from __future__ import annotations

import re
from enum import Enum
from typing import Any

import pytest
import torch

from bridge import AutoBridge
from bridge.auto.provider import ModelProvider
from bridge.errors import BridgeError, LayoutError, UsageError
from harness.toys import toy_named


@pytest.fixture
def provider() -> ModelProvider:
    """Of a homogeneous model of 6 layers, without weights."""
    bridge = AutoBridge.from_hf_config(toy_named("nano-4b").config_for("bfloat16"))
    return bridge.to_megatron_provider(load_weights=False)


def test_a_provider_says_what_the_model_is(provider: ModelProvider) -> None:
    """In the names of Megatron-Bridge, and may be told what it says."""
    config = toy_named("nano-4b").config_for("bfloat16")
    facts = {
        "num_layers": config["num_hidden_layers"],
        "hidden_size": config["hidden_size"],
        "ffn_hidden_size": config["intermediate_size"],
        "num_attention_heads": config["num_attention_heads"],
        "num_query_groups": config["num_key_value_heads"],
        "kv_channels": config["head_dim"],
        "vocab_size": config["vocab_size"],
        "layernorm_epsilon": config["rms_norm_eps"],
        "rotary_base": config["rope_theta"],
        "rope_scaling_factor": config["rope_scaling"]["factor"],
        "seq_length": config["max_position_embeddings"],
        "init_method_std": config["initializer_range"],
        "normalization": "RMSNorm",
        "gated_linear_unit": True,
        "context_parallel_size": 1,
        "moe_router_topk": 2,
        "bf16": True,
        "fp16": False,
        "params_dtype": torch.bfloat16,
    }
    assert {name: getattr(provider, name) for name in facts} == facts
    for name, value in facts.items():
        setattr(provider, name, value)
    assert not hasattr(provider, "tensor_parallel_size")


@pytest.mark.parametrize(
    ("name", "value", "hint"),
    [
        ("context_parallel_size", 2, "leave it at 1"),
        ("expert_model_parallel_size", 8, "leave it at 1"),
        ("expert_tensor_parallel_size", 2, "leave it at 1 or None"),
        ("num_moe_experts", 8, "leave it at None"),
        ("fp8", "hybrid", "leave it at None"),
        ("qk_layernorm", True, "leave it at False"),
        ("rotary_percent", 0.5, "leave it at 1.0"),
        ("moe_router_topk", 4, "leave it at 2"),
        ("hidden_size", 4096, "config.json"),
        ("vocab_size", 8192, "config.json"),
        ("share_embeddings_and_output_weights", 0, "config.json"),
        ("transformer_layer_spec", object(), "set layers to"),
        ("pipeline_model_parallel_layout", "E|t*6|L", "num_layers_per_stage"),
        ("parallel_output", False, "leave it at True"),
        ("tensor_parallel_size", 2, "tensor_model_parallel_size"),
        ("frobnicate", 1, "docs/migration.md"),
    ],
)
def test_what_a_provider_cannot_do_is_refused_by_name(
    provider: ModelProvider, name: str, value: object, hint: str
) -> None:
    """When it is set, with what to do instead."""
    with pytest.raises(UsageError, match=name) as caught:
        setattr(provider, name, value)
    assert caught.value.where == (f"provider.{name}",)
    assert hint in str(caught.value.hint)


def test_each_way_to_name_a_dtype_names_one(provider: ModelProvider) -> None:
    """Whatever comes last counts, and they never contradict one another."""
    seen = []
    for name, value in (
        ("bf16", False),
        ("fp16", True),
        ("bf16", True),
        ("fp16", False),
        ("params_dtype", torch.float32),
        ("params_dtype", torch.float16),
    ):
        setattr(provider, name, value)
        seen.append((provider.params_dtype, provider.bf16, provider.fp16))
    assert seen == [
        (torch.float32, False, False),
        (torch.float16, False, True),
        (torch.bfloat16, True, False),
        (torch.bfloat16, True, False),
        (torch.float32, False, False),
        (torch.float16, False, True),
    ]


@pytest.mark.parametrize(
    ("settings", "stages"),
    [
        ({}, (6,)),
        ({"pipeline_model_parallel_size": 2}, (3, 3)),
        ({"pipeline_model_parallel_size": 2, "num_layers_in_first_pipeline_stage": 1}, (1, 5)),
        ({"pipeline_model_parallel_size": 2, "num_layers_in_last_pipeline_stage": 2}, (4, 2)),
        (
            {
                "pipeline_model_parallel_size": 4,
                "num_layers_in_first_pipeline_stage": 1,
                "num_layers_in_last_pipeline_stage": 1,
            },
            (1, 2, 2, 1),
        ),
        ({"pipeline_model_parallel_size": 3, "num_layers_per_stage": [0, 5, 1]}, (0, 5, 1)),
        (
            {"pipeline_model_parallel_size": 3, "virtual_pipeline_model_parallel_size": 2},
            (1,) * 6,
        ),
    ],
)
def test_layers_are_dealt_out_as_asked(
    provider: ModelProvider, settings: dict[str, Any], stages: tuple[int, ...]
) -> None:
    """Evenly, with ends of their own, or one by one."""
    for name, value in settings.items():
        setattr(provider, name, value)
    provider.finalize()
    assert provider.layout().num_layers_per_stage == stages


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tensor_model_parallel_size": 3}, "tensor_model_parallel_size=3 does not divide"),
        ({"sequence_parallel": True}, "sequence_parallel with tensor_model_parallel_size=1"),
        ({"virtual_pipeline_model_parallel_size": 2}, "virtual_pipeline_model_parallel_size=2"),
        ({"pipeline_model_parallel_size": 7}, "7 pipeline stages for 6 layers"),
        (
            {"pipeline_model_parallel_size": 3, "num_layers_in_first_pipeline_stage": 1},
            "leave 5 layers for 2 pipeline ranks",
        ),
        (
            {
                "pipeline_model_parallel_size": 2,
                "virtual_pipeline_model_parallel_size": 3,
                "num_layers_in_first_pipeline_stage": 1,
            },
            "leave 5 layers for 1 pipeline ranks",
        ),
        ({"layers": "foo"}, "layers='foo': one of auto, local, te"),
        ({"attention_backend": "nope"}, "attention_backend='nope': one of auto, unfused"),
        ({"make_vocab_size_divisible_by": -1}, "make_vocab_size_divisible_by=-1: a positive"),
        ({"tensor_model_parallel_size": "2"}, "tensor_model_parallel_size='2': an integer"),
        ({"pipeline_model_parallel_size": None}, "pipeline_model_parallel_size=None: an integer"),
        ({"seq_length": -5}, "seq_length=-5: a positive integer"),
        ({"num_layers_per_stage": "6"}, "num_layers_per_stage='6': a list of integers"),
        ({"num_layers_per_stage": 6}, "num_layers_per_stage=6: a list of integers"),
        ({"params_dtype": torch.int8}, "params_dtype=torch.int8: a floating-point dtype"),
        ({"pipeline_dtype": torch.float32}, "pipeline_dtype=torch.float32 with params_dtype="),
    ],
)
def test_settings_that_do_not_fit_are_refused_before_anything_is_built(
    provider: ModelProvider, settings: dict[str, Any], message: str
) -> None:
    """By `finalize`, and by building all the same."""
    for name, value in settings.items():
        setattr(provider, name, value)
    with pytest.raises(BridgeError, match=re.escape(message)):
        provider.finalize()
    with pytest.raises(BridgeError, match=re.escape(message)):
        provider.provide_distributed_model(wrap_with_ddp=False)
    assert not torch.distributed.is_initialized()


class _ModelType(Enum):
    """As Megatron's enumeration."""

    encoder_and_decoder = 2


@pytest.mark.parametrize(
    ("arguments", "place"),
    [
        ({"use_megatron_fsdp": True}, "use_megatron_fsdp"),
        ({"use_torch_fsdp2": True}, "use_torch_fsdp2"),
        ({"init_model_with_meta_device": True}, "init_model_with_meta_device"),
        ({"pg_collection": object()}, "pg_collection"),
        ({"model_type": _ModelType.encoder_and_decoder}, "model_type"),
    ],
)
def test_arguments_that_cannot_be_met_are_refused(
    provider: ModelProvider, arguments: dict[str, Any], place: str
) -> None:
    """Before any group is formed."""
    with pytest.raises(UsageError) as caught:
        provider.provide_distributed_model(wrap_with_ddp=False, **arguments)
    assert caught.value.where == (place,)
    assert not torch.distributed.is_initialized()


def test_calls_in_the_wrong_order_say_what_is_missing(provider: ModelProvider) -> None:
    """A configuration for data parallelism, groups, sizes as attributes."""
    with pytest.raises(UsageError, match="needs a ddp_config"):
        provider.provide_distributed_model()
    with pytest.raises(LayoutError, match="groups are not formed"):
        provider.provide()
    with pytest.raises(UsageError, match="no context_parallel_size here"):
        provider.initialize_model_parallel(seed=0, context_parallel_size=2)
    with pytest.raises(UsageError, match="no seed_kwargs here"):
        provider.initialize_model_parallel(seed=0, seed_kwargs={"te_rng_tracker": True})
    assert not torch.distributed.is_initialized()
