"""Reading and writing `config.json`: the fate of every field, both RoPE spellings, bad JSON."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bridge.errors import (
    ConfigError,
    InconsistentConfigError,
    UnmappedFieldError,
    UnsupportedArchitectureError,
    UnsupportedFieldError,
)
from bridge.hf_config import hf_config_from_spec, load_hf_config, spec_from_hf_config
from bridge.hf_fields import CARRIED, FIXED, MAPPED
from bridge.spec import (
    BlockSpec,
    GroupedQueryAttention,
    Linear,
    Llama3Scaling,
    ModelSpec,
    NoOp,
    RopeSpec,
    SwiGLU,
)

Config = dict[str, Any]

VARIANTS = Path(__file__).parents[2] / "suites" / "variants"
PUBLISHED = sorted(path.stem for path in VARIANTS.glob("Llama-3*.json"))
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 16.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
LLAMA: Config = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "num_hidden_layers": 3,
    "head_dim": 10,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "rope_scaling": LLAMA3,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "vocab_size": 129,
}
LLAMA_BLOCK = BlockSpec(
    attention=GroupedQueryAttention(num_query_groups=2), ffn=SwiGLU(ffn_hidden_size=80)
)
LLAMA_SPEC = ModelSpec(
    hidden_size=48,
    num_attention_heads=6,
    kv_channels=10,
    vocab_size=129,
    max_position_embeddings=131072,
    layernorm_epsilon=1e-5,
    rope=RopeSpec(
        rotary_base=500000.0,
        scaling=Llama3Scaling(
            factor=16.0,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position_embeddings=8192,
        ),
    ),
    share_embeddings_and_output_weights=False,
    params_dtype="bfloat16",
    blocks=(LLAMA_BLOCK,) * 3,
    heterogeneous_block_specs=False,
)
DECI: Config = {
    **{k: v for k, v in LLAMA.items() if k not in {"head_dim", "rope_scaling"}},
    "architectures": ["DeciLMForCausalLM"],
    "model_type": "nemotron-nas",
    "intermediate_size": None,
    "num_key_value_heads": None,
    "num_hidden_layers": 2,
    "block_configs": [
        {
            "attention": {"n_heads_in_group": None, "no_op": True, "replace_with_linear": False},
            "ffn": {"ffn_mult": 5.25, "no_op": False, "replace_with_linear": False},
        },
        {
            "attention": {"n_heads_in_group": 3, "no_op": False, "replace_with_linear": False},
            "ffn": {"ffn_mult": None, "no_op": False, "replace_with_linear": True},
        },
    ],
}


def llama(**changes: object) -> Config:
    """The Llama configuration with some fields changed; `...` removes one."""
    config = {**copy.deepcopy(LLAMA), **changes}
    return {name: value for name, value in config.items() if value is not ...}


def published(name: str) -> Config:
    """A published configuration."""
    return load_hf_config(VARIANTS / f"{name}.json")


def test_a_llama_is_read_field_by_field() -> None:
    """Every value of the configuration is where Megatron's words say it belongs."""
    assert spec_from_hf_config(LLAMA) == LLAMA_SPEC


def test_a_decilm_is_read_block_by_block() -> None:
    """Block 0 has no attention and tells nothing about block 1; the head size is a quotient."""
    spec = spec_from_hf_config(DECI)
    assert spec.heterogeneous_block_specs
    assert spec.kv_channels == 8
    assert spec.blocks == (
        BlockSpec(attention=NoOp(), ffn=SwiGLU(ffn_hidden_size=256)),
        BlockSpec(attention=GroupedQueryAttention(num_query_groups=2), ffn=Linear()),
    )


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configurations_say_what_is_published(name: str) -> None:
    """RoPE, vocabulary, norm and head size of the six, from the published facts."""
    spec = spec_from_hf_config(published(name))
    factor = 16.0 if name.endswith(("v1_5", "Ultra-253B-v1")) else 8.0
    hidden, heads = {
        "4B": (3072, 32), "8B": (4096, 32), "70B": (8192, 64), "49B": (8192, 64),
        "253B": (16384, 128),
    }[next(part for part in name.split("-") if part.endswith("B"))]  # fmt: skip
    assert (spec.hidden_size, spec.num_attention_heads, spec.kv_channels) == (hidden, heads, 128)
    assert spec.vocab_size == 128256
    assert spec.max_position_embeddings == 131072
    assert spec.layernorm_epsilon == 1e-5
    assert spec.params_dtype == "bfloat16"
    assert not spec.share_embeddings_and_output_weights
    assert spec.rope == RopeSpec(
        rotary_base=500000.0,
        scaling=Llama3Scaling(
            factor=factor,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position_embeddings=8192,
        ),
    )


