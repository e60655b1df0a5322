"""Toys keep what they stand for, cannot be built without it, and cover every kind of block."""

from __future__ import annotations

import dataclasses
import json
import math

import numpy as np
import pytest

from bridge.errors import BridgeError, ConfigError, InconsistentConfigError
from harness.oracle import read_config
from harness.toys import CONTEXT_TOY, TOYS, VARIANT_TOYS, Toy, hf_tensors, toy_named
from harness.toys.configs import published_config, released_blocks, shrink

PUBLISHED = {
    "Llama-3.1-Nemotron-Nano-4B-v1.1": ("nano-4b", 291, 4_512_746_496),
    "Llama-3.1-Nemotron-Nano-8B-v1": ("nano-8b", 291, 8_030_261_248),
    "Llama-3.1-Nemotron-70B-Instruct-HF": ("70b", 723, 70_553_706_496),
    "Llama-3_3-Nemotron-Super-49B-v1": ("super-49b-v1", 568, 49_867_145_216),
    "Llama-3_3-Nemotron-Super-49B-v1_5": ("super-49b-v1_5", 568, 49_867_145_216),
    "Llama-3_1-Nemotron-Ultra-253B-v1": ("ultra-253b", 647, 253_401_268_224),
}


def test_there_is_a_toy_for_each_published_variant() -> None:
    """Six with a configuration at hand, and the stand-in for the 51B, which says that it is one."""
    assert {name for name, _, _ in PUBLISHED.values()} | {"51b"} == set(VARIANT_TOYS)
    assert "synthetic stand-in" in TOYS["51b"].stands_for


@pytest.mark.parametrize("variant", PUBLISHED)
def test_tensors_of_the_real_configurations_number_what_was_published(variant: str) -> None:
    """Tensor and parameter counts at real dimensions are those of the published checkpoints."""
    _, tensors, parameters = PUBLISHED[variant]
    found = hf_tensors(read_config(published_config(variant)))
    assert tensors == len(found)
    assert parameters == sum(math.prod(shape) for shape in found.values())


@pytest.mark.parametrize("variant", PUBLISHED)
def test_a_toy_has_exactly_the_fields_of_its_original(variant: str) -> None:
    """Same keys at the top and in every block, and the same nulls at the top."""
    real, toy = published_config(variant), TOYS[PUBLISHED[variant][0]].config
    assert list(real) == list(toy)
    assert [k for k in real if real[k] is None] == [k for k in toy if toy[k] is None]
    for entry in toy.get("block_configs", []):
        for part in ("attention", "ffn"):
            assert set(real["block_configs"][0][part]) == set(entry[part])
    assert json.loads(json.dumps(toy)) == toy


def test_the_two_supers_differ_in_the_rope_factor_alone() -> None:
    """As their originals do: a mix-up shows at long positions only."""
    first, second = (TOYS[name].architecture for name in ("super-49b-v1", "super-49b-v1_5"))
    assert first.rope.llama3 is not None
    assert second.rope.llama3 is not None
    assert (first.rope.llama3[0], second.rope.llama3[0]) == (8, 16)
    assert first.rope.llama3[1:] == second.rope.llama3[1:]
    assert first == dataclasses.replace(second, rope=first.rope)


def test_the_toys_cover_every_pair_of_sub_block_kinds() -> None:
    """Three kinds of attention times three of feed-forward, all nine."""
    seen = {
        (type(attention).__name__, type(ffn).__name__)
        for toy in TOYS.values()
        for attention, ffn in toy.architecture.blocks
    }
    kinds = ("Replaced", "Absent")
    assert seen == {(a, f) for a in ("Attention", *kinds) for f in ("Mlp", *kinds)}


@pytest.mark.parametrize(
    ("name", "change", "lost"),
    [
        ("nano-4b", {"head_dim": 12}, "heads x head_dim is not hidden_size"),
        ("nano-4b", {"num_key_value_heads": 4}, "num_query_groups is 2: below TP=4"),
        ("nano-4b", {"intermediate_size": 96}, "no two dimensions coincide"),
        ("nano-4b", {"intermediate_size": 290}, "TP 1, 2 and 4 divide heads, groups and widths"),
        ("nano-4b", {"vocab_size": 514}, "the vocabulary is odd"),
        ("nano-4b", {"vocab_size": 129}, "TP 1, 2 and 4 pad it differently"),
        ("nano-4b", {"rope_scaling": None}, "llama3 RoPE reaches all three bands"),
        ("nano-4b", {"num_hidden_layers": 5}, "6 layers or more: uneven PP=2, VPP=2 over PP=2"),
        ("tied", {"tie_word_embeddings": False}, "tied embeddings"),
    ],
)
def test_a_toy_that_lost_a_property_cannot_be_built(
    name: str, change: dict[str, object], lost: str
) -> None:
    """The lost property is named in the error."""
    toy = TOYS[name]
    with pytest.raises(InconsistentConfigError) as caught:
        dataclasses.replace(toy, config=toy.config | change)
    assert lost in caught.value.where


@pytest.mark.parametrize(
    ("name", "parts", "lost"),
    [
        ("ultra-253b", (16, 1.95), "block 0 has no attention"),
        ("super-49b-v1", (None, 5.25), "block 0 has attention"),
        ("super-49b-v1", (8, None), "no FFN no-op"),
        ("ultra-253b", (16, None), "an FFN no-op always comes with an attention no-op"),
    ],
)
def test_a_toy_whose_block_0_changed_cannot_be_built(
    name: str, parts: tuple[float | None, float | None], lost: str
) -> None:
    """Properties of block 0 are about block 0."""
    toy = TOYS[name]
    blocks = released_blocks(toy.config, [parts]) + toy.config["block_configs"][1:]
    with pytest.raises(InconsistentConfigError) as caught:
        dataclasses.replace(toy, config=toy.config | {"block_configs": blocks})
    assert lost in caught.value.where


