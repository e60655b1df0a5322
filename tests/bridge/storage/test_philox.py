"""The portable stream: defined by published Philox, readable anywhere, well distributed."""

from __future__ import annotations

import hashlib
import itertools
import struct

import numpy as np
import pytest
import torch

from bridge.dtypes import dtype_named
from bridge.errors import DtypeMismatchError
from bridge.storage import philox

_MASK = 2**64 - 1


def _philox_block(counter: int, key: int) -> list[int]:
    """Philox4x64-10 of Salmon et al. 2011, in Python integers."""
    c = [counter >> 64 * i & _MASK for i in range(4)]
    k0, k1 = key & _MASK, key >> 64
    for _ in range(10):
        p0, p1 = 0xD2E7470EE14C6C93 * c[0], 0xCA5A826395121157 * c[2]
        c = [p1 >> 64 ^ c[1] ^ k0, p1 & _MASK, p0 >> 64 ^ c[3] ^ k1, p0 & _MASK]
        k0, k1 = (k0 + 0x9E3779B97F4A7C15) & _MASK, (k1 + 0xBB67AE8584CAA73B) & _MASK
    return c


def _value(seed: int, name: str, index: int, *, mean: float, std: float) -> np.float32:
    """One element by the definition in the module's docstring, in Python integers."""
    key = int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:16], "little")
    word = _philox_block(index // 4 + 1, key)[index % 4]
    noise = sum(word >> shift & 0xFFFF for shift in (0, 16, 32, 48)) - 131070
    scale = np.float32(std / ((2**32 - 1) / 3) ** 0.5)
    return np.float32(np.float32(noise) * scale + np.float32(mean))


def _fill(start: int, count: int, *, mean: float = 0.0, std: float = 1.0) -> philox.Float32s:
    out = np.empty(count, np.float32)
    philox.fill_float32(out, seed=7, name="a.weight", start=start, mean=mean, std=std)
    return out


def test_the_test_s_own_philox_gives_the_published_known_answer() -> None:
    """Random123's known-answer vector for a zero counter and a zero key."""
    expected = [0x16554D9ECA36314C, 0xDB20FE9D672D0FDC, 0xD7E772CEE186176B, 0x7E68B68AEC7BA23B]
    assert expected == _philox_block(0, 0)


@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (1.0, 0.2), (0.0, 1 / 96**0.5)])
def test_elements_follow_the_definition_wherever_they_are_read(mean: float, std: float) -> None:
    """Any element, in any block or chunk and past 2**40, equals the definition's value."""
    for start in (0, 1, 2, 3, 4, 5, philox.CHUNK - 2, 2**40 + 3):
        expected = [_value(7, "a.weight", start + i, mean=mean, std=std) for i in range(9)]
        np.testing.assert_array_equal(expected, _fill(start, 9, mean=mean, std=std))


def test_a_range_is_the_same_however_it_is_cut() -> None:
    """Reading in pieces gives what reading at once gives, over several chunks."""
    count = 2 * philox.CHUNK + 5
    whole = _fill(3, count)
    cuts = [0, 1, 6, philox.CHUNK - 1, philox.CHUNK + 2, count]
    pieces = [_fill(3 + a, b - a) for a, b in itertools.pairwise(cuts)]
    np.testing.assert_array_equal(whole, np.concatenate(pieces))


def test_the_first_values_are_pinned() -> None:
    """The stream may never change: goldens and synthetic checkpoints depend on its bits."""
    digest = hashlib.sha256(_fill(0, 100_000).astype("<f4").tobytes()).hexdigest()
    assert digest == "ed3f165dd3f999db866396b3faf0f0d13db1fff6d14eff03a34219a8df0413be"


def test_names_and_seeds_give_unrelated_streams() -> None:
    """Two names, or two seeds, share no run of values and do not correlate."""
    streams = [
        philox.raw_words(seed, name, 0, 4096).astype(np.float64)
        for seed, name in ((0, "a"), (0, "b"), (1, "a"))
    ]
    correlation = np.corrcoef(streams) - np.eye(3)
    assert np.abs(correlation).max() < 0.08  # five standard deviations of 4096 samples


def test_values_have_the_mean_and_the_deviation_asked_for() -> None:
    """Mean and standard deviation are those asked for, within five standard errors."""
    values = _fill(0, 1_000_000, mean=1.0, std=0.2).astype(np.float64)
    assert abs(values.mean() - 1.0) < 5 * 0.2 / 1000
    assert abs(values.std() - 0.2) < 5 * 0.2 / 1000


def test_bfloat16_rounding_is_torch_s() -> None:
    """Rounding in integers gives what torch gives, exact ties to even included."""
    ties = np.arange(0x3F7F0000, 0x3F830000, 0x8000, dtype=np.uint32).view(np.float32)
    values = np.concatenate(
        [_fill(0, 50_000), ties, -ties, np.array([0.0, -0.0, 3e38], np.float32)]
    )
    expected = torch.from_numpy(values).to(torch.bfloat16).view(torch.int16).numpy()
    np.testing.assert_array_equal(expected.view(np.uint16), philox.bfloat16_words(values))


def test_bfloat16_words_are_the_float32_stream_rounded() -> None:
    """A bfloat16 tensor is the float32 one of the same name, rounded once."""
    out = np.empty(100_001, np.uint16)
    philox.fill_words(
        out, dtype_named("bfloat16"), seed=7, name="a.weight", start=5, mean=0.0, std=1.0
    )
    expected = torch.from_numpy(_fill(5, 100_001)).to(torch.bfloat16).float().numpy()
    np.testing.assert_array_equal(expected, philox.float32_of_bfloat16(out))


def test_float32_words_are_the_bit_patterns() -> None:
    """The words of a float32 tensor are its bytes, little-endian."""
    out = np.empty(7, np.uint32)
    philox.fill_words(
        out, dtype_named("float32"), seed=7, name="a.weight", start=0, mean=0.0, std=1.0
    )
    assert struct.pack("<7f", *_fill(0, 7)) == out.astype("<u4").tobytes()


def test_a_dtype_without_a_definition_is_refused() -> None:
    """A stream of float16 is not defined, and says so with the tensor's name."""
    with pytest.raises(DtypeMismatchError, match="float16") as caught:
        philox.fill_words(
            np.empty(1, np.uint16), dtype_named("float16"), seed=0, name="x", start=0, mean=0, std=1
        )
    assert caught.value.where == ("x",)


def test_every_parameter_has_a_size_that_keeps_activations_near_one() -> None:
    """Norms vary around one, embeddings have std 1, a matrix std 1 / sqrt(fan_in)."""
    assert philox.mean_and_std("model.norm.weight", (96,)) == (1.0, 0.2)
    assert philox.mean_and_std("model.embed_tokens.weight", (515, 96)) == (0.0, 1.0)
    assert philox.mean_and_std("lm_head.weight", (515, 64)) == (0.0, 0.125)