def test_super_v1_and_v1_5_differ_in_the_rope_factor() -> None:
    """The one difference a mix-up of the two would hide until long positions."""
    old, new = (
        spec_from_hf_config(published(f"Llama-3_3-Nemotron-Super-49B-{v}")) for v in ("v1", "v1_5")
    )
    assert old != new
    assert old.rope != new.rope
    assert old.blocks == new.blocks


def test_fates_are_one_to_a_field() -> None:
    """No field is both mapped and carried, fixed and carried, or mapped and fixed."""
    assert not MAPPED & CARRIED
    assert not MAPPED & FIXED.keys()
    assert not CARRIED & FIXED.keys()


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_field_of_a_published_configuration_has_a_fate(name: str) -> None:
    """Nothing in the six real configurations is unknown, and all their values are accepted."""
    assert published(name).keys() <= MAPPED | FIXED.keys() | CARRIED


OTHER_VALUES: dict[str, list[object]] = {
    "architectures": [["GPT2LMHeadModel"], None],
    "model_type": ["gpt2"],
    "hidden_size": [72, None],
    "intermediate_size": [81, None],
    "num_attention_heads": [8, None],
    "num_key_value_heads": [3, None],
    "num_hidden_layers": [4, None],
    "head_dim": [12, None],
    "max_position_embeddings": [131071, None],
    "rms_norm_eps": [1e-6, None],
    "rope_theta": [10000.0, None],
    "rope_scaling": [None, {**LLAMA3, "factor": 8.0}],
    "rope_parameters": [{"rope_theta": 10000.0, "rope_type": "default"}, {}],
    "tie_word_embeddings": [True],
    "torch_dtype": ["float32", None],
    "dtype": ["float32"],
    "vocab_size": [128, None],
    "block_configs": [[], [{}]],
}


def test_other_values_cover_every_mapped_field() -> None:
    """The table above leaves no mapped field out."""
    assert OTHER_VALUES.keys() == MAPPED


@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name, values in OTHER_VALUES.items() for value in values]
)
def test_no_mapped_field_is_ignored(name: str, value: object) -> None:
    """Another value of a mapped field is another model, or an error; never the same model."""
    try:
        assert spec_from_hf_config(llama(**{name: value})) != LLAMA_SPEC
    except ConfigError:
        return


@pytest.mark.parametrize("key", [key for key in LLAMA3 if key != "rope_type"])
def test_no_rope_value_is_ignored(key: str) -> None:
    """Each of the four llama3 values counts, and none has a default."""
    other = spec_from_hf_config(llama(rope_scaling={**LLAMA3, key: 2}))
    assert other.rope != LLAMA_SPEC.rope
    without = {name: value for name, value in LLAMA3.items() if name != key}
    with pytest.raises(InconsistentConfigError) as error:
        spec_from_hf_config(llama(rope_scaling=without))
    assert any(key in place for place in error.value.where)


BUILT_OF: dict[str, object] = {
    "auto_map": {"AutoConfig": "code.Config", "AutoTokenizer": ["code.Slow", None]},
    "num_labels": 3,
    "pad_token_id": 5,
}
"""Carried fields of which transformers builds something."""


