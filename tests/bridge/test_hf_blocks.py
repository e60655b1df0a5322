"""DeciLM's blocks: three schemas, every refusal by block and field, and the width of `ffn_mult`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bridge.errors import ConfigError, InconsistentConfigError
from bridge.hf_blocks import (
    BLOCK_SCHEMAS,
    ffn_mult_to_width,
    read_blocks,
    width_to_ffn_mult,
    write_blocks,
)
from bridge.hf_config import hf_config_from_spec, spec_from_hf_config
from bridge.hf_fields import Findings
from bridge.spec import (
    AttentionSpec,
    BlockSpec,
    FfnSpec,
    GroupedQueryAttention,
    Linear,
    ModelSpec,
    NoOp,
    RopeSpec,
    SwiGLU,
)

VARIANTS = Path(__file__).parents[2] / "suites" / "variants"
Fields = dict[str, Any]


def read(*blocks: object, num_layers: int | None = None) -> tuple[tuple[BlockSpec, ...], Findings]:
    """Read blocks of a model of hidden size 96 with 12 heads."""
    findings = Findings()
    found = read_blocks(
        list(blocks),
        hidden_size=96,
        num_attention_heads=12,
        num_layers=len(blocks) if num_layers is None else num_layers,
        findings=findings,
    )
    return found, findings


def block(attention: Fields | None = None, ffn: Fields | None = None, **rest: object) -> Fields:
    """A healthy block with some fields on top."""
    return {
        "attention": {"n_heads_in_group": 4, **(attention or {})},
        "ffn": {"intermediate_size": 40, **(ffn or {})},
        **rest,
    }


def groups(count: int) -> GroupedQueryAttention:
    """Attention of so many groups."""
    return GroupedQueryAttention(num_query_groups=count)


@pytest.mark.parametrize(
    ("attention", "expected"),
    [
        ({"n_heads_in_group": 4}, groups(3)),
        ({"n_heads_in_group": 1}, groups(12)),
        ({"n_heads_in_group": 12}, groups(1)),
        ({"num_key_value_heads": 4}, groups(4)),
        ({"num_kv_heads": 4}, groups(4)),
        ({"num_key_value_heads": 4, "n_heads_in_group": 3}, groups(4)),
        ({"num_key_value_heads": 4, "n_heads_in_group": None}, groups(4)),
        ({"n_heads_in_group": 6, "no_op": None, "replace_with_linear": False}, groups(2)),
        ({"n_heads_in_group": None, "no_op": True}, NoOp()),
        ({"no_op": True, "replace_with_linear": False}, NoOp()),
        ({"replace_with_linear": True, "n_heads_in_group": None}, Linear()),
    ],
    ids=str,
)
def test_attention_is_read_in_every_spelling(attention: Fields, expected: AttentionSpec) -> None:
    """Heads in a group and KV heads both give query groups; flags give no-op and linear."""
    (found,), findings = read({"attention": attention, "ffn": {"no_op": True}})
    assert findings == Findings()
    assert found == BlockSpec(attention=expected, ffn=NoOp())


@pytest.mark.parametrize(
    ("ffn", "expected"),
    [
        ({"intermediate_size": 41}, SwiGLU(ffn_hidden_size=41)),
        ({"ffn_mult": 5.25}, SwiGLU(ffn_hidden_size=512)),  # 2 * 5.25 * 96 / 3 = 336
        ({"ffn_mult": 4}, SwiGLU(ffn_hidden_size=256)),  # exactly 256
        ({"ffn_mult": 4.000001}, SwiGLU(ffn_hidden_size=256)),  # 256.00006, cut to 256
        ({"ffn_mult": 4.03}, SwiGLU(ffn_hidden_size=512)),
        ({"ffn_mult": 5.25, "intermediate_size": 512}, SwiGLU(ffn_hidden_size=512)),
        ({"no_op": True, "ffn_mult": None}, NoOp()),
        ({"replace_with_linear": True}, Linear()),
        ({"intermediate_size": 8, "gated": True, "hidden_act": "silu"}, SwiGLU(ffn_hidden_size=8)),
    ],
    ids=str,
)
def test_ffn_is_read_in_every_spelling(ffn: Fields, expected: FfnSpec) -> None:
    """A multiplier is rounded up to 256, a width is taken as it is."""
    (found,), findings = read({"attention": {"no_op": True}, "ffn": ffn})
    assert findings == Findings()
    assert found == BlockSpec(attention=NoOp(), ffn=expected)


@pytest.mark.parametrize(
    ("values", "name"),
    [
        (block({"window_length": 512}), "attention.window_length=512"),
        (block({"num_sink_tokens": 4}), "attention.num_sink_tokens=4"),
        (block({"use_prefill_window_in_sink_attention": True}), "attention.use_prefill_window"),
        (block({"unshifted_sink": True}), "attention.unshifted_sink=True"),
        (block({"sparsify": ["q"]}), "attention.sparsify"),
        (block({"llama4": {"attn_scale": 0.1}}), "attention.llama4"),
        (block({"mamba": {"state_dim": 128}}), "attention.mamba"),
        (block(None, {"sparsify": {"prob": 0.5}}), "ffn.sparsify"),
        (block(None, {"moe": {"num_local_experts": 8}}), "ffn.moe"),
        (block(None, {"hidden_act": "relu2"}), "ffn.hidden_act='relu2'"),
        (block(None, {"gated": False}), "ffn.gated=False"),
        (block(parallel_blocks=[block()]), "parallel_blocks"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_a_block_cannot_be_is_refused_by_name(values: Fields, name: str) -> None:
    """Windows, sinks, sparsity, MoE, Mamba and parallel blocks are named with their block."""
    _, findings = read(block(), values)
    assert len(findings.unsupported) == 1
    assert findings.unsupported[0].startswith(f"block_configs[1].{name}")
    assert not findings.inconsistent
    assert not findings.unmapped


def test_a_feature_of_a_no_op_is_refused_too() -> None:
    """A Mamba layer says `no_op` of its attention: it must not pass for one."""
    _, findings = read(
        {"attention": {"no_op": True, "mamba": {"state_dim": 16}}, "ffn": {"no_op": True}}
    )
    assert len(findings.unsupported) == 1


@pytest.mark.parametrize(
    ("values", "name"),
    [
        (block(), None),
        (block({"surprise": None}), "attention.surprise"),
        (block(None, {"surprise": 1}), "ffn.surprise"),
        (block(surprise=1), "surprise"),
        (block(subblock_configs=[]), "subblock_configs"),
    ],
    ids=str,
)
def test_unknown_keys_of_a_block_are_named(values: Fields, name: str | None) -> None:
    """A key nobody knows is refused even at null: its meaning is not known."""
    _, findings = read(values)
    assert findings.unmapped == ([] if name is None else [f"block_configs[0].{name}"])


@pytest.mark.parametrize(
    "values",
    [
        block({"n_heads_in_group": 5}),
        block({"n_heads_in_group": 0}),
        block({"n_heads_in_group": -4}),
        block({"n_heads_in_group": 4.0}),
        block({"n_heads_in_group": True}),
        block({"n_heads_in_group": "4"}),
        block({"n_heads_in_group": 10**400}),
        block({"n_heads_in_group": None}),
        block({"num_key_value_heads": 5}),
        block({"num_key_value_heads": 4}),  # n_heads_in_group 4 says 3
        block({"num_kv_heads": 6, "num_key_value_heads": 4, "n_heads_in_group": None}),
        block({"no_op": True, "replace_with_linear": True}),
        block({"no_op": "yes"}),
        block({"replace_with_linear": 1}),
        block(None, {"intermediate_size": None}),
        block(None, {"intermediate_size": 0}),
        block(None, {"intermediate_size": 40.0}),
        block(None, {"intermediate_size": True}),
        block(None, {"intermediate_size": 10**400}),
        block(None, {"intermediate_size": None, "ffn_mult": 0}),
        block(None, {"intermediate_size": None, "ffn_mult": -1.5}),
        block(None, {"intermediate_size": None, "ffn_mult": True}),
        block(None, {"intermediate_size": None, "ffn_mult": "2"}),
        block(None, {"intermediate_size": None, "ffn_mult": 1e300}),
        block(None, {"intermediate_size": None, "ffn_mult": 10**400}),
        block(None, {"intermediate_size": None, "ffn_mult": 1e-9}),
        block(None, {"ffn_mult": 5.25}),  # says 512, beside a width of 40
        block(None, {"no_op": True, "replace_with_linear": True}),
        {"attention": None, "ffn": {"no_op": True}},
        {"attention": [], "ffn": {"no_op": True}},
        {"attention": {"no_op": True}},
        {"attention": {"no_op": True}, "ffn": "no_op"},
        5,
        None,
        [],
    ],
    ids=str,
)
def test_contradictory_blocks_are_refused(values: object) -> None:
    """Numbers that are none, do not divide, or contradict another key, and blocks that are none."""
    _, findings = read(values)
    assert findings.inconsistent
    assert all(entry.startswith("block_configs[0]") for entry in findings.inconsistent)


def test_every_offender_of_every_block_is_found() -> None:
    """One pass over the blocks finds them all."""
    bad = block({"window_length": 1, "odd": 1, "n_heads_in_group": 5}, {"moe": 1, "ffn_mult": 9})
    _, findings = read(bad, block(), bad)
    assert len(findings.unsupported) == 4
    assert len(findings.unmapped) == 2
    assert len(findings.inconsistent) == 4
    assert sum("block_configs[2]" in entry for entry in findings.inconsistent) == 2


@pytest.mark.parametrize("num_layers", [1, 3])
def test_the_number_of_blocks_is_the_number_of_layers(num_layers: int) -> None:
    """A missing or surplus block is not papered over."""
    _, findings = read(block(), block(), num_layers=num_layers)
    assert findings.inconsistent == [f"block_configs has 2 entries, num_hidden_layers={num_layers}"]


REAL = sorted(
    {
        (mult, config["hidden_size"])
        for path in VARIANTS.glob("Llama-3*.json")
        for config in [json.loads(path.read_text())]
        for one in config.get("block_configs", ())
        for mult in [one["ffn"]["ffn_mult"]]
        if mult is not None
    }
)


@pytest.mark.parametrize(("ffn_mult", "hidden_size"), REAL)
def test_real_multipliers_give_megatrons_width(ffn_mult: float, hidden_size: int) -> None:
    """Every `ffn_mult` of Super and Ultra gives the width that Megatron-Core itself computes."""
    from megatron.core.transformer.heterogeneous.heterogeneous_config import MLPConfig

    expected = MLPConfig.ffn_mult_to_intermediate_size(ffn_mult, hidden_size)
    assert ffn_mult_to_width(ffn_mult, hidden_size) == expected
    back = width_to_ffn_mult(expected, hidden_size)
    assert back is not None
    assert MLPConfig.ffn_mult_to_intermediate_size(back, hidden_size) == expected


@given(
    st.integers(1, 40_000_000).map(lambda n: n / 1_000_000),
    st.sampled_from((96, 3072, 4096, 8192, 16384)) | st.integers(1, 20000),
)
def test_any_multiplier_gives_megatrons_width(ffn_mult: float, hidden_size: int) -> None:
    """Multipliers of six digits, in lock-step with Megatron-Core's own function."""
    from megatron.core.transformer.heterogeneous.heterogeneous_config import MLPConfig

    expected = MLPConfig.ffn_mult_to_intermediate_size(ffn_mult, hidden_size)
    assert ffn_mult_to_width(ffn_mult, hidden_size) == expected


