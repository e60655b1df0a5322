"""Tiles of many ranks become whole gradients, and each is measured against the truth."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from harness.gradients import (
    assemble,
    hf_loss_and_gradients,
    loss_excess,
    reference_error,
    tensor_errors,
)
from harness.live_gradients import RankGradients, Tile

Array = np.ndarray[Any, np.dtype[Any]]


def tile(name: str | None, rows: slice, values: list[float]) -> Tile:
    """Elements of a vector."""
    return Tile(hf_name=name, slices=(rows,), parameter="p", gradient=np.array(values, np.float32))


def rank(*tiles: Tile, without: tuple[str, ...] = ()) -> RankGradients:
    """A rank with these tiles."""
    return RankGradients(loss=1.0, tiles=list(tiles), without=list(without))


def test_shards_of_two_ranks_make_one_whole() -> None:
    """Each element comes from where the tile says, and nothing disagrees."""
    found = assemble(
        [rank(tile("w", slice(2, 4), [3, 4])), rank(tile("w", slice(0, 2), [1, 2]))], {"w": (4,)}
    )
    assert found.problems == []
    assert found.unequal == []
    assert [copy.tolist() for copy in found.copies["w"]] == [[1, 2, 3, 4]]


def test_equal_copies_are_one_and_others_are_all_kept() -> None:
    """Three ranks hold a norm, one of them with other bits: both versions are to be judged."""
    whole = slice(0, 2)
    found = assemble(
        [rank(tile("n", whole, [1, 2])), rank(tile("n", whole, [1, 5])),
         rank(tile("n", whole, [1, 2]))],
        {"n": (2,)},
    )  # fmt: skip
    assert found.unequal == ["n"]
    assert [copy.tolist() for copy in found.copies["n"]] == [[1, 2], [1, 5]]


def test_a_copy_of_part_of_a_tensor_is_completed_from_the_first() -> None:
    """A tied embedding's second copy comes in shards."""
    found = assemble(
        [rank(tile("e", slice(0, 1), [1])), rank(tile("e", slice(1, 2), [2])),
         rank(tile("e", slice(1, 2), [7]))],
        {"e": (2,)},
    )  # fmt: skip
    assert [copy.tolist() for copy in found.copies["e"]] == [[1, 2], [1, 7]]


@pytest.mark.parametrize(
    ("ranks", "message"),
    [
        ([rank(tile("w", slice(0, 1), [1]))], "on no rank; 1 elements"),
        ([rank(tile("w", slice(0, 2), [1, math.nan]))], "NaN"),
        ([rank()], "no rank has a gradient for it"),
        ([rank(tile("w", slice(0, 2), [1, 2]), without=("q",))], "no gradient for q"),
        (
            [rank(tile("w", slice(0, 2), [1, 2]), tile(None, slice(0, 1), [0.5]))],
            "rows that pad the vocabulary",
        ),
        ([rank(tile("w", slice(0, 2), [1, 2]), tile("v", slice(0, 1), [1]))], "no tensor v"),
    ],
)
def test_what_is_missing_or_too_much_is_a_problem(ranks: list[RankGradients], message: str) -> None:
    """Holes, NaN, tensors and parameters without a gradient, padding with one."""
    (problem,) = assemble(ranks, {"w": (2,)}).problems
    assert message in problem


def test_excess_is_our_error_over_the_references() -> None:
    """By hand: ours is off by 3 in one of four elements, the reference by 1."""
    truth = np.array([[10.0, 0], [0, 0]])
    ours, theirs = truth.copy(), truth.copy()
    ours[1, 0], theirs[0, 1] = 3, 1
    (error,), problems = tensor_errors({"w": [ours]}, {"w": theirs}, {"w": truth}, floor=0.01)
    assert problems == []
    assert error.excess == pytest.approx(3.0)
    assert (error.candidate, error.reference, error.scale) == pytest.approx((1.5, 0.5, 5.0))
    assert (error.worst, error.ours, error.truth) == ((1, 0), 3.0, 0.0)
    assert reference_error([error]) == pytest.approx(0.1)


def test_a_reference_counts_as_sane_by_its_best_tensor() -> None:
    """One tensor off by a tenth and one by a fifth: a tenth. Nothing at all is no number."""
    truth = {"a": np.full(3, 10.0), "b": np.full(2, 5.0)}
    theirs = {"a": np.full(3, 11.0), "b": np.full(2, 4.0)}
    errors, _ = tensor_errors({name: [one] for name, one in truth.items()}, theirs, truth, floor=1)
    assert reference_error(errors) == pytest.approx(0.1)
    assert math.isnan(reference_error([]))


def test_the_floor_is_relative_to_the_largest_gradient_of_the_model() -> None:
    """A smaller gradient beside a large one may be off by the rounding of the large one."""
    truth = {"large": np.full(3, 100.0), "small": np.full(2, 50.0)}
    ours = {"large": [truth["large"]], "small": [truth["small"] + 0.5]}
    errors, _ = tensor_errors(ours, truth, truth, floor=0.01)
    assert [(one.name, one.excess) for one in errors] == [
        ("small", pytest.approx(0.5)),
        ("large", 0.0),
    ]