@pytest.mark.parametrize("name", sorted(CARRIED))
def test_carried_fields_change_nothing(name: str) -> None:
    """A carried field, whatever it holds, leaves the model as it is."""
    value = BUILT_OF.get(name, {"any": ["thing", 1]})
    assert spec_from_hf_config(llama(**{name: value})) == LLAMA_SPEC


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("num_labels", 30_000_000), ("num_labels", -1), ("num_labels", "2"), ("num_labels", True),
        ("auto_map", "code.Config"), ("auto_map", {"AutoConfig": 5}),
        ("auto_map", {"AutoConfig": ["code.Config", 5]}),
        ("pad_token_id", 10**9), ("pad_token_id", "<pad>"), ("pad_token_id", True),
        ("id2label", 5), ("label2id", ["a"]), ("task_specific_params", "x"),
    ],
)  # fmt: skip
def test_a_carried_field_that_no_loader_could_use_is_named(name: str, value: object) -> None:
    """Transformers would build tables of any length of it, or fail with a traceback."""
    with pytest.raises(InconsistentConfigError) as error:
        spec_from_hf_config(llama(**{name: value}))
    assert any(name in place for place in error.value.where)


REFUSED: dict[str, list[object]] = {
    "hidden_act": ["gelu", "relu2", "swish"],
    "attention_bias": [True, 1, 0],
    "mlp_bias": [True, "yes"],
    "attention_dropout": [0.1, False],
    "pretraining_tp": [2],
    "partial_rotary_factor": [0.5],
    "rope_interleaved": [True],
    "sliding_window": [4096, 0],
    "use_sliding_window": [True],
    "attention_chunk_size": [8192],
    "num_experts": [8],
    "num_local_experts": [8],
    "logit_scale": [0.0625],
    "embedding_multiplier": [12.0],
    "residual_multiplier": [0.22],
    "final_logit_softcapping": [30.0],
    "attn_logit_softcapping": [50.0],
    "quantization_config": [{"quant_method": "fp8"}, {}],
    "is_encoder_decoder": [True],
    "add_cross_attention": [True],
    "cross_attention_hidden_size": [64],
    "is_decoder": ["yes"],
    "pruned_heads": [{"0": [1]}],
    "tie_encoder_decoder": [True],
    "use_qk_norm": [True],
    "torchscript": [True],
    "use_bfloat16": [True],
    "chunk_size_feed_forward": [2],
    "layer_types": [["sliding_attention"], ["full_attention", "x"], "sliding_attention", 7],
}


def test_refused_values_cover_every_fixed_field() -> None:
    """The table above leaves no fixed field out."""
    assert REFUSED.keys() == {*FIXED, "layer_types"}


@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name, values in REFUSED.items() for value in values]
)
def test_what_megatron_cannot_express_is_refused_by_name(name: str, value: object) -> None:
    """Each fixed field has one value that Megatron computes; any other is named and refused."""
    with pytest.raises(UnsupportedFieldError) as error:
        spec_from_hf_config(llama(**{name: value}))
    assert len(error.value.where) == 1
    assert name in error.value.where[0]


@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name, values in FIXED.items() for value in values]
)
def test_fixed_fields_are_accepted_at_their_value(name: str, value: object) -> None:
    """The value that Megatron computes, and null, change nothing."""
    assert spec_from_hf_config(llama(**{name: value})) == LLAMA_SPEC


@pytest.mark.parametrize("value", [None, ["full_attention"] * 3])
def test_full_attention_everywhere_is_accepted(value: object) -> None:
    """transformers 5 writes `layer_types`; full attention is what Megatron computes."""  # noqa: D403  # a name
    assert spec_from_hf_config(llama(layer_types=value)) == LLAMA_SPEC


def test_all_offenders_are_in_one_error() -> None:
    """Unsupported, contradictory and unknown fields of one configuration are reported together."""
    config = llama(
        hidden_act="gelu",
        sliding_window=4096,
        quantization_config={"quant_method": "fp8"},
        rope_scaling={**LLAMA3, "rope_type": "yarn"},
        vocab_size=0,
        rms_norm_eps="small",
        nonsense=1,
        more_nonsense=2,
    )
    with pytest.raises(UnsupportedFieldError) as error:
        spec_from_hf_config(config, where="here.json")
    places = error.value.where
    assert error.value.message.startswith("8 fields")
    assert all(place.startswith("here.json: ") for place in places)
    for name in (
        "hidden_act", "sliding_window", "quantization_config", "rope_type='yarn'", "vocab_size",
        "rms_norm_eps", "nonsense", "more_nonsense",
    ):  # fmt: skip
        assert sum(name in place for place in places) >= 1, name
    assert error.value.hint is not None
    assert "--carry-field" in error.value.hint