@pytest.mark.parametrize(
    ("ffn_mult", "hidden_size", "width"),
    [
        (2.625, 8192, 14336),
        (3.28125, 8192, 17920),
        (1.3125, 8192, 7168),
        (0.5, 8192, 2816),  # 2730.67, up to 11 x 256
        (39.0, 16384, 425984),
        (0.4875, 16384, 5376),
        (1.5000001, 4096, 4096),  # the seventh digit is dropped first: exactly 4096
        (1.5000004, 4096, 4096),
        (1.5006, 4096, 4352),
        (1.5000004, 8_192_000, 8_192_000),  # likewise; with it, 8192002.2 and so 8192256
        (1.4999996, 8_192_000, 8_192_000),  # rounds to 1.5, not to 8191997.8
    ],
)
def test_multipliers_round_as_published(ffn_mult: float, hidden_size: int, width: int) -> None:
    """Six digits, two thirds, down to an integer, up to a multiple of 256: worked out by hand."""
    assert ffn_mult_to_width(ffn_mult, hidden_size) == width


@given(st.integers(1, 2000).map(lambda n: 256 * n), st.integers(8, 20000))
def test_every_multiple_of_256_has_a_multiplier(width: int, hidden_size: int) -> None:
    """The released schema can say any width that is a multiple of 256, and says it exactly."""
    mult = width_to_ffn_mult(width, hidden_size)
    assert mult is not None
    assert round(mult, 6) == mult
    assert ffn_mult_to_width(mult, hidden_size) == width