def test_every_toy_claims_something_of_its_own() -> None:
    """A toy without a property of its own stands for nothing."""
    assert all(toy.claims for toy in TOYS.values())
    assert len({toy.claims for toy in TOYS.values()}) == len(TOYS)


def test_the_toy_for_long_runs_has_its_originals_context_and_is_run_by_name_only() -> None:
    """Every position up to 131,071; what every check runs on stays as small as it is."""
    real = published_config("Llama-3_3-Nemotron-Super-49B-v1_5")
    assert list(real) == list(CONTEXT_TOY.config)
    assert CONTEXT_TOY.config["max_position_embeddings"] == 131_072
    assert CONTEXT_TOY.config["rope_scaling"] == real["rope_scaling"]
    assert toy_named("toy:context") is CONTEXT_TOY
    assert CONTEXT_TOY not in TOYS.values()
    assert CONTEXT_TOY.claims not in {toy.claims for toy in TOYS.values()}


@pytest.mark.parametrize(
    ("change", "lost"),
    [
        ({"num_attention_heads": 8}, "head_dim is 64"),
        ({"rope_theta": 10_000.0}, "the slowest pair of channels turns by less than 1 rad"),
    ],
)
def test_the_toy_for_long_runs_cannot_lose_its_properties(
    change: dict[str, object], lost: str
) -> None:
    """Other heads, or a RoPE that turns every pair."""
    with pytest.raises(InconsistentConfigError) as caught:
        dataclasses.replace(CONTEXT_TOY, config=CONTEXT_TOY.config | change)
    assert any(claim.startswith(lost) for claim in caught.value.where)


@pytest.mark.parametrize(
    ("first", "second", "lost"),
    [
        ((2, 3.0), (2, 3.0), "two blocks have attention"),
        ((2, 3.0), (2, 3.0), "a block between them has none"),
        ((4, 3.0), (None, 3.0), "2 query heads share a key head"),
    ],
)
def test_the_toy_for_long_runs_keeps_its_blocks(
    first: tuple[float | None, float], second: tuple[float | None, float], lost: str
) -> None:
    """A third attention would make the oracle half as slow again."""
    blocks = [
        *released_blocks(CONTEXT_TOY.config, [first, second]),
        *CONTEXT_TOY.config["block_configs"][2:],
    ]
    with pytest.raises(InconsistentConfigError) as caught:
        dataclasses.replace(CONTEXT_TOY, config=CONTEXT_TOY.config | {"block_configs": blocks})
    assert any(claim.startswith(lost) for claim in caught.value.where)


def test_toys_are_found_by_name_with_or_without_the_prefix() -> None:
    """`toy:70b` and `70b` are one; an unknown name lists the known ones."""
    assert toy_named("toy:70b") is toy_named("70b")
    with pytest.raises(ConfigError, match="nope") as caught:
        toy_named("nope")
    assert "ultra-253b" in (caught.value.hint or "")


def test_shrinking_cannot_add_a_field() -> None:
    """A change of a field that the original lacks is an error."""
    with pytest.raises(BridgeError, match="exactly the fields"):
        shrink({"vocab_size": 9}, vocab_size=515, head_dim=8)


def _scale(toy: Toy, name: str) -> tuple[float, float]:
    values = dict(toy.weights(seed=3))[name].astype(np.float64)
    return float(values.mean()), float(values.std())


def test_weights_are_large_enough_for_mistakes_to_show() -> None:
    """Matrices have std 1 / sqrt(fan_in), embeddings 1, norms vary around one."""
    toy = TOYS["ultra-253b"]
    assert _scale(toy, "model.layers.4.mlp.down_proj.weight")[1] == pytest.approx(
        1 / math.sqrt(6656), rel=0.01
    )
    assert _scale(toy, "model.embed_tokens.weight")[1] == pytest.approx(1.0, rel=0.01)
    mean, std = _scale(toy, "model.norm.weight")
    assert mean == pytest.approx(1.0, abs=0.06)
    assert std == pytest.approx(0.2, rel=0.25)


def test_bfloat16_weights_are_the_float32_ones_rounded() -> None:
    """Within half a step of bfloat16 each, and not equal throughout."""
    toy = TOYS["nano-4b"]
    for (name, exact), (other, rounded) in zip(
        toy.weights(), toy.weights(dtype="bfloat16"), strict=True
    ):
        assert name == other
        assert (np.abs(exact - rounded) <= np.abs(exact) * 2**-8).all()
        assert (exact != rounded).any()
        assert not (rounded.view(np.uint32) & 0xFFFF).any()


def test_seeds_give_other_weights() -> None:
    """Every tensor of two seeds differs, and one seed repeats itself."""
    toy = TOYS["nano-4b"]
    for (_, one), (_, same), (_, other) in zip(
        toy.weights(1), toy.weights(1), toy.weights(2), strict=True
    ):
        np.testing.assert_array_equal(one, same)
        assert (one != other).any()


def test_every_toy_is_one_that_transformers_accepts() -> None:
    """LlamaConfig refuses a hidden_size that the head count does not divide, head_dim or not."""
    for toy in TOYS.values():
        assert toy.architecture.hidden_size % toy.architecture.num_attention_heads == 0
