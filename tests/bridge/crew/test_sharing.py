"""Dividing work: everything is done once, by shares of about the same size."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bridge.crew.protocol import Alone
from bridge.crew.sharing import balanced, share_of, shared_checkpoint
from bridge.errors import TargetExistsError

SIZES = st.lists(st.integers(0, 1 << 40), max_size=40)
SHARES = st.integers(1, 9)


@given(SIZES, SHARES)
def test_every_item_is_in_one_share_and_in_its_place(sizes: list[int], shares: int) -> None:
    """A partition; each share keeps the order of the whole."""
    found = balanced(sizes, shares)
    assert len(found) == shares
    assert sorted(index for share in found for index in share) == list(range(len(sizes)))
    assert all(share == sorted(share) for share in found)


@given(SIZES, SHARES)
def test_no_share_exceeds_the_mean_by_more_than_one_item(sizes: list[int], shares: int) -> None:
    """The bound of dealing the largest first."""
    loads = [sum(sizes[index] for index in share) for share in balanced(sizes, shares)]
    assert max(loads) * shares <= sum(sizes) + shares * max(sizes, default=0)


def test_the_largest_goes_first_and_equal_ones_by_index() -> None:
    """Worked by hand: 7 | 5 | 4, then 3 to the 4, and 2 to the 5."""
    assert balanced([2, 7, 3, 5, 4], 3) == [[1], [0, 3], [2, 4]]
    assert balanced([1, 1, 1, 1], 2) == [[0, 2], [1, 3]]


def test_surplus_workers_get_nothing() -> None:
    """Two files among three."""
    assert balanced([10, 20], 3) == [[1], [0], []]


def test_the_crew_of_one_does_everything() -> None:
    """In the order given."""
    assert share_of(Alone(), ["a", "b", "c"], [1, 3, 2]) == ["a", "b", "c"]


def test_a_directory_of_a_crew_of_one_is_a_new_directory(tmp_path: Path) -> None:
    """It appears whole, or not at all."""
    with shared_checkpoint(tmp_path / "new", overwrite=False, last=(), crew=Alone()) as new:
        new.write_small_file("file", b"x")
        assert not (tmp_path / "new").exists()
    assert (tmp_path / "new" / "file").read_text() == "x"
    with pytest.raises(ZeroDivisionError), shared_checkpoint(
        tmp_path / "other", overwrite=False, last=(), crew=Alone()
    ):  # fmt: skip
        raise ZeroDivisionError
    with pytest.raises(TargetExistsError), shared_checkpoint(
        tmp_path / "new", overwrite=False, last=(), crew=Alone()
    ):  # fmt: skip
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["new"]
