"""What Megatron-Bridge wants beside a checkpoint: `run_config.yaml` and `train_state.pt`.

Its loader builds the model from the `model` section of `iter_*/run_config.yaml`: a class of its own
by `_target_`, and that class's fields. Its training reads `latest_train_state.pt` at the root when
the iteration is 0. JSON is YAML but for some floats, so no YAML library is needed to write it.
Source: megatron-bridge 0.3.1 `training.model_load_save.load_model_config`, `models.gpt_provider`,
`models.llama_nemotron.llama_nemotron_provider`, `training.state.TrainState`.
"""

from __future__ import annotations

import json
from typing import Any, Final

from bridge.dtypes import dtype_named
from bridge.errors import ConfigError
from bridge.megatron_args import megatron_lm_flags
from bridge.megatron_config import heterogeneous_layers_json, model_wide_sizes
from bridge.spec import ModelSpec
from bridge.storage.torch_record import zeros_record

RUN_CONFIG_NAME: Final = "run_config.yaml"
TRAIN_STATE_NAME: Final = "train_state.pt"
LATEST_TRAIN_STATE_NAME: Final = "latest_train_state.pt"

_MODELS: Final = "megatron.bridge.models"
_HOMOGENEOUS: Final = f"{_MODELS}.gpt_provider.GPTModelProvider"
_HETEROGENEOUS: Final = (
    f"{_MODELS}.llama_nemotron.llama_nemotron_provider.LlamaNemotronHeterogeneousProvider"
)


def run_config(spec: ModelSpec, *, padded_vocab_size: int) -> bytes | None:
    """The contents of `run_config.yaml`; None for a model that Megatron-Bridge would run wrongly.

    Args:
        spec: The model; `params_dtype` as it is stored.
        padded_vocab_size: Rows of the stored embedding.
    """
    try:
        megatron_lm_flags(spec)
    except ConfigError:  # RoPE values that Megatron-Core's model does not take
        return None
    dtype = _named(f"torch.{spec.params_dtype}")
    scaling = spec.rope.scaling
    model: dict[str, Any] = {
        "_target_": _HETEROGENEOUS if spec.heterogeneous_block_specs else _HOMOGENEOUS,
        "num_layers": spec.num_layers,
        "hidden_size": spec.hidden_size,
        "num_attention_heads": spec.num_attention_heads,
        "kv_channels": spec.kv_channels,
        **model_wide_sizes(spec),
        "seq_length": spec.max_position_embeddings,
        "layernorm_epsilon": spec.layernorm_epsilon,
        "normalization": "RMSNorm",
        "gated_linear_unit": True,
        "activation_func": _named("torch.nn.functional.silu"),
        "add_bias_linear": False,
        "add_qkv_bias": False,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "position_embedding_type": "rope",
        "rotary_base": spec.rope.rotary_base,
        "rotary_percent": 1.0,
        "rope_scaling": scaling is not None,
        "rope_scaling_factor": 1.0 if scaling is None else scaling.factor,
        "share_embeddings_and_output_weights": spec.share_embeddings_and_output_weights,
        # The stored rows, not to be padded again.
        "vocab_size": padded_vocab_size,
        "should_pad_vocab": False,
        "params_dtype": dtype,
        "autocast_dtype": dtype,
        "pipeline_dtype": dtype,
        "bf16": spec.params_dtype == "bfloat16",
        "fp16": spec.params_dtype == "float16",
    }
    if spec.heterogeneous_block_specs:
        model["heterogeneous_layers_config_encoded_json"] = heterogeneous_layers_json(spec)
    fields = ",\n".join(f"  {json.dumps(name)}: {_yaml(value)}" for name, value in model.items())
    return f'{{"model": {{\n{fields}\n}}}}\n'.encode()


def train_state() -> bytes:
    """The contents of `train_state.pt`: nothing has been trained yet."""
    counts = ("step", "consumed_train_samples", "skipped_train_samples", "consumed_valid_samples")
    int32, float64, flag = map(dtype_named, ("int32", "float64", "bool"))
    return zeros_record(
        {
            **dict.fromkeys(counts, int32),
            "floating_point_operations_so_far": float64,
            **dict.fromkeys(("do_train", "do_valid", "do_test"), flag),
        }
    )


def megatron_bridge_files(
    spec: ModelSpec, *, padded_vocab_size: int, iteration_directory: str
) -> dict[str, bytes]:
    """Every file of an import that Megatron-Bridge asks for, relative to the checkpoint's root.

    Args:
        spec: The model; `params_dtype` as it is stored.
        padded_vocab_size: Rows of the stored embedding.
        iteration_directory: Of the import.
    """
    config = run_config(spec, padded_vocab_size=padded_vocab_size)
    if config is None:
        return {}
    return {
        f"{iteration_directory}/{RUN_CONFIG_NAME}": config,
        f"{iteration_directory}/{TRAIN_STATE_NAME}": train_state(),
        LATEST_TRAIN_STATE_NAME: train_state(),
    }


def _yaml(value: object) -> str:
    """JSON, but with a point in every float: to YAML 1.1 `1e-05` is a string."""
    text = json.dumps(value)
    mantissa, e, exponent = text.partition("e")
    return (
        f"{mantissa}.0e{exponent}"
        if isinstance(value, float) and e and "." not in mantissa
        else text
    )


def _named(target: str) -> dict[str, Any]:
    """A Python object by its name, as Megatron-Bridge writes one."""
    return {"_target_": target, "_call_": False}
