"""The oracle's attention on long sequences: band by band, and yet the plain formula."""

from __future__ import annotations

import threading
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any
from unittest import mock

import numpy as np
import pytest

from harness import oracle

HEADS, GROUPS, CHANNELS, HIDDEN = 4, 2, 6, 16
MODEL = oracle.read_config(
    {
        "hidden_size": HIDDEN,
        "num_attention_heads": HEADS,
        "num_key_value_heads": GROUPS,
        "head_dim": CHANNELS,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "vocab_size": 3,
        "rms_norm_eps": 1e-5,
    }
)

Weights = dict[str, np.ndarray[Any, Any]]


def weights(*, scale: float = 1.0) -> Weights:
    """Random projections; with a larger scale, scores are far apart."""
    rng = np.random.default_rng(11)
    rows = {"q_proj": HEADS, "k_proj": GROUPS, "v_proj": GROUPS}
    found = {
        f"a.{name}.weight": rng.normal(size=(count * CHANNELS, HIDDEN)) / np.sqrt(HIDDEN)
        for name, count in rows.items()
    }
    found["a.q_proj.weight"] *= scale
    found["a.o_proj.weight"] = rng.normal(size=(HIDDEN, HEADS * CHANNELS))
    return found


def states(length: int, *, batch: int = 1) -> oracle.Array:
    """Random normed states."""
    return np.random.default_rng(length).normal(size=(batch, length, HIDDEN))


def angles(length: int) -> oracle.Array:
    """Of positions 0, 1, 2, ..."""
    return oracle.rotary_angles(MODEL, np.arange(length)[None])


def attention(x: oracle.Array, tensors: Weights) -> oracle.Array:
    """As the oracle computes it."""
    turn = angles(x.shape[1])
    return oracle.attention(x, turn, tensors.__getitem__, prefix="a", model=MODEL, groups=GROUPS)


def plain_attention(x: oracle.Array, tensors: Weights) -> oracle.Array:
    """The formula, all scores at once: softmax(q k^T / sqrt(channels) + mask) v."""
    batch, length, _ = x.shape
    turn = angles(length)[:, None]

    def project(name: str, count: int) -> oracle.Array:
        shape = (count * CHANNELS, HIDDEN)
        rows = oracle.linear(x, tensors.__getitem__, f"a.{name}.weight", shape)
        return rows.reshape(batch, length, count, CHANNELS).swapaxes(1, 2)

    query, key = (
        oracle.rotate(project(name, count), turn)
        for name, count in (("q_proj", HEADS), ("k_proj", GROUPS))
    )
    value = project("v_proj", GROUPS)
    mixed = np.empty_like(query)
    future = np.triu(np.ones((length, length), dtype=bool), k=1)
    for head in range(HEADS):
        group = head // (HEADS // GROUPS)
        scores = query[:, head] @ key[:, group].swapaxes(1, 2) / np.sqrt(CHANNELS)
        scores[:, future] = -np.inf
        scores = np.exp(scores - scores.max(axis=-1, keepdims=True))
        mixed[:, head] = scores @ value[:, group] / scores.sum(axis=-1, keepdims=True)
    joined = mixed.swapaxes(1, 2).reshape(batch, length, -1)
    shape = (HIDDEN, HEADS * CHANNELS)
    return oracle.linear(joined, tensors.__getitem__, "a.o_proj.weight", shape)


def ulp(found: oracle.Array, expected: oracle.Array) -> float:
    """The largest difference, in ulp of the expected values' root mean square."""
    unit = np.sqrt(np.mean(np.square(expected))) * 2.0**-52
    return float(np.abs(found - expected).max() / unit)


@pytest.mark.parametrize("length", [1, 2, 24, 48, 511, 512])
def test_sequences_of_one_band_are_computed_bit_for_bit_as_the_formula(length: int) -> None:
    """Goldens pin such logits, so not even the order of a sum may differ."""
    x = states(length, batch=2)
    np.testing.assert_array_equal(attention(x, weights()), plain_attention(x, weights()))


@pytest.mark.parametrize("length", [513, 1024, 1300, 2048])
def test_longer_sequences_agree_with_the_formula_to_rounding(length: int) -> None:
    """At the edges of bands too, and in each of several sequences. Measured: 7 to 14 ulp."""
    x = states(length, batch=2)
    assert ulp(attention(x, weights()), plain_attention(x, weights())) < 100


def test_no_token_sees_one_after_it() -> None:
    """Other tokens from 1,100 on change nothing before it, bit for bit, and everything after."""
    x, other = states(1300), states(1300)
    other[:, 1100:] += 1
    before, after = attention(x, weights()), attention(other, weights())
    np.testing.assert_array_equal(before[:, :1100], after[:, :1100])
    assert (before[:, 1100:] != after[:, 1100:]).any(axis=-1).all()


@pytest.mark.parametrize("backwards", [False, True])
def test_scores_that_grow_or_shrink_along_the_sequence_are_weighed_alike(backwards: bool) -> None:  # noqa: FBT001
    """Softmax is of all keys: the largest score may be that of the first ones or of the last."""
    length = 1300
    growth = np.linspace(0.1, 6, length)[:, None]
    x = states(length) * (growth[::-1] if backwards else growth)
    tensors = weights(scale=8)
    expected = plain_attention(x, tensors)
    assert np.isfinite(expected).all()
    assert ulp(attention(x, tensors), expected) < 100


def test_threads_change_no_bit() -> None:
    """One thread and eight give the same sums."""
    x = states(2048)
    found = []
    for count in (1, 8):
        pool = partial(ThreadPoolExecutor, max_workers=count)
        with mock.patch.object(oracle, "ThreadPoolExecutor", pool):
            found.append(attention(x, weights()))
    np.testing.assert_array_equal(found[0], found[1])


def test_memory_does_not_grow_with_the_square_of_the_length() -> None:
    """8,192 tokens have 512 MiB of scores a head; they are computed in a few."""
    x = states(8192)
    pool = partial(ThreadPoolExecutor, max_workers=1)
    with mock.patch.object(oracle, "ThreadPoolExecutor", pool):
        tracemalloc.start()
        try:
            attention(x, weights())
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
    assert peak < 32 << 20


def test_threads_share_the_rows_and_heads_and_change_no_bit() -> None:
    """Of a matrix of many pieces, and of attention of more than one band."""
    length = 600
    x, tensors = states(length), weights()
    tall = np.random.default_rng(1).normal(size=((1 << 18) + 5, HIDDEN))
    seen: set[str] = set()

    class Rows:
        """The matrix; it remembers who asked."""

        shape = tall.shape

        def __getitem__(self, rows: slice) -> oracle.Array:
            seen.add(threading.current_thread().name)
            return tall[rows]

    def computed() -> tuple[oracle.Array, oracle.Array]:
        some = oracle.linear(x[:, :3], lambda _: Rows(), "w", tall.shape)
        return some, attention(x, tensors)

    alone = computed()
    assert seen == {threading.current_thread().name}
    seen.clear()
    with oracle.threads(3):
        shared = computed()
    assert seen
    assert threading.current_thread().name not in seen
    for one, other in zip(alone, shared, strict=True):
        np.testing.assert_array_equal(one, other)
    seen.clear()
    computed()
    assert seen == {threading.current_thread().name}