def test_an_unknown_field_is_refused_and_carried_by_name_only() -> None:
    """A field nobody knows is an error naming it; the caller can vouch for it, and it alone."""
    config = llama(mystery=1, other_mystery=2)
    with pytest.raises(UnmappedFieldError) as error:
        spec_from_hf_config(config)
    assert [place.split(": ")[1].split()[0] for place in error.value.where] == [
        "mystery",
        "other_mystery",
    ]
    with pytest.raises(UnmappedFieldError, match="1 field "):
        spec_from_hf_config(config, carry=["mystery"])
    assert spec_from_hf_config(config, carry=["mystery", "other_mystery"]) == LLAMA_SPEC


@pytest.mark.parametrize("name", ["hidden_act", "vocab_size", "sliding_window", "rope_scaling"])
def test_known_fields_cannot_be_carried(name: str) -> None:
    """Vouching for a field whose meaning is known does not silence it."""
    values = {"hidden_act": "gelu", "vocab_size": 0, "sliding_window": 4, "rope_scaling": 5}
    with pytest.raises(ConfigError):
        spec_from_hf_config(llama(**{name: values[name]}), carry=[name])


@pytest.mark.parametrize(
    "changes",
    [
        {"architectures": ["GPT2LMHeadModel"]},
        {"architectures": ["LlamaForCausalLM", "DeciLMForCausalLM"]},
        {"architectures": []},
        {"architectures": "LlamaForCausalLM"},
        {"architectures": ...},
        {"architectures": [["LlamaForCausalLM"]]},
        {"architectures": [{}]},
        {"model_type": "nemotron-nas"},
        {"model_type": ["llama"]},
        {"model_type": "mistral"},
    ],
    ids=str,
)
def test_other_architectures_are_refused(changes: Config) -> None:
    """One class of the family, and a model type that belongs to it, or nothing."""
    with pytest.raises(UnsupportedArchitectureError):
        spec_from_hf_config(llama(**changes))


@pytest.mark.parametrize("scaling", [None, LLAMA3])
def test_both_spellings_of_rope_are_one_model(scaling: Config | None) -> None:
    """transformers 4's two fields, 5's one, and both together read the same."""  # noqa: D403  # a name
    newer = {"rope_theta": 777.5, **(scaling or {"rope_type": "default"})}
    older = {"rope_theta": 777.5, "rope_scaling": scaling}
    four = spec_from_hf_config(llama(**older))
    five = spec_from_hf_config(
        llama(
            rope_theta=...,
            rope_scaling=...,
            rope_parameters=newer,
            torch_dtype=...,
            dtype="bfloat16",
        )
    )
    both = spec_from_hf_config(llama(**older, rope_parameters=newer))
    assert four == five == both
    assert four.rope.rotary_base == 777.5
    assert (four.rope.scaling is None) == (scaling is None)


def test_ropes_legacy_type_key_is_read() -> None:
    """`type` is `rope_type`'s older name."""
    legacy = {("type" if key == "rope_type" else key): value for key, value in LLAMA3.items()}
    assert spec_from_hf_config(llama(rope_scaling=legacy)) == LLAMA_SPEC