def test_a_small_gradient_that_is_missing_does_not_pass_for_rounding() -> None:
    """The floor is 1 and the gradient 0.1: all of it would be a tenth of what is let through."""
    truth = {"large": np.full(3, 100.0), "small": np.full(2, 0.1)}
    ours = {"large": [truth["large"]], "small": [truth["small"] * 0]}
    (small, _), _ = tensor_errors(ours, truth, truth, floor=0.01)
    assert small.name == "small"
    assert small.excess == pytest.approx(20.0)


def test_what_the_reference_loses_as_well_is_rounding() -> None:
    """Where a gradient is drowned in others, the reference's is as far off."""
    truth = {"large": np.full(3, 100.0), "small": np.full(2, 0.1)}
    theirs = {**truth, "small": np.full(2, 0.6)}
    ours = {"large": [truth["large"]], "small": [np.full(2, -0.4)]}
    (small, _), _ = tensor_errors(ours, theirs, truth, floor=0.01)
    assert small.name == "small"
    assert small.excess == pytest.approx(1.0)


def test_a_gradient_that_should_be_zero_is_held_to_the_largest() -> None:
    """It has no size of its own."""
    truth = {"large": np.full(3, 100.0), "none": np.zeros(2)}
    ours = {"large": [truth["large"]], "none": [np.full(2, 0.25)]}
    (none, _), _ = tensor_errors(ours, truth, truth, floor=0.01)
    assert none.name == "none"
    assert none.excess == pytest.approx(0.25)


def test_the_worst_copy_counts() -> None:
    """One rank in order does not hide another that is not."""
    truth = np.ones(2)
    (error,), _ = tensor_errors({"n": [truth, truth + 1]}, {"n": truth}, {"n": truth}, floor=0.02)
    assert error.excess == pytest.approx(50.0)


ONES = np.ones((2, 2))


@pytest.mark.parametrize(
    ("ours", "theirs", "truth", "message"),
    [
        ({}, {"w": ONES}, {"w": ONES}, "no gradient from Megatron"),
        ({"w": [ONES]}, {}, {"w": ONES}, "no gradient from the reference"),
        ({"w": [ONES], "v": [ONES]}, {"w": ONES, "v": ONES}, {"w": ONES}, "from the oracle"),
        ({"w": [ONES[0]]}, {"w": ONES}, {"w": ONES}, "shape (2,)"),
        ({"w": [ONES.astype(np.float32)]}, {"w": ONES}, {"w": ONES}, "float32 from Megatron"),
        ({"w": [ONES * math.inf]}, {"w": ONES}, {"w": ONES}, "NaN or infinite"),
        ({"w": [ONES]}, {"w": ONES * math.nan}, {"w": ONES}, "the reference has NaN"),
        ({"w": [ONES]}, {"w": ONES}, {"w": ONES * 0}, "all zero"),
        ({}, {}, {}, "all zero"),
    ],
)
def test_what_cannot_be_compared_is_a_problem(
    ours: dict[str, list[Array]], theirs: dict[str, Array], truth: dict[str, Array], message: str
) -> None:
    """Names, shapes, dtypes, values that are no numbers, and nothing at all."""
    _, problems = tensor_errors(ours, theirs, truth, floor=0.01)
    assert any(message in problem for problem in problems)


def test_the_farthest_rank_counts_for_the_loss() -> None:
    """And a reference that is right by luck counts as the floor."""
    excess = loss_excess([2.0, 2.3], 2.1, 2.0, scale=5.0, floor=0.01)
    assert excess == pytest.approx(3.0)
    assert loss_excess([2.2], 2.0, 2.0, scale=5.0, floor=0.01) == pytest.approx(4.0)
    assert math.isnan(loss_excess([2.0, math.nan], 2.1, 2.0, scale=5.0, floor=0.01))
    assert math.isnan(loss_excess([], 2.1, 2.0, scale=5.0, floor=0.01))


class _Model(torch.nn.Module):
    """An embedding that is its own output layer; takes what a transformers model takes."""

    device = torch.device("cpu")

    def __init__(self) -> None:
        super().__init__()
        self.table = torch.nn.Parameter(torch.tensor([[1.0, 0.0], [0.0, 2.0]]))
        self.frozen = torch.nn.Parameter(torch.ones(2), requires_grad=False)

    def forward(self, input_ids: torch.Tensor, **_: object) -> Any:  # noqa: ANN401 - an output
        class Output:
            logits = (self.table[input_ids] * self.frozen) @ self.table.T

        return Output


def test_the_reference_model_is_left_as_it_was() -> None:
    """Frozen parameters get a gradient and stay frozen; gradients that were there come back."""
    model = _Model()
    before = torch.full((2, 2), 7.0)
    model.table.grad = before
    found = hf_loss_and_gradients(model, np.array([[0, 1]]), np.array([0, 1]))
    # Token 0 scores (1, 0), and token 1 comes next.
    assert found.loss == pytest.approx(math.log1p(math.e))
    assert found.gradients.keys() == {"table", "frozen"}
    assert model.table.grad is before
    assert model.table.requires_grad
    assert model.frozen.grad is None
    assert not model.frozen.requires_grad
