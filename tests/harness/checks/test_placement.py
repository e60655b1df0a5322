"""The layout written by hand in the placement check is Megatron's, worked out on paper here."""

from __future__ import annotations

import pytest

from harness.checks.placement import expected_rows
from harness.oracle import Absent, Architecture, Attention, Mlp, Replaced, Rope

MODEL = Architecture(
    hidden_size=6,
    num_attention_heads=4,
    kv_channels=2,
    vocab_size=5,
    layernorm_epsilon=1e-5,
    tied=False,
    rope=Rope(10000.0, None),
    blocks=((Attention(2), Mlp(4)), (Replaced(), Absent())),
)
QKV = "decoder.layers.0.self_attention.linear_qkv.weight"


def short(name: str, rows: int, tp_rank: int, tp: int) -> list[str]:
    """Rows as `q0`, `gate1`, `-` for padding."""
    found, _ = expected_rows(name, (rows,), MODEL, tp_rank, tp)
    return ["-" if n is None else n.split(".")[-2].removesuffix("_proj") + str(r) for n, r in found]


def test_qkv_rows_run_group_by_group() -> None:
    """Two query heads, their key, their value; then the next group. Heads have two channels."""
    group_0 = ["q0", "q1", "q2", "q3", "k0", "k1", "v0", "v1"]
    group_1 = ["q4", "q5", "q6", "q7", "k2", "k3", "v2", "v3"]
    assert group_0 + group_1 == short(QKV, 16, 0, 1)
    assert group_1 == short(QKV, 8, 1, 2)
    # Fewer groups than ranks: rows are dealt out all the same and gathered in the forward pass.
    assert short(QKV, 4, 1, 4) == ["k0", "k1", "v0", "v1"]


def test_fc1_has_a_ranks_gate_rows_then_its_up_rows() -> None:
    """`glu` halves what the rank has, so each rank needs both halves of its own."""
    name = "decoder.layers.0.mlp.linear_fc1.weight"
    assert short(name, 4, 1, 2) == ["gate2", "gate3", "up2", "up3"]


@pytest.mark.parametrize(
    ("name", "columns"),
    [
        ("decoder.layers.0.mlp.linear_fc2.weight", range(2, 4)),
        ("decoder.layers.0.self_attention.linear_proj.weight", range(4, 8)),
    ],
)
def test_row_parallel_weights_are_cut_by_columns(name: str, columns: range) -> None:
    """All output rows, this rank's share of the inputs."""
    rows, found = expected_rows(name, (6,), MODEL, 1, 2)
    assert columns == found
    assert [row for _, row in rows] == [0, 1, 2, 3, 4, 5]


def test_the_vocabulary_is_padded_with_zero_rows_at_its_end() -> None:
    """Five tokens over two ranks of four rows."""
    name = "embedding.word_embeddings.weight"
    assert short(name, 4, 1, 2) == ["embed_tokens4", "-", "-", "-"]


def test_linear_replacements_are_cut_by_rows() -> None:
    """Their outputs are gathered."""
    assert short("decoder.layers.1.self_attention.weight", 3, 1, 2) == [
        "linear_attn3",
        "linear_attn4",
        "linear_attn5",
    ]


def test_a_parameter_that_the_block_does_not_have_can_have_no_right_row() -> None:
    """Weights for a no-op would otherwise go unnoticed."""
    rows, _ = expected_rows("decoder.layers.1.mlp.linear_fc1.weight", (4,), MODEL, 0, 1)
    assert rows == []
