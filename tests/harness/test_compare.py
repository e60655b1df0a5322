"""Comparing bit by bit, and never passing on nothing."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from harness.compare import exact, first_difference, tensor_differences, words_of


def test_no_difference_in_something_passes_and_in_nothing_fails() -> None:
    """An empty comparison is not a success."""
    assert exact([], compared=3, what="files").passed
    assert not exact([], compared=0, what="files").passed
    assert "nothing was compared" in exact([], compared=0, what="files").summary


def test_any_difference_fails_and_comes_first_in_the_summary() -> None:
    """Value, limit and place in one line."""
    found = exact(["a.b[1]: wrong", "c: lost"], compared=7, what="tensors")
    assert not found.passed
    assert (found.value, found.limit) == (2, 0)
    assert found.summary == "2 differences in 7 tensors (limit 0): a.b[1]: wrong"
    assert found.places == ("a.b[1]: wrong", "c: lost")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_words_tell_zeros_and_nans_apart_by_their_bits(dtype: torch.dtype) -> None:
    """Numbers that compare equal may differ, and NaN may be equal."""
    a = torch.tensor([0.0, float("nan"), 1.0], dtype=dtype)
    b = torch.tensor([-0.0, float("nan"), 1.0], dtype=dtype)
    assert first_difference(words_of(a), words_of(b)) == ((0,), 1)
    assert first_difference(words_of(a), words_of(a.clone())) is None


def test_the_first_difference_is_by_row_then_column() -> None:
    """Two differ; the first is at row 1."""
    a = np.zeros((3, 4), np.uint32)
    b = a.copy()
    b[1, 2] = b[2, 0] = 1
    assert first_difference(a, b) == ((1, 2), 2)


def test_missing_extra_misshapen_and_mistyped_tensors_are_all_told() -> None:
    """Keys, shape and dtype before values."""
    ours = {"a": torch.zeros(2), "b": torch.zeros(2), "c": torch.zeros(3), "e": torch.zeros(2)}
    theirs = {
        "b": torch.zeros(2, dtype=torch.float64),
        "c": torch.zeros(4),
        "d": torch.zeros(1),
        "e": torch.tensor([0.0, 1.0]),
    }
    problems, elements, compared = tensor_differences(ours, theirs, names=("P", "M"))
    assert problems == [
        "a: only in P",
        "d: only in M",
        "b: (2,) torch.float32 in P, (2,) torch.float64 in M",
        "c: (3,) torch.float32 in P, (4,) torch.float32 in M",
        "e[1]: 1 elements differ, this one first",
    ]
    assert elements == [("e", (1,))]
    assert compared == 2


def test_layers_are_told_in_the_order_the_model_runs() -> None:
    """Layer 2 before layer 10, the embedding before both."""
    names = ["model.layers.10.a", "model.layers.2.a", "model.embed_tokens.weight"]
    ours = {name: torch.zeros(1) for name in names}
    theirs = {name: torch.ones(1) for name in names}
    problems, _, _ = tensor_differences(ours, theirs, names=("P", "M"))
    assert [one.partition("[")[0] for one in problems] == [names[2], names[1], names[0]]