@pytest.mark.parametrize(
    ("changes", "kind", "name"),
    [
        ({"rope_theta": ...}, InconsistentConfigError, "rope_theta"),
        ({"rope_theta": ..., "rope_scaling": None}, InconsistentConfigError, "rope_theta"),
        ({"rope_theta": "500000"}, InconsistentConfigError, "rope_theta"),
        ({"rope_theta": True}, InconsistentConfigError, "rope_theta"),
        ({"rope_theta": 10**400}, InconsistentConfigError, "rope_theta"),
        ({"rope_theta": float("inf")}, InconsistentConfigError, "rope_theta"),
        ({"rope_theta": 0.5}, InconsistentConfigError, "rotary_base"),
        ({"rope_scaling": [LLAMA3]}, InconsistentConfigError, "rope_scaling"),
        ({"rope_parameters": "llama3"}, InconsistentConfigError, "rope_parameters"),
        ({"rope_parameters": {**LLAMA3, "rope_theta": 1e4}}, InconsistentConfigError, "disagree"),
        ({"rope_parameters": {"rope_type": "default"}}, InconsistentConfigError, "disagree"),
        (
            {"rope_scaling": None, "rope_parameters": {**LLAMA3, "rope_theta": 1e4}},
            InconsistentConfigError,
            "rope_theta",
        ),
        ({"rope_scaling": {**LLAMA3, "type": "linear"}}, InconsistentConfigError, "rope_type"),
        ({"rope_scaling": {**LLAMA3, "factor": "8"}}, InconsistentConfigError, "factor"),
        ({"rope_scaling": {**LLAMA3, "factor": 0.5}}, InconsistentConfigError, "factor"),
        ({"rope_scaling": {**LLAMA3, "low_freq_factor": 4}}, InconsistentConfigError, "low_freq"),
        (
            {"rope_scaling": {**LLAMA3, "original_max_position_embeddings": 8192.5}},
            InconsistentConfigError,
            "original_max_position_embeddings",
        ),
        ({"rope_scaling": {**LLAMA3, "attention_factor": 2}}, UnmappedFieldError, "attention_fac"),
        ({"rope_scaling": {"rope_type": "default", "factor": 2}}, UnmappedFieldError, "factor"),
        (
            {"rope_scaling": {**LLAMA3, "partial_rotary_factor": 0.5}},
            UnsupportedFieldError,
            "partial_rotary_factor",
        ),
        *(
            ({"rope_scaling": {**LLAMA3, "rope_type": kind}}, UnsupportedFieldError, "rope_type")
            for kind in ("linear", "dynamic", "yarn", "longrope", "llama4", None, ["llama3"])
        ),
    ],
    ids=str,
)
def test_rope_that_is_not_understood_is_refused(
    changes: Config, kind: type[ConfigError], name: str
) -> None:
    """A missing base, a type other than llama3, unknown or contradictory values: all refused."""
    with pytest.raises(kind) as error:
        spec_from_hf_config(llama(**changes))
    assert any(name in place for place in error.value.where), error.value


@pytest.mark.parametrize("value", [0, -1, 1.5, "48", True, None, [48], 10**400, 2**40])
@pytest.mark.parametrize("name", ["hidden_size", "num_hidden_layers", "vocab_size"])
def test_counts_are_positive_integers_of_sane_size(name: str, value: object) -> None:
    """Zero, negative, fractional, quoted, true, null and absurd counts are refused."""
    with pytest.raises(InconsistentConfigError) as error:
        spec_from_hf_config(llama(**{name: value}))
    assert any(name in place for place in error.value.where)


@pytest.mark.parametrize("value", ["true", 1, 0, None, []])
def test_tied_is_true_or_false(value: object) -> None:
    """A truth value that is none is not guessed."""
    with pytest.raises(InconsistentConfigError):
        spec_from_hf_config(llama(tie_word_embeddings=value))


@pytest.mark.parametrize("value", ["1e-5", None, True, [], float("nan"), 0, 1, -1e-5, 10**400])
def test_epsilon_is_a_small_positive_number(value: object) -> None:
    """Anything else would be another model, or none."""
    with pytest.raises(InconsistentConfigError):
        spec_from_hf_config(llama(rms_norm_eps=value))


