"""The plan and the closed accounting: everything wrong with the tensors there, in one report."""

from __future__ import annotations

from dataclasses import replace

import pytest

from bridge.dtypes import dtype_named
from bridge.errors import AccountingError, DtypeMismatchError
from bridge.plan import Plan, account_for, fold_layers, ranges
from bridge.spec import (
    BlockSpec,
    GroupedQueryAttention,
    ModelSpec,
    NoOp,
    RopeSpec,
    SwiGLU,
)
from bridge.storage.source import TensorInfo

BLOCK = BlockSpec(
    attention=GroupedQueryAttention(num_query_groups=1), ffn=SwiGLU(ffn_hidden_size=5)
)
SPEC = ModelSpec(
    hidden_size=6,
    num_attention_heads=2,
    kv_channels=4,
    vocab_size=7,
    max_position_embeddings=64,
    layernorm_epsilon=1e-5,
    rope=RopeSpec(rotary_base=10000.0),
    share_embeddings_and_output_weights=False,
    params_dtype="bfloat16",
    blocks=(BLOCK,) * 12,
    heterogeneous_block_specs=False,
)
PLAN = Plan(SPEC, 8)


def info(shape: tuple[int, ...], dtype: str = "bfloat16") -> TensorInfo:
    """What a file says of a tensor."""
    return TensorInfo(shape=shape, dtype=dtype_named(dtype))


def healthy() -> dict[str, TensorInfo]:
    """The tensors of a good checkpoint."""
    return {name: info(shape) for name, shape in PLAN.hf_shapes.items()}


def complaint(found: dict[str, TensorInfo], spec: ModelSpec = SPEC) -> AccountingError:
    """The error that these tensors give."""
    plan = Plan(spec, 8)
    with pytest.raises(AccountingError) as error:
        account_for(plan.hf_shapes, found, where="model/")
    return error.value


def test_a_complete_checkpoint_passes_in_any_order() -> None:
    """Exactly the model's tensors: nothing to say."""
    account_for(PLAN.hf_shapes, dict(reversed(healthy().items())), where="model/")


def test_missing_unexpected_and_misshaped_are_one_error() -> None:
    """All three kinds are counted in the message and listed, layers folded."""
    found = healthy()
    for layer_idx in (0, 1, 2, 7):
        del found[f"model.layers.{layer_idx}.mlp.up_proj.weight"]
    del found["model.norm.weight"]
    for layer_idx in (3, 5):
        found[f"model.layers.{layer_idx}.self_attn.rotary_emb.inv_freq"] = info((2,))
    found["extra"] = info(())
    for layer_idx in range(12):
        found[f"model.layers.{layer_idx}.mlp.down_proj.weight"] = info((5, 6))
    found["model.embed_tokens.weight"] = info((8, 6))
    error = complaint(found)
    assert error.message == (
        "the tensors in model/ are not this model's: 5 missing, 3 unexpected, 13 mis-shaped"
    )
    assert error.where == (
        "missing: model.norm.weight",
        "missing: model.layers.{0-2,7}.mlp.up_proj.weight",
        "unexpected: extra",
        "unexpected: model.layers.{3,5}.self_attn.rotary_emb.inv_freq",
        "mis-shaped: model.embed_tokens.weight is (8, 6), expected (7, 6)",
        "mis-shaped: model.layers.{0-11}.mlp.down_proj.weight is (5, 6), expected (6, 5)",
    )


@pytest.mark.parametrize(
    ("shape", "expected"), [((), "()"), ((42,), "(42)"), ((7, 6, 1), "(7, 6, 1)")]
)
def test_a_shape_of_equal_volume_is_still_wrong(shape: tuple[int, ...], expected: str) -> None:
    """Flattened, scalar or with a dimension more: not the tensor that was meant."""
    error = complaint(healthy() | {"lm_head.weight": info(shape)})
    assert error.where == (f"mis-shaped: lm_head.weight is {expected}, expected (7, 6)",)


def test_nothing_there_is_everything_missing() -> None:
    """An empty source does not pass by having nothing wrong with it."""
    error = complaint({})
    assert error.message.endswith(f": {len(PLAN.hf_shapes)} missing")
    assert "missing: model.layers.{0-11}.mlp.gate_proj.weight" in error.where


def test_a_second_copy_of_a_tied_head_has_its_own_hint() -> None:
    """A tied configuration with an lm_head.weight is the commonest mix-up; say what to do."""
    error = complaint(healthy(), replace(SPEC, share_embeddings_and_output_weights=True))
    assert error.where == ("unexpected: lm_head.weight",)
    assert error.hint is not None
    assert "tie_word_embeddings" in error.hint
    untied = complaint(healthy() | {"extra": info(())})
    assert untied.hint is not None
    assert "tie_word_embeddings" not in untied.hint


def test_a_tensor_of_a_no_op_is_unexpected() -> None:
    """A sub-block that is not there has neither weights nor a norm."""
    blocks = (BLOCK, BlockSpec(attention=NoOp(), ffn=BLOCK.ffn), *SPEC.blocks[2:])
    error = complaint(healthy(), replace(SPEC, blocks=blocks, heterogeneous_block_specs=True))
    assert [place.removeprefix("unexpected: model.layers.1.") for place in error.where] == [
        "input_layernorm.weight",
        "self_attn.k_proj.weight",
        "self_attn.o_proj.weight",
        "self_attn.q_proj.weight",
        "self_attn.v_proj.weight",
    ]


@pytest.mark.parametrize(
    ("numbers", "text"),
    [
        ([], ""),
        ([4], "4"),
        ([0, 1], "0-1"),
        ([3, 1, 2, 2, 9, 7, 8, 5], "1-3,5,7-9"),
        (range(162), "0-161"),
    ],
)
def test_numbers_are_written_as_ranges(numbers: list[int], text: str) -> None:
    """Runs of numbers are folded, in order, each once."""
    assert ranges(numbers) == text


