"""The oracle against arithmetic done by hand; what it reads, and what it refuses."""

from __future__ import annotations

import copy
import math
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest

from harness import oracle
from harness.probes import probes
from harness.toys import TOYS
from harness.toys.configs import puzzle_blocks, released_blocks

Config = dict[str, Any]


def _tiny(attention: Mapping[str, Any], ffn: Mapping[str, Any]) -> oracle.Architecture:
    return oracle.read_config(
        {
            "hidden_size": 4,
            "num_attention_heads": 2,
            "num_hidden_layers": 1,
            "vocab_size": 3,
            "rms_norm_eps": 0.5,
            "rope_theta": 100.0,
            "block_configs": [{"attention": attention, "ffn": ffn}],
        }
    )


def _table(**tensors: list[Any]) -> oracle.Weight:
    named = {name.replace("__", "."): np.array(values, float) for name, values in tensors.items()}
    return lambda name: named[f"{name.removeprefix('model.layers.0.').removesuffix('.weight')}"]


def test_a_block_of_two_no_ops_changes_nothing_and_reads_nothing() -> None:
    """The residual passes through; not even a norm is asked for."""
    hidden = np.arange(8.0).reshape(1, 2, 4)
    model = _tiny({"no_op": True}, {"no_op": True})
    out = oracle.block(hidden, np.zeros((1, 2, 1)), _table(), model, 0)
    np.testing.assert_array_equal(out, hidden)


def test_linear_replacements_multiply_the_normed_stream_by_w_transposed() -> None:
    """Both replacements by hand: x / sqrt(mean(x^2) + eps) * norm, then rows of W, then add."""
    hidden = np.array([[[1.0, 1.0, 1.0, 2.0]]])  # mean square 1.75, and eps 0.5: divide by 1.5
    weight = _table(
        input_layernorm=[3, 3, 1.5, 0],
        self_attn__linear_attn=[[1, 0, 0, 0], [0, 0, 1, 0], [1, 1, 0, 9], [0, 0, 0, 0]],
        post_attention_layernorm=[1, 1, 1, 1],
        mlp__linear_mlp=[[0, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0], [1, 0, 0, 0]],
    )
    model = _tiny({"replace_with_linear": True}, {"replace_with_linear": True})
    seen = oracle.block(hidden, np.zeros((1, 1, 1)), weight, model, 0)[0, 0]
    # normed = (2, 2, 1, 0); W normed = (2, 1, 4, 0); the stream is then (3, 2, 5, 2)
    last = 2 + 3 / math.sqrt((9 + 4 + 25 + 4) / 4 + 0.5)
    np.testing.assert_allclose(seen, [3, 2, 5, last], rtol=1e-15)


def test_attention_of_two_heads_on_one_group_equals_scalar_arithmetic() -> None:
    """Three tokens, two query heads, one key head: every number recomputed with scalars."""
    rng = np.random.default_rng(5)
    q, o = rng.normal(size=(4, 4)), rng.normal(size=(4, 4))
    k, v = rng.normal(size=(2, 4)), rng.normal(size=(2, 4))
    x = rng.normal(size=(3, 4))
    positions = [0, 3, 70]

    def turn(pair: list[float], position: int) -> list[float]:
        c, s = math.cos(position), math.sin(position)  # one pair of channels: inv_freq is 1
        return [pair[0] * c - pair[1] * s, pair[1] * c + pair[0] * s]

    def times(matrix: np.ndarray[Any, Any], row: int, token: int) -> float:
        return sum(float(matrix[row, i] * x[token, i]) for i in range(4))

    expected = np.zeros((3, 4))
    for token in range(3):
        joined = []
        for head in range(2):
            query = turn([times(q, 2 * head + i, token) for i in range(2)], positions[token])
            scores = []
            for past in range(token + 1):
                key = turn([times(k, i, past) for i in range(2)], positions[past])
                scores.append(math.exp((query[0] * key[0] + query[1] * key[1]) / math.sqrt(2)))
            for i in range(2):
                mixed = sum(score * times(v, i, past) for past, score in enumerate(scores))
                joined.append(mixed / sum(scores))
        expected[token] = [sum(o[row, i] * joined[i] for i in range(4)) for row in range(4)]

    model = _tiny({"n_heads_in_group": 2}, {"no_op": True})
    weight = {
        "a.q_proj.weight": q,
        "a.k_proj.weight": k,
        "a.v_proj.weight": v,
        "a.o_proj.weight": o,
    }
    found = oracle.attention(
        x[None],
        oracle.rotary_angles(model, np.array([positions])),
        weight.__getitem__,
        prefix="a",
        model=model,
        groups=1,
    )
    np.testing.assert_allclose(found[0], expected, rtol=1e-13)


