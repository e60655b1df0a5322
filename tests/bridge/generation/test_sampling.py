"""Tokens are drawn with the probabilities that transformers gives them, again and again alike."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch

from bridge.errors import InconsistentConfigError, UsageError
from bridge.generation.sampling import GREEDY, Sampling, choose, probabilities

LOGITS = torch.tensor([0.3, -1.2, 2.0, 0.9, -0.4])


def test_greedy_takes_the_likeliest_and_the_first_of_equals() -> None:
    """In each row; no random number is drawn."""
    rows = torch.tensor([[0.0, 3.0, 1.0, 3.0], [5.0, 3.0, 5.0, 1.0]])
    generator = torch.Generator().manual_seed(1)
    before = generator.get_state()
    assert choose(rows, GREEDY, [generator, None]) == [1, 0]
    assert generator.get_state().equal(before)


@pytest.mark.parametrize(
    ("sampling", "allowed"),
    [
        (Sampling(temperature=1.0), {0, 1, 2, 3, 4}),
        (Sampling(temperature=0.5, seed=3), {0, 1, 2, 3, 4}),
        (Sampling(temperature=1.4, top_k=3), {0, 2, 3}),
        (Sampling(temperature=1.0, top_p=0.9), {0, 2, 3}),
        (Sampling(temperature=2.0, top_p=0.2), {2}),
    ],
)
def test_tokens_are_drawn_as_often_as_the_softmax_says(
    sampling: Sampling, allowed: set[int]
) -> None:
    """Chi-square over 4,000 draws; the softmax is written out here."""
    draws, generator = 4000, sampling.generator(0)
    counts = Counter(choose(LOGITS[None], sampling, [generator])[0] for _ in range(draws))
    assert set(counts) == allowed
    weights = {i: math.exp(LOGITS[i].item() / sampling.temperature) for i in allowed}
    total = sum(weights.values())
    chi_square = sum(
        (counts[i] - draws * weight / total) ** 2 / (draws * weight / total)
        for i, weight in weights.items()
    )
    assert chi_square < 18.5  # one in a thousand exceeds it with 4 degrees of freedom


def test_the_smallest_temperature_takes_the_likeliest() -> None:
    """Differences of logits become infinite, and no NaN."""
    found = probabilities(LOGITS, Sampling(temperature=1e-320, top_p=0.9))
    assert found.tolist() == [0, 0, 1, 0, 0]


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"),
    [(1.0, 0, 1.0), (0.6, 0, 0.95), (1.5, 7, 1.0), (0.8, 20, 0.5), (3.0, 1000, 0.01), (0.1, 1, 1)],
)
def test_probabilities_are_those_of_transformers(
    temperature: float, top_k: int, top_p: float
) -> None:
    """Its own logits processors, in its own order, in float64."""
    from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    logits = 3 * torch.randn(400, generator=torch.Generator().manual_seed(8), dtype=torch.float64)
    scores = TemperatureLogitsWarper(temperature)(None, logits[None])
    if top_k:
        scores = TopKLogitsWarper(top_k)(None, scores)
    if top_p < 1:
        scores = TopPLogitsWarper(top_p)(None, scores)
    expected = scores[0].softmax(dim=0)
    found = probabilities(logits, Sampling(temperature=temperature, top_k=top_k, top_p=top_p))
    assert (found > 0).equal(expected > 0)
    torch.testing.assert_close(found / found.sum(), expected, rtol=1e-12, atol=1e-15)


def test_a_seed_repeats_and_prompts_differ() -> None:
    """The same prompt of the same seed, whatever else is drawn; another one otherwise."""
    logits = torch.zeros(1, 1000)

    def texts(seed: int, index: int) -> list[int]:
        sampling = Sampling(temperature=1.0, seed=seed)
        generator = sampling.generator(index)
        return [choose(logits, sampling, [generator])[0] for _ in range(8)]

    assert texts(1, 0) == texts(1, 0)
    different = [texts(1, 0), texts(1, 1), texts(2, 0), texts(2, 1), texts(0, 0)]
    assert len({tuple(one) for one in different}) == len(different)


def test_a_row_that_needs_no_token_draws_none() -> None:
    """Its neighbour's random numbers are what they are alone."""
    sampling = Sampling(temperature=1.0)
    ours, theirs = sampling.generator(4), sampling.generator(4)
    rows = torch.zeros(2, 500)
    together = [choose(rows, sampling, [None, ours])[1] for _ in range(4)]
    assert together == [choose(rows[:1], sampling, [theirs])[0] for _ in range(4)]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_logits_that_are_no_numbers_are_refused(bad: float) -> None:
    """A text of token 0 would look like an answer."""
    with pytest.raises(InconsistentConfigError, match="NaN or infinite"):
        choose(torch.tensor([[0.0, bad]]), GREEDY, [None])


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"temperature": -0.1}, "temperature=-0.1 is not 0 or more"),
        ({"temperature": math.nan}, "temperature=nan is not 0 or more"),
        ({"temperature": math.inf}, "temperature=inf is not 0 or more"),
        ({"temperature": 1.0, "top_k": -1}, "top_k=-1 is negative"),
        ({"temperature": 1.0, "top_p": 0.0}, "top_p=0.0 is not above 0 and at most 1"),
        ({"temperature": 1.0, "top_p": 1.5}, "top_p=1.5 is not above 0 and at most 1"),
        ({"temperature": 1.0, "seed": -1}, "seed=-1 is not in [0, 2^32)"),
        ({"top_k": 5}, "greedy decoding has no use for top_k or top_p"),
        ({"top_p": 0.9}, "greedy decoding has no use for top_k or top_p"),
    ],
)
def test_numbers_that_make_no_sense_are_refused(wrong: dict[str, float], said: str) -> None:
    """Before anything is loaded."""
    with pytest.raises(UsageError) as caught:
        Sampling(**wrong)  # type: ignore[arg-type]  # on purpose
    assert said in (caught.value.message, *caught.value.where)