def test_defaults_are_those_of_the_model_classes() -> None:
    """What LlamaConfig fills in: as many KV heads as heads, head size hidden // heads, not tied."""
    config = llama(num_key_value_heads=..., head_dim=..., tie_word_embeddings=..., torch_dtype=...)
    spec = spec_from_hf_config(config)
    assert spec.kv_channels == 8
    assert spec.params_dtype == "float32"
    assert not spec.share_embeddings_and_output_weights
    assert spec.blocks[0].attention == GroupedQueryAttention(num_query_groups=6)


def test_a_head_size_that_is_no_quotient_must_be_given() -> None:
    """50 channels over 6 heads: without head_dim the model is unknown."""
    with pytest.raises(InconsistentConfigError, match="1 field") as error:
        spec_from_hf_config(llama(hidden_size=50, head_dim=...))
    assert "head_dim" in error.value.where[0]
    assert spec_from_hf_config(llama(hidden_size=50)).kv_channels == 10


@pytest.mark.parametrize(
    "name", ["int8", "bool", "float8_e4m3fn", "int64", "auto", "complex64", ["bfloat16"], 16]
)
def test_dtypes_that_hold_no_parameters_are_refused(name: object) -> None:
    """Megatron's parameters are floating point of 16 bits or more."""
    with pytest.raises(UnsupportedFieldError):
        spec_from_hf_config(llama(torch_dtype=name))


def test_dtype_goes_by_either_key_with_or_without_prefix() -> None:
    """`torch_dtype` of transformers 4 and `dtype` of 5; both only if they agree."""
    assert spec_from_hf_config(llama(torch_dtype="torch.float16")).params_dtype == "float16"
    assert spec_from_hf_config(llama(torch_dtype=..., dtype="float16")).params_dtype == "float16"
    assert spec_from_hf_config(llama(dtype="bfloat16")) == LLAMA_SPEC
    with pytest.raises(InconsistentConfigError):
        spec_from_hf_config(llama(dtype="float16"))


def test_block_configs_in_a_llama_are_refused() -> None:
    """A Llama with a block list is a DeciLM under a wrong name."""
    with pytest.raises(InconsistentConfigError):
        spec_from_hf_config(llama(block_configs=DECI["block_configs"]))


@pytest.mark.parametrize(
    "changes",
    [
        {"num_key_value_heads": 8},
        {"intermediate_size": 14336},
        {"num_hidden_layers": 3},
        {"block_configs": None},
        {"block_configs": []},
        {"block_configs": {"0": DECI["block_configs"][0]}},
        {"block_configs": "all"},
        {"head_dim": 128},
        {"hidden_size": 50},
    ],
    ids=["kv", "ffn", "depth", "none", "empty", "object", "string", "head_dim", "quotient"],
)
def test_a_decilm_that_contradicts_its_blocks_is_refused(changes: Config) -> None:
    """Global widths, another depth, another head size than the class computes: refused."""
    with pytest.raises(InconsistentConfigError):
        spec_from_hf_config({**DECI, **changes})


@pytest.mark.parametrize(
    "blocks",
    [
        [5],
        [{"attention": 5, "ffn": {}}],
        [{"attention": {"n_heads_in_group": 1}, "ffn": 5}],
        [{"attention": "n_heads"}],
    ],
)
def test_malformed_blocks_beside_a_head_size_are_refused(blocks: object) -> None:
    """The schema test reads blocks before they are checked; it must not trip over them."""
    with pytest.raises(InconsistentConfigError):
        spec_from_hf_config({**DECI, "head_dim": 128, "block_configs": blocks})


@pytest.mark.parametrize("schema", [None, "2025-11", "puzzletron"])
def test_a_written_configuration_states_the_head_size_it_needs(schema: str | None) -> None:
    """Where it is not hidden // heads, head_dim is written and read back."""
    spec = ModelSpec(
        hidden_size=50,
        num_attention_heads=6,
        kv_channels=10,
        vocab_size=129,
        max_position_embeddings=64,
        layernorm_epsilon=1e-6,
        rope=RopeSpec(rotary_base=10000.0),
        share_embeddings_and_output_weights=True,
        params_dtype="float16",
        blocks=(LLAMA_BLOCK, BlockSpec(attention=NoOp(), ffn=NoOp())),
        heterogeneous_block_specs=True,
    )
    config = hf_config_from_spec(spec, schema=schema)
    assert config["head_dim"] == 10
    assert spec_from_hf_config(config) == spec