@given(st.integers(1, 500_000).filter(lambda n: n % 256), st.integers(8, 20000))
def test_no_other_width_has_one(width: int, hidden_size: int) -> None:
    """A width the schema cannot say is not approximated."""
    assert width_to_ffn_mult(width, hidden_size) is None


def spec(*blocks: BlockSpec, kv_channels: int = 8) -> ModelSpec:
    """A DeciLM model of these blocks."""
    return ModelSpec(
        hidden_size=96,
        num_attention_heads=12,
        kv_channels=kv_channels,
        vocab_size=9,
        max_position_embeddings=64,
        layernorm_epsilon=1e-5,
        rope=RopeSpec(rotary_base=10000.0),
        share_embeddings_and_output_weights=False,
        params_dtype="float32",
        blocks=blocks,
        heterogeneous_block_specs=True,
    )


WIDE = BlockSpec(attention=groups(4), ffn=SwiGLU(ffn_hidden_size=512))
ODD = BlockSpec(attention=NoOp(), ffn=SwiGLU(ffn_hidden_size=100))
GONE = BlockSpec(attention=Linear(), ffn=NoOp())


def test_blocks_are_written_in_the_words_of_each_schema() -> None:
    """Heads per group or KV heads, multiplier or width, null where there is nothing."""
    found = {}
    for schema in BLOCK_SCHEMAS:
        blocks, used = write_blocks(spec(WIDE, GONE), schema=schema)
        assert used == schema
        keys = {"n_heads_in_group", "num_key_value_heads", "ffn_mult", "intermediate_size"}
        found[schema] = [
            {k: v for k, v in {**one["attention"], **one["ffn"]}.items() if k in keys}
            for one in blocks
        ]
        assert [one["attention"]["replace_with_linear"] for one in blocks] == [False, True]
        assert [one["attention"]["no_op"] for one in blocks] == [False, False]
        assert [one["ffn"]["no_op"] for one in blocks] == [False, True]
    assert found == {
        "released": [
            {"n_heads_in_group": 3, "ffn_mult": 8.0},
            {"n_heads_in_group": None, "ffn_mult": None},
        ],
        "2025-11": [
            {"n_heads_in_group": 3, "intermediate_size": 512},
            {"n_heads_in_group": None, "intermediate_size": None},
        ],
        "puzzletron": [
            {"num_key_value_heads": 4, "intermediate_size": 512},
            {"num_key_value_heads": None, "intermediate_size": None},
        ],
    }