def test_mlp_gates_with_silu_even_where_exp_overflows() -> None:
    """down(silu(gate) * up) with gate 1, -1000 and 800, by hand and without a warning."""
    x = np.array([[[1.0, 0.0]]])
    weight = {
        "m.gate_proj.weight": np.array([[1.0, 0], [-1000, 0], [800, 0]]),
        "m.up_proj.weight": np.array([[2.0, 0], [3, 0], [1, 0]]),
        "m.down_proj.weight": np.array([[1.0, 1, 0], [0, 0, 1]]),
    }
    found = oracle.mlp(x, weight.__getitem__, "m", 3)
    np.testing.assert_allclose(found[0, 0], [2 / (1 + math.exp(-1)), 800.0], rtol=1e-15)


# --------------------------------------------------------------------------------------
# Reading configurations, weights and inputs
# --------------------------------------------------------------------------------------


def test_both_block_schemas_of_the_same_model_read_alike() -> None:
    """Blocks said with multipliers and with widths give one architecture."""
    toy = TOYS["super-49b-v1"]
    older = toy.config | {
        "block_configs": released_blocks(toy.config, [(8, 5.25), (None, 2.625), ("linear", None)]),
        "num_hidden_layers": 3,
    }
    newer = older | {"block_configs": puzzle_blocks([(2, 512), (None, 256), ("linear", None)])}
    assert oracle.read_config(older) == oracle.read_config(newer)


def test_both_rope_styles_of_the_same_model_read_alike() -> None:
    """`rope_scaling` with `rope_theta`, and `rope_parameters`, mean the same."""
    older = TOYS["nano-4b"].config
    newer = {k: v for k, v in older.items() if not k.startswith("rope_")}
    newer["rope_parameters"] = older["rope_scaling"] | {"rope_theta": older["rope_theta"]}
    assert oracle.read_config(older) == oracle.read_config(newer)
    assert oracle.read_config(older).rope == oracle.Rope(500000.0, (8.0, 1.0, 4.0, 8192))


@pytest.mark.parametrize(
    ("ffn_mult", "width"),
    [(4.0, 256), (4.015625, 512), (4.0156249, 512), (4.0156244, 256), (39, 2560)],
)
def test_ffn_mult_is_rounded_then_truncated_then_padded(ffn_mult: float, width: int) -> None:
    """64 x ffn_mult at hidden 96: six digits, then an integer, then the next multiple of 256.

    4.0156249 is 4.015625 in six digits, so 257 and not 256; 4.0156244 stays below.
    """
    config = TOYS["51b"].config
    blocks = released_blocks(config, [(None, ffn_mult)])
    model = oracle.read_config(config | {"block_configs": blocks, "num_hidden_layers": 1})
    assert model.blocks == ((oracle.Absent(), oracle.Mlp(width)),)