def test_names_are_folded_by_layer_only() -> None:
    """Only the layer's number is folded; other numbers, and names like it, stay apart."""
    names = [
        "model.layers.10.mlp.w1", "model.layers.9.mlp.w1", "model.layers.2.mlp.w1",
        "model.layers.3.mlp.w2", "model.layers.3x.mlp.w1", "layers.7", "plain",
        "a.layers.1.layers.4.b",
    ]  # fmt: skip
    assert fold_layers(names) == [
        "layers.7",
        "model.layers.3x.mlp.w1",
        "plain",
        "a.layers.1.layers.4.b",
        "model.layers.3.mlp.w2",
        "model.layers.{2,9-10}.mlp.w1",
    ]


def test_hostile_layer_numbers_are_left_as_they_are() -> None:
    """A name from a file may hold any number of digits, or a zero in front: it is not rewritten."""
    names = ["model.layers." + "9" * 5000 + ".w", "model.layers.01.w", "model.layers.1.w"]
    assert set(fold_layers(names)) == set(names)


def test_one_target_of_two_dtypes_is_refused_with_all_offenders() -> None:
    """Fused parameters hold one dtype; rounding one source to it would be silent."""
    found = healthy()
    found["model.layers.4.self_attn.k_proj.weight"] = info((4, 6), "float32")
    found["model.layers.9.mlp.up_proj.weight"] = info((5, 6), "float16")
    found["model.norm.weight"] = info((6,), "float32")
    with pytest.raises(DtypeMismatchError) as error:
        PLAN.target_dtypes(PLAN.hf_to_mcore, found, where="model/")
    assert error.value.message.startswith("2 ")
    assert "layers.4.self_attention.linear_qkv" in error.value.where[0]
    assert "k_proj.weight float32" in error.value.where[0]
    assert "layers.9.mlp.linear_fc1" in error.value.where[1]


def test_tensors_without_floating_point_numbers_are_refused_by_name() -> None:
    """Quantised weights are no parameters of this model, even where every one of them is int8."""
    found = {name: info(one.shape, "int8") for name, one in healthy().items()}
    with pytest.raises(DtypeMismatchError) as error:
        PLAN.target_dtypes(PLAN.hf_to_mcore, found, where="model/")
    assert len(error.value.where) == len(found)
    assert "model.norm.weight is int8" in error.value.where


def test_each_target_has_the_dtype_of_its_sources() -> None:
    """A float32 norm among bfloat16 weights stays float32, both ways."""
    found = healthy() | {"model.norm.weight": info((6,), "float32")}
    there = PLAN.target_dtypes(PLAN.hf_to_mcore, found, where="model/")
    assert there.keys() == PLAN.mcore_shapes.keys()
    odd = {name for name, dtype in there.items() if dtype.name != "bfloat16"}
    assert odd == {"decoder.final_layernorm.weight"}
    stored = {name: TensorInfo(shape=s, dtype=there[name]) for name, s in PLAN.mcore_shapes.items()}
    back = PLAN.target_dtypes(PLAN.mcore_to_hf, stored, where="model/")
    assert back == {name: one.dtype for name, one in found.items()}


def test_the_plan_is_one_line_a_tile() -> None:
    """The lines of a one-block model, written out: rows, groups, padding."""
    spec = replace(
        SPEC,
        blocks=(BlockSpec(attention=GroupedQueryAttention(num_query_groups=2), ffn=NoOp()),),
        heterogeneous_block_specs=True,
        share_embeddings_and_output_weights=True,
    )
    mcore, hf = "decoder.layers.0.self_attention.", "model.layers.0."
    assert list(Plan(spec, 8).lines()) == [
        "embedding.word_embeddings.weight[0:7, 0:6] <- model.embed_tokens.weight[0:7, 0:6]",
        "embedding.word_embeddings.weight[7:8, 0:6] <- zeros[0:1, 0:6]",
        f"{mcore}linear_qkv.layer_norm_weight[0:6] <- {hf}input_layernorm.weight[0:6]",
        f"{mcore}linear_qkv.weight[0:4, 0:6] <- {hf}self_attn.q_proj.weight[0:4, 0:6]",
        f"{mcore}linear_qkv.weight[4:8, 0:6] <- {hf}self_attn.k_proj.weight[0:4, 0:6]",
        f"{mcore}linear_qkv.weight[8:12, 0:6] <- {hf}self_attn.v_proj.weight[0:4, 0:6]",
        f"{mcore}linear_qkv.weight[12:16, 0:6] <- {hf}self_attn.q_proj.weight[4:8, 0:6]",
        f"{mcore}linear_qkv.weight[16:20, 0:6] <- {hf}self_attn.k_proj.weight[4:8, 0:6]",
        f"{mcore}linear_qkv.weight[20:24, 0:6] <- {hf}self_attn.v_proj.weight[4:8, 0:6]",
        f"{mcore}linear_proj.weight[0:6, 0:8] <- {hf}self_attn.o_proj.weight[0:6, 0:8]",
        "decoder.final_layernorm.weight[0:6] <- model.norm.weight[0:6]",
    ]


def test_equal_models_have_equal_digests_and_others_do_not() -> None:
    """A digest tells two conversions apart; what is no weight does not enter it."""
    assert Plan(SPEC, 8).digest() == PLAN.digest()
    assert Plan(replace(SPEC, layernorm_epsilon=1e-6), 8).digest() == PLAN.digest()
    assert Plan(replace(SPEC, blocks=SPEC.blocks[1:]), 8).digest() != PLAN.digest()
