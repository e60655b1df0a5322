"""Hugging Face `config.json` <-> `ModelSpec`. Every field has a fate, and no field has two.

    mapped    it becomes part of the spec
    fixed     Megatron-Core expresses one value of it (no bias, SiLU ...); any other is refused
    carried   it does not touch the computation; export gives it back as it came
    unknown   refused by name, because guessing would be a silent change of the model

Both classes of the family are read, LlamaForCausalLM and DeciLMForCausalLM, the latter in each of
its dense block schemas; RoPE in the keys of transformers 4 and of 5. All offenders are reported in
one error. Nothing is taken from "block 0": each block is read on its own.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Final, overload

from bridge.errors import ConfigError, InconsistentConfigError, UnsupportedArchitectureError
from bridge.hf_blocks import BLOCK_SCHEMAS, read_blocks, write_blocks
from bridge.hf_fields import FieldReader, Findings, check_fates
from bridge.hf_rope import read_rope
from bridge.spec import (
    MAX_LAYERS,
    BlockSpec,
    GroupedQueryAttention,
    ModelSpec,
    SwiGLU,
)
from bridge.storage.input_files import MAX_JSON, read_input
from bridge.storage.remote import Location
from bridge.strict_json import parse_json

CONFIG_NAME: Final = "config.json"
LLAMA: Final = "LlamaForCausalLM"
DECILM: Final = "DeciLMForCausalLM"
_MAX_DEPTH: Final = 32
MODEL_TYPES: Final = {LLAMA: ("llama",), DECILM: ("nemotron-nas", "deci", "decilm")}


@overload
def config_file(model: Path) -> Path: ...
@overload
def config_file(model: Location) -> Location: ...
def config_file(model: Location) -> Location:
    """Where the configuration is: that of a checkpoint directory, or what is no directory."""
    return model / CONFIG_NAME if model.is_dir() else model


def load_hf_config(path: Location) -> dict[str, Any]:
    """Read a `config.json`, or that of a checkpoint directory.

    Raises:
        ConfigError: BR100, there is none, it is not JSON, not an object, or repeats a key.
    """
    file = config_file(path)
    try:
        config = parse_json(read_input(file, most=MAX_JSON))
    except FileNotFoundError:
        raise ConfigError(
            "no configuration there",
            where=str(file),
            hint="give a checkpoint directory or a config.json",
        ) from None
    except OSError as error:
        raise ConfigError(
            f"cannot read the configuration: {error.strerror}", where=str(file)
        ) from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"not a configuration: {error}", where=str(file)) from None
    if not isinstance(config, dict):
        raise ConfigError("not a configuration: a JSON object is expected", where=str(file))
    if _depth_exceeds(config, _MAX_DEPTH):
        raise ConfigError(
            f"not a configuration: nested more than {_MAX_DEPTH} levels deep", where=str(file)
        )
    return config


def _depth_exceeds(value: object, limit: int) -> bool:
    """Whether a JSON value nests deeper: printing, copying and writing such a one would recurse."""
    level = [value]
    for _ in range(limit):
        level = [
            child
            for one in level
            if isinstance(one, dict | list)
            for child in (one.values() if isinstance(one, dict) else one)
        ]
    return any(isinstance(one, dict | list) for one in level)


def spec_from_hf_config(
    config: Mapping[str, Any], *, where: str = "config.json", carry: Collection[str] = ()
) -> ModelSpec:
    """Read the model out of a configuration, or refuse it.

    Args:
        config: The parsed `config.json`.
        where: What to call it in errors.
        carry: Names of unknown fields to carry along unread, by the caller's word.

    Raises:
        UnsupportedArchitectureError: BR101, not a model of the family.
        UnmappedFieldError: BR102, fields with no known meaning.
        UnsupportedFieldError: BR103, fields that Megatron-Core cannot express.
        InconsistentConfigError: BR104, missing or contradictory fields.
    """
    architecture = _architecture(config, where)
    findings = Findings()
    check_fates(config, carry, findings)
    reader = FieldReader(config, findings)
    hidden = reader.count("hidden_size")
    heads = reader.count("num_attention_heads")
    num_layers = reader.count("num_hidden_layers")
    rope = read_rope(config, findings)
    if architecture == LLAMA:
        kv_channels = reader.count("head_dim", default=lambda: _quotient(hidden, heads, findings))
        groups = reader.count("num_key_value_heads", default=lambda: heads)
        width = reader.count("intermediate_size")
        if config.get("block_configs") is not None:
            findings.inconsistent.append("block_configs in a LlamaForCausalLM")
        block = BlockSpec(
            attention=GroupedQueryAttention(num_query_groups=groups),
            ffn=SwiGLU(ffn_hidden_size=width),
        )
        # A hostile num_hidden_layers must not cost memory before it is refused.
        blocks: tuple[BlockSpec, ...] = (block,) * min(num_layers, MAX_LAYERS)
        if num_layers > MAX_LAYERS:
            findings.inconsistent.append(f"num_hidden_layers={num_layers} is beyond any model")
    else:
        kv_channels = _decilm_kv_channels(reader, hidden, heads)
        for name in ("num_key_value_heads", "intermediate_size"):
            if config.get(name) is not None:
                findings.inconsistent.append(f"{name}={config[name]!r}: DeciLM states it per block")
        blocks = read_blocks(
            config.get("block_configs"),
            hidden_size=hidden,
            num_attention_heads=heads,
            num_layers=num_layers,
            findings=findings,
        )
    vocab_size = reader.count("vocab_size")
    max_position_embeddings = reader.count("max_position_embeddings")
    layernorm_epsilon = reader.number("rms_norm_eps")
    tied = reader.flag("tie_word_embeddings")
    params_dtype = reader.dtype()
    findings.raise_if_any(where)
    try:
        return ModelSpec(
            hidden_size=hidden,
            num_attention_heads=heads,
            kv_channels=kv_channels,
            vocab_size=vocab_size,
            max_position_embeddings=max_position_embeddings,
            layernorm_epsilon=layernorm_epsilon,
            rope=rope,
            share_embeddings_and_output_weights=tied,
            params_dtype=params_dtype,
            blocks=blocks,
            heterogeneous_block_specs=architecture == DECILM,
        )
    except InconsistentConfigError as error:
        places = [f"{where}: {place}" for place in error.where]
        raise InconsistentConfigError(error.message, where=places, hint=error.hint) from None


def _architecture(config: Mapping[str, Any], where: str) -> str:
    names = config.get("architectures")
    if isinstance(names, list) and len(names) == 1 and names[0] in tuple(MODEL_TYPES):
        model_type = config.get("model_type")
        if model_type not in (None, *MODEL_TYPES[names[0]]):
            raise UnsupportedArchitectureError(
                f"model_type {model_type!r} does not belong to {names[0]}",
                where=f"{where}: model_type",
            )
        return str(names[0])
    raise UnsupportedArchitectureError(
        f"architectures {names!r} is not one of this family",
        where=f"{where}: architectures",
        hint=f"this bridge converts {' and '.join(MODEL_TYPES)}; `nemotron-bridge list` shows them",
    )


def _quotient(hidden: int, heads: int, findings: Findings) -> int:
    if hidden % heads:
        findings.inconsistent.append(
            f"hidden_size={hidden} is not a multiple of num_attention_heads={heads} "
            "and head_dim is not given"
        )
    return max(1, hidden // heads)


def _decilm_kv_channels(reader: FieldReader, hidden: int, heads: int) -> int:
    # The released remote code always computes hidden // heads. The code of the 2025-11 schema
    # takes 128 for an absent head_dim, which a reader of another schema would not guess.
    blocks = reader.config.get("block_configs")
    if reader.config.get("head_dim") is None:
        quotient = _quotient(hidden, heads, reader.findings)
        if quotient != 128 and BLOCK_SCHEMAS["2025-11"].matches(blocks):
            reader.findings.inconsistent.append(
                f"head_dim is not given: this block schema means 128, hidden_size // "
                f"num_attention_heads is {quotient}; state which"
            )
        return quotient
    given = reader.count("head_dim")
    if given * heads != hidden and BLOCK_SCHEMAS["released"].matches(blocks):
        reader.findings.inconsistent.append(
            f"head_dim={given}: models of the released block schema compute hidden_size // "
            f"num_attention_heads = {hidden // heads}"
        )
    return given


def hf_config_from_spec(spec: ModelSpec, *, schema: str | None = None) -> dict[str, Any]:
    """Write a configuration for a model that has none, in the keys of transformers 4.

    Those keys are what every consumer reads: a 4.x reader given `rope_parameters` silently falls
    back to plain RoPE. Fields that only a publisher knows (token ids, `auto_map`) are left out.

    Args:
        spec: The model.
        schema: Block schema for DeciLM, a name in `BLOCK_SCHEMAS`; None takes the released one
            where it can say these widths, the newer one otherwise.
    """
    rope_scaling = None
    if spec.rope.scaling is not None:
        scaling = spec.rope.scaling
        rope_scaling = {
            "factor": scaling.factor,
            "high_freq_factor": scaling.high_freq_factor,
            "low_freq_factor": scaling.low_freq_factor,
            "original_max_position_embeddings": scaling.original_max_position_embeddings,
            "rope_type": "llama3",
        }
    config: dict[str, Any] = {
        "architectures": [DECILM if spec.heterogeneous_block_specs else LLAMA],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "hidden_act": "silu",
        "hidden_size": spec.hidden_size,
        "initializer_range": 0.02,
        "max_position_embeddings": spec.max_position_embeddings,
        "mlp_bias": False,
        "model_type": "nemotron-nas" if spec.heterogeneous_block_specs else "llama",
        "num_attention_heads": spec.num_attention_heads,
        "num_hidden_layers": spec.num_layers,
        "pretraining_tp": 1,
        "rms_norm_eps": spec.layernorm_epsilon,
        "rope_scaling": rope_scaling,
        "rope_theta": spec.rope.rotary_base,
        "tie_word_embeddings": spec.share_embeddings_and_output_weights,
        "torch_dtype": spec.params_dtype,
        "use_cache": True,
        "vocab_size": spec.vocab_size,
    }
    first = spec.blocks[0]
    if spec.heterogeneous_block_specs:
        config["block_configs"], used = write_blocks(spec, schema=schema)
        config |= {"num_key_value_heads": None, "intermediate_size": None}
        if used != "released":
            config["head_dim"] = spec.kv_channels
    elif isinstance(first.attention, GroupedQueryAttention) and isinstance(first.ffn, SwiGLU):
        config["num_key_value_heads"] = first.attention.num_query_groups
        config["intermediate_size"] = first.ffn.ffn_hidden_size
        config["head_dim"] = spec.kv_channels
    return dict(sorted(config.items()))