def test_multipliers_are_written_as_json_floats() -> None:
    """llama.cpp wants `8.0`: a whole multiplier is still a float."""  # a name
    blocks, _ = write_blocks(spec(WIDE), schema="released")
    assert isinstance(blocks[0]["ffn"]["ffn_mult"], float)


def test_the_schema_is_chosen_by_what_it_can_say() -> None:
    """The released one where it can, the newer one where a width or the head size needs it."""
    assert write_blocks(spec(WIDE, GONE), schema=None)[1] == "released"
    assert write_blocks(spec(WIDE, ODD), schema=None)[1] == "puzzletron"
    assert write_blocks(spec(WIDE, kv_channels=10), schema=None)[1] == "puzzletron"


@pytest.mark.parametrize(
    ("model", "schema"),
    [
        (spec(ODD), "released"),
        (spec(WIDE, kv_channels=10), "released"),
        (spec(WIDE), "released-2"),
    ],
    ids=["width", "head size", "unknown"],
)
def test_a_schema_that_cannot_say_it_is_refused(model: ModelSpec, schema: str) -> None:
    """Asked for a schema that would lose the model, the writer refuses."""
    with pytest.raises(ConfigError):
        write_blocks(model, schema=schema)


def test_a_2025_11_configuration_must_state_a_head_dim_that_its_own_code_would_not_guess() -> None:
    """Its code means 128 by an absent head_dim, another reader hidden // heads: refused."""
    spec = spec_from_hf_config(
        {
            **json.loads((VARIANTS / "Llama-3_3-Nemotron-Super-49B-v1.json").read_text()),
            "num_attention_heads": 128,
            "block_configs": [
                {
                    "attention": {"n_heads_in_group": 16, "no_op": False},
                    "ffn": {"intermediate_size": 512, "no_op": False},
                }
            ]
            * 80,
            "head_dim": 64,
        }
    )
    assert spec.kv_channels == 64
    config = hf_config_from_spec(spec, schema="2025-11")
    del config["head_dim"]
    with pytest.raises(InconsistentConfigError) as caught:
        spec_from_hf_config(config)
    assert "head_dim is not given" in caught.value.where[0]