def test_a_written_llama_is_plain_json_in_the_keys_of_transformers_4() -> None:
    """The keys every consumer reads, at the values of the model."""
    config = hf_config_from_spec(LLAMA_SPEC)
    assert json.loads(json.dumps(config)) == config
    assert {name: config[name] for name in LLAMA} == LLAMA
    assert "rope_parameters" not in config


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models_are_written_as_they_were_published(name: str) -> None:
    """Every field that states the model comes back as published, but for widths' multipliers."""
    original = published(name)
    spec = spec_from_hf_config(original)
    written = hf_config_from_spec(spec)
    assert spec_from_hf_config(written) == spec
    for key in (MAPPED | FIXED.keys()) & original.keys() - {"block_configs"}:
        assert written[key] == original[key], key


def write(path: Path, text: str | bytes) -> Path:
    """A file with this content."""
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        '"LlamaForCausalLM"',
        "null",
        '{"hidden_size": NaN}',
        '{"rope_theta": Infinity}',
        '{"rope_theta": -Infinity}',
        '{"vocab_size": 1, "vocab_size": 1}',
        '{"rope_scaling": {"factor": 8, "factor": 16}}',
        '{"a": 1} {"b": 2}',
        b"\xff\xfe\xff",
        b'{"a": "\xc3\x28"}',
        '{"vocab_size": ' + "9" * 5000 + "}",
        "[" * 100_000,
        '{"a":' * 100_000,
        '{"id2label": ' + "[" * 500 + "]" * 500 + "}",
        '{"id2label": ' + "[" * 40 + "]" * 40 + "}",
        '{"id2label": ' + '{"a":' * 40 + "1" + "}" * 40 + "}",
    ],
    ids=lambda text: repr(text)[:32],
)
def test_what_is_not_a_configuration_is_refused(tmp_path: Path, text: str | bytes) -> None:
    """Broken, repeated, non-finite, over-deep and non-object JSON ends in one clear error."""
    with pytest.raises(ConfigError) as error:
        load_hf_config(write(tmp_path / "config.json", text))
    assert error.value.where == (str(tmp_path / "config.json"),)
    assert len(str(error.value)) < 1000


def test_a_million_repeated_keys_are_refused_at_once(tmp_path: Path) -> None:
    """The search for repeated keys is linear: quadratic, this test would run into its limit."""
    text = "{" + ",".join(f'"key{n % 100_000}":0' for n in range(100_001)) + "}"
    with pytest.raises(ConfigError, match="repeated key key0"):
        load_hf_config(write(tmp_path / "config.json", text))


def test_a_billion_layers_are_refused_at_once() -> None:
    """An absurd depth is refused before it costs memory."""
    with pytest.raises(InconsistentConfigError) as error:
        spec_from_hf_config(llama(num_hidden_layers=10**9))
    assert "num_hidden_layers=1000000000" in error.value.where[0]
    with pytest.raises(InconsistentConfigError):
        spec_from_hf_config({**DECI, "num_hidden_layers": 10**9})


def test_a_directory_or_a_file_is_read(tmp_path: Path) -> None:
    """A checkpoint directory stands for the configuration in it."""
    file = write(tmp_path / "config.json", json.dumps(LLAMA))
    assert load_hf_config(file) == load_hf_config(tmp_path) == LLAMA


@pytest.mark.parametrize(
    "make",
    [
        lambda path: path / "missing.json",
        lambda path: path,
        lambda path: (path / "config.json").mkdir() or path,
    ],
    ids=["no file", "empty directory", "directory of that name"],
)
def test_a_missing_configuration_is_named(tmp_path: Path, make: Callable[[Path], Path]) -> None:
    """The error says which file was looked for."""
    with pytest.raises(ConfigError) as error:
        load_hf_config(make(tmp_path))
    assert str(tmp_path) in error.value.where[0]