@pytest.mark.parametrize(
    ("part", "change"),
    [
        ("", {"hidden_act": "gelu"}),
        ("", {"attention_bias": True}),
        ("", {"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}),
        ("", {"num_hidden_layers": 9}),
        ("attention", {"window_length": 4096}),
        ("attention", {"mamba": {"state_dim": 16}}),
        ("attention", {"replace_with_linear": True, "no_op": True}),
        ("ffn", {"moe": {"num_local_experts": 8}}),
        ("ffn", {"gated": False}),
    ],
)
def test_what_the_forward_pass_does_not_do_is_refused(part: str, change: Config) -> None:
    """A field that asks for something else is an error, never ignored."""
    config = copy.deepcopy(TOYS["puzzle"].config)
    (config["block_configs"][0][part] if part else config).update(change)
    with pytest.raises(oracle.NotUnderstoodError):
        oracle.read_config(config)


class _OnlyRows:
    """A weight that can be sliced by rows and nothing else, and counts the largest slice."""

    largest = 0

    def __init__(self, values: np.ndarray[Any, Any]) -> None:
        self._values, self.shape = values, values.shape

    def __getitem__(self, rows: slice) -> np.ndarray[Any, Any]:
        found = self._values[rows]
        _OnlyRows.largest = max(_OnlyRows.largest, found.size)
        return found


def test_weights_are_read_by_rows_a_few_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """A lazy source suffices, no more than the limit is asked for at once, and nothing changes."""
    toy = TOYS["ultra-253b"]
    probe = probes(toy.config["vocab_size"])[0]
    whole = oracle.forward(toy.config, toy.weight(), probe.input_ids, probe.position_ids)
    lookup = toy.weight()
    monkeypatch.setattr(oracle, "_ELEMENTS_AT_ONCE", 10_000)
    found = oracle.forward(
        toy.config, lambda name: _OnlyRows(lookup(name)[:]), probe.input_ids, probe.position_ids
    )
    assert _OnlyRows.largest <= 10_000
    np.testing.assert_allclose(found, whole, rtol=1e-10, atol=1e-12)


def test_capture_sees_the_stream_after_every_block() -> None:
    """The embedding, then each block; a no-op block hands on what it got."""
    toy = TOYS["ultra-253b"]
    probe = probes(toy.config["vocab_size"])[0]
    seen: dict[int, oracle.Array] = {}
    logits = oracle.forward(
        toy.config, toy.weight(), probe.input_ids, probe.position_ids, capture=seen.__setitem__
    )
    assert list(seen) == list(range(-1, 8))
    np.testing.assert_array_equal(seen[1], seen[3])
    assert (seen[-1] != seen[0]).any()
    model = oracle.read_config(toy.config)
    np.testing.assert_array_equal(logits, oracle.head(seen[7], toy.weight(), model))


def test_batched_positions_are_each_row_s_own() -> None:
    """(batch, seq) positions give what each row gives alone."""
    toy = TOYS["nano-4b"]
    ids = np.array([[1, 2, 3], [4, 5, 6]])
    positions = np.array([[0, 1, 2], [0, 500, 90_000]])
    both = oracle.forward(toy.config, toy.weight(), ids, positions)
    for row in range(2):
        alone = oracle.forward(toy.config, toy.weight(), ids[row : row + 1], positions[row])
        np.testing.assert_allclose(both[row], alone[0], rtol=1e-10, atol=1e-12)


def test_later_tokens_do_not_reach_earlier_ones() -> None:
    """Attention is causal: changing the last token leaves every other position's logits alone."""
    toy = TOYS["nano-4b"]
    first = oracle.forward(toy.config, toy.weight(), np.array([[1, 2, 3]]), np.arange(3))
    second = oracle.forward(toy.config, toy.weight(), np.array([[1, 2, 9]]), np.arange(3))
    np.testing.assert_allclose(first[:, :2], second[:, :2], rtol=1e-12)
    assert (first[:, 2] != second[:, 2]).any()


@pytest.mark.parametrize(
    ("ids", "positions", "message"),
    [
        (np.zeros((1, 0), int), np.zeros(0, int), "not empty"),
        (np.array([1, 2]), np.arange(2), "batch, seq"),
        (np.array([[1, 515]]), np.arange(2), "vocabulary"),
        (np.array([[1, -1]]), np.arange(2), "vocabulary"),
        (np.array([[1, 2]]), np.arange(3), "position_ids"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(
    ids: oracle.Integers, positions: oracle.Integers, message: str
) -> None:
    """Wrong shapes and ids outside the vocabulary are errors, never broadcast or wrapped."""
    toy = TOYS["nano-4b"]
    with pytest.raises(ValueError, match=message):
        oracle.forward(toy.config, toy.weight(), ids, positions)


def test_weights_of_another_shape_or_kind_are_refused() -> None:
    """A transposed weight, and bfloat16 bit patterns passed off as numbers, are errors."""
    toy = TOYS["nano-4b"]
    lookup = toy.weight()

    def transposed(name: str) -> oracle.Rows:
        values = lookup(name)[:]
        return values.T if "down_proj" in name else values

    def bits(name: str) -> oracle.Rows:
        return toy.words(name, seed=0, dtype="bfloat16")

    ids, positions = np.array([[1, 2]]), np.arange(2)
    with pytest.raises(ValueError, match="shape"):
        oracle.forward(toy.config, transposed, ids, positions)
    with pytest.raises(ValueError, match="uint16"):
        oracle.forward(toy.config, bits, ids, positions)


def test_importing_the_oracle_loads_nothing_that_it_judges() -> None:
    """A fresh interpreter that imports the oracle has no bridge, torch or transformers loaded."""
    code = (
        "import sys, harness.oracle\n"
        "loaded = {name.split('.')[0] for name in sys.modules}\n"
        "print(loaded & {'bridge', 'torch', 'transformers', 'megatron'})"
    )
    done = subprocess.run(  # noqa: S603  # our own interpreter, fixed code
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.strip() == "set()"
