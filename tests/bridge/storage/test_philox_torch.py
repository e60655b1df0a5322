"""torch's form of the stream gives NumPy's bits, wherever a box begins."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from bridge.convert import read_spec
from bridge.dtypes import dtype_named
from bridge.storage import philox_torch
from bridge.storage.philox import stream_key
from bridge.storage.synthetic import SyntheticSource
from bridge.tiling import Box
from harness.toys import toy_named, write_checkpoint

CPU = torch.device("cpu")
CHOSEN = {
    "model.embed_tokens.weight",
    "model.layers.0.input_layernorm.weight",
    "model.layers.0.self_attn.q_proj.weight",
    "model.norm.weight",
}
NEEDS_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.parametrize("start", [0, 1, 3, 4, 2**40 + 3])
def test_words_are_those_of_numpy_at_any_place(start: int) -> None:
    """NumPy's own generator says what the words are."""
    found = philox_torch.box_words(
        5, "model.norm.weight", 2**41, range(1), range(start, start + 1001), CPU
    )
    generator = np.random.Philox(key=stream_key(5, "model.norm.weight"), counter=start // 4)
    expected = generator.random_raw(start % 4 + 1001)[start % 4 :]
    assert np.array_equal(found.numpy().view(np.uint64)[0], expected)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "device", ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, NEEDS_GPU])]
)
def test_boxes_of_a_model_have_the_same_bits(
    dtype: str, device: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whole tensors, rows, columns that begin within a counter, strided targets, several pieces."""
    monkeypatch.setattr(philox_torch, "_CHUNK", 1 << 13)
    write_checkpoint(toy_named("ultra-253b"), tmp_path / "hf", dtype="bfloat16")
    spec = read_spec(tmp_path / "hf")
    plain, ours = (SyntheticSource(spec, seed=3, dtype=dtype, device=one) for one in (None, device))
    word = dtype_named(dtype).word
    for name, info in plain.tensors.items():
        if name not in CHOSEN:
            continue
        boxes = [Box.whole(info.shape)]
        if len(info.shape) == 2:
            rows, width = info.shape
            boxes += [
                Box((1, 0), (rows, width)),
                Box((0, 3), (rows, width - 2)),
                Box((5, 7), (6, 8)),
            ]
        else:
            boxes.append(Box((1,), (info.shape[0] - 2,)))
        for box in boxes:
            expected, found = (np.zeros((*box.shape, 2), word) for _ in range(2))
            plain.read_into(name, box, expected[..., 0])
            ours.read_into(name, box, found[..., 0])
            assert np.array_equal(found, expected), (name, box)


def test_rows_of_odd_width_begin_anywhere_within_a_counter() -> None:
    """Of 7 words a row, each row begins at another of a counter's four."""
    found = philox_torch.box_words(0, "x", 7, range(2, 9), range(1, 6), CPU)
    generator = np.random.Philox(key=stream_key(0, "x"), counter=0)
    expected = generator.random_raw(63).reshape(9, 7)[2:, 1:6]
    assert np.array_equal(found.numpy().view(np.uint64), expected)
