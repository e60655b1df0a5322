"""Probes: positions that reach the end of the context, ids that reach both ends of the table."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest

from bridge.errors import ConfigError
from harness.probes import (
    Probe,
    long_probe,
    probe_named,
    probes,
    random_ids,
    short_probe,
    spread_positions,
)


def test_the_long_probe_spreads_48_positions_over_the_whole_context() -> None:
    """From 0 to 131,071, increasing, every factor of two reached, with neighbours at the edges."""
    positions = long_probe(515).position_ids.tolist()
    assert len(positions) == 48
    assert positions == sorted(set(positions))
    assert positions[:4] == [0, 1, 2, 3]
    assert positions[-3:] == [131_069, 131_070, 131_071]
    for power in range(1, 17):
        assert any(2**power <= position < 2 ** (power + 1) for position in positions)
    assert {8191, 8192, 8193, 65_535, 65_536, 65_537} <= set(positions)


@pytest.mark.parametrize("limit", [1, 2, 5, 47, 48, 49, 64, 512, 4096, 131_072, 1 << 20])
def test_positions_fit_any_context(limit: int) -> None:
    """As many as asked for or as exist, all within the context, both ends included."""
    positions = spread_positions(limit, 48)
    assert len(positions) == min(48, limit)
    assert (np.diff(positions) > 0).all()
    assert (positions[0], positions[-1]) == (0, limit - 1)
    assert len(spread_positions(limit, 3)) == min(3, limit)


def test_the_short_probe_counts_from_zero() -> None:
    """Two sequences at positions 0 to 23."""
    probe = short_probe(515)
    assert probe.input_ids.shape == (2, 24)
    assert probe.position_ids.tolist() == list(range(24))


@pytest.mark.parametrize("vocab_size", [2, 515, 128_256])
def test_ids_are_in_the_vocabulary_and_reach_its_ends(vocab_size: int) -> None:
    """The first and the last token occur: wrong vocabulary padding shows there."""
    for probe in probes(vocab_size):
        assert probe.input_ids.dtype == np.int64
        assert probe.input_ids.min() == 0
        assert probe.input_ids.max() == vocab_size - 1


def test_seeds_and_names_give_other_ids() -> None:
    """Two seeds differ, and so do the two probes of one seed."""
    first = random_ids(515, (1, 24), seed=0, name="short")
    assert (first != random_ids(515, (1, 24), seed=1, name="short")).any()
    assert (first != random_ids(515, (1, 24), seed=0, name="long")).any()


def test_the_probes_are_pinned() -> None:
    """Goldens depend on every id and position: they may not change."""
    digest = hashlib.sha256()
    for probe in probes(515):
        digest.update(probe.input_ids.astype("<i8").tobytes())
        digest.update(probe.position_ids.astype("<i8").tobytes())
    assert digest.hexdigest() == "5937f965f1c50ec63c0d3369db0baba9b42f73c07875dd3127d6f8769dd60ae1"


@pytest.mark.parametrize(("name", "length"), [("context-32k", 32_768), ("context-128k", 131_072)])
def test_a_context_probe_counts_through_the_whole_context(name: str, length: int) -> None:
    """One sequence of so many tokens, no position left out, every token of the vocabulary there."""
    probe = probe_named(name, 531)
    assert probe.name == name
    assert probe.input_ids.dtype == np.int64
    assert probe.input_ids.shape == (1, length)
    assert probe.position_ids.tolist() == list(range(length))
    assert set(probe.input_ids[0].tolist()) == set(range(531))


@pytest.mark.parametrize("vocab_size", [2, 31, 531, 128_256])
def test_each_stretch_of_a_context_has_tokens_of_its_own(vocab_size: int) -> None:
    """So a mean over some of them is another than over all; both ends of the vocabulary occur."""
    ids = probe_named("context-32k", vocab_size).input_ids[0]
    assert (ids[0], ids[-1]) == (ids.min(), ids.max()) == (0, vocab_size - 1)
    parts = [set(part.tolist()) for part in np.split(ids, 32)]
    assert len(set.union(*parts)) > 0.9 * min(vocab_size, 16_384)
    if vocab_size >= 32:
        assert sum(map(len, parts)) == len(set.union(*parts))
        assert all(len(part) > 0.5 * min(vocab_size // 32, 1024) for part in parts)
    first, other = (probe_named(name, 531).input_ids[0] for name in ("context-32k", "context-128k"))
    assert (first[:1024] != other[:1024]).mean() > 0.9


def test_a_context_probe_longer_than_the_context_is_refused() -> None:
    """A model of 32,768 positions runs the one and not the other; unknown names list the known."""
    assert (
        probe_named("context-32k", 531, max_position_embeddings=32_768).position_ids[-1] == 32_767
    )
    with pytest.raises(ConfigError, match="131072 tokens, the model's context 32768"):
        probe_named("context-128k", 531, max_position_embeddings=32_768)
    with pytest.raises(ConfigError, match="context-64k") as caught:
        probe_named("context-64k", 531)
    assert caught.value.hint == "known: short, long, context-32k, context-128k"


@pytest.mark.parametrize(
    ("ids", "positions"),
    [
        (np.zeros((1, 0), np.int64), np.zeros(0, np.int64)),
        (np.zeros((1, 3), np.int64), np.array([0, 2, 2])),
        (np.zeros((1, 3), np.int64), np.array([-1, 0, 1])),
        (np.zeros((1, 3), np.int64), np.arange(4)),
        (np.zeros(3, np.int64), np.arange(3)),
    ],
)
def test_a_probe_without_tokens_or_with_disordered_positions_is_refused(
    ids: np.ndarray[tuple[int, ...], np.dtype[np.int64]],
    positions: np.ndarray[tuple[int, ...], np.dtype[np.int64]],
) -> None:
    """Empty, repeated, negative or ill-fitting input is an error."""
    with pytest.raises(ConfigError, match="probe odd"):
        Probe(name="odd", input_ids=ids, position_ids=positions)
