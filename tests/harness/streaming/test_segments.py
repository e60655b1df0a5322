"""How a model is cut: every weight in one segment, each segment within the budget."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from bridge.errors import UsageError
from harness.streaming.segments import (
    Segment,
    blocks_named,
    distinct_blocks,
    segments_of,
    slices,
)
from harness.toys import toy_named

TOYS = ("nano-4b", "51b", "ultra-253b", "tied")
BUDGETS = (1 << 30, 3 << 20, 2 << 20)


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("name", TOYS)
def test_every_weight_is_read_once(name: str, budget: int) -> None:
    """Matrices are covered exactly by the boxes; norms are read by every slice that needs them."""
    toy = toy_named(name)
    tokens = range(toy.architecture.vocab_size)
    found, _ = segments_of(toy.architecture, tokens, memory_budget=budget, word=4, element=4)
    counts = {key: np.zeros(shape, np.int64) for key, shape in toy.tensors().items()}
    for segment in found:
        for key, box in segment.boxes:
            counts[key][box.slices] += 1
    for key, count in counts.items():
        tied_embedding = toy.architecture.tied and "embed_tokens" in key
        if count.ndim == 2:
            assert (count == (2 if tied_embedding else 1)).all(), key
        else:
            assert (count >= 1).all(), key


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("word", [2, 4])
def test_no_segment_needs_more_than_the_budget(budget: int, word: int) -> None:
    """Its words fit beside the module, and both shares together are within the whole."""
    model = toy_named("ultra-253b").architecture
    found, shares = segments_of(model, [0, 1], memory_budget=budget, word=word, element=4)
    for segment in found:
        assert segment.num_parameters * word <= shares.words
        assert segment.num_parameters * 4 <= shares.module
    assert shares.words + shares.module <= budget


def test_two_slices_of_a_feed_forward_fit_side_by_side() -> None:
    """Or else nothing could be read while the present one computes."""
    model = toy_named("ultra-253b").architecture
    found, shares = segments_of(model, [0], memory_budget=2 << 20, word=4, element=4)
    cut = [one for one in found if one.num_slices > 1]
    assert cut
    for segment in cut:
        assert 2 * segment.num_parameters * 4 <= shares.words


def test_the_walk_is_in_the_order_of_the_model() -> None:
    """Embedding, attention and feed-forward of every block, no-ops included, head."""
    model = toy_named("51b").architecture
    found, _ = segments_of(model, [0], memory_budget=1 << 30, word=4, element=4)
    expected: list[tuple[str, int | None]] = [("embedding", None)]
    for layer_idx in range(8):
        expected += [("attention", layer_idx), ("ffn", layer_idx)]
    assert [*expected, ("head", None)] == [(one.part, one.layer_idx) for one in found]


def test_a_budget_that_cannot_be_kept_says_what_could() -> None:
    """And the one it names is enough."""
    model = toy_named("ultra-253b").architecture
    with pytest.raises(UsageError, match="BR001") as caught:
        segments_of(model, [0], memory_budget=1000, word=4, element=4)
    named = int(str(caught.value.hint).split("--memory-budget ")[1].split("KiB")[0])
    segments_of(model, [0], memory_budget=named << 10, word=4, element=4)
    with pytest.raises(UsageError, match="a memory budget of 1B is too small"):
        segments_of(model, [0], memory_budget=1, word=4, element=4)


@pytest.mark.parametrize(
    ("extent", "most", "expected"),
    [
        (12, 12, [(0, 12)]),
        (12, 6, [(0, 6), (6, 12)]),
        (10, 4, [(0, 3), (3, 6), (6, 10)]),
        (3, 1, [(0, 1), (1, 2), (2, 3)]),
    ],
)
def test_slices_are_few_and_even(extent: int, most: int, expected: list[tuple[int, int]]) -> None:
    """As few as fit, no longer than another by more than one unit."""
    assert expected == list(slices(extent, most))


def test_distinct_blocks_are_one_of_each_kind() -> None:
    """The first of it, and the widest is among them."""
    model = toy_named("ultra-253b").architecture
    chosen = distinct_blocks(model)
    kinds = Counter(model.blocks[layer_idx] for layer_idx in chosen)
    assert set(model.blocks) == set(kinds)
    assert set(kinds.values()) == {1}
    assert all(model.blocks.index(model.blocks[one]) == one for one in chosen)


def test_blocks_are_named_by_numbers_and_ranges() -> None:
    """In order, each once."""
    model = toy_named("51b").architecture
    assert blocks_named("5-7,0,2,6", model) == [0, 2, 5, 6, 7]


@pytest.mark.parametrize("text", ["8", "0,7-8", "", "a", "-1", "5-3", "1,,2"])
def test_blocks_that_are_not_there_are_refused(text: str) -> None:
    """With a hint, before anything is read."""
    with pytest.raises(UsageError) as caught:
        blocks_named(text, toy_named("51b").architecture)
    assert caught.value.hint


def test_only_named_blocks_are_walked_and_the_head_may_be_left_out() -> None:
    """Their indices stay those of the whole model."""
    model = toy_named("51b").architecture
    found, _ = segments_of(
        model, [0], memory_budget=1 << 30, word=4, element=4, blocks=[2, 5], head=False
    )
    layers = [one.layer_idx for one in found]
    assert layers == [None, 2, 2, 5, 5]


def test_a_slice_says_where_it_is() -> None:
    """Units of the width from the first to the last."""
    segment = Segment(part="ffn", layer_idx=3, start=0, stop=512, slice_idx=0, num_slices=3)
    assert str(segment) == "the FFN sub-block, units 0-511 (slice 1 of 3)"
