"""Choosing the next token: the likeliest one, or one at random.

Random numbers come from one generator for each sequence, on the CPU, so that what a prompt gives
depends neither on what else is in its batch nor on the device or the layout, but for the rounding
of the logits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import torch

from bridge.errors import InconsistentConfigError, UsageError

_SEQUENCE: Final = 1_000_003
"""Sets the seeds of two prompts apart; a prime, so that seed + 1 does not repeat other prompts."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How a token is chosen. By default greedily: the likeliest, and the first of equals.

    Args:
        temperature: What logits are divided by before the softmax; 0 is greedy.
        top_k: Choose among so many of the likeliest tokens; 0 for all.
        top_p: Choose among the fewest of the likeliest that have this probability together, of
            those that `top_k` leaves; 1 for all. At least one token stays.
        seed: Of the random numbers.

    Raises:
        UsageError: BR001, numbers that make no sense, or that greedy decoding has no use for.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        wrong = []
        if not 0.0 <= self.temperature < float("inf"):
            wrong.append(f"temperature={self.temperature} is not 0 or more")
        if self.top_k < 0:
            wrong.append(f"top_k={self.top_k} is negative")
        if not 0.0 < self.top_p <= 1.0:
            wrong.append(f"top_p={self.top_p} is not above 0 and at most 1")
        if not 0 <= self.seed < 1 << 32:
            wrong.append(f"seed={self.seed} is not in [0, 2^32)")
        if wrong:
            raise UsageError("tokens cannot be sampled so", where=wrong)
        if self.is_greedy and (self.top_k, self.top_p) != (0, 1.0):
            raise UsageError(
                "greedy decoding has no use for top_k or top_p",
                hint="give a temperature above 0 too, such as 0.6",
            )

    @property
    def is_greedy(self) -> bool:
        """Whether nothing is left to chance."""
        return self.temperature == 0.0

    def generator(self, index: int) -> torch.Generator:
        """The random numbers of the prompt of that index."""
        return torch.Generator().manual_seed(self.seed * _SEQUENCE + index)


GREEDY: Final = Sampling()


def probabilities(logits: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """What a token is drawn from, in the order temperature, top_k, top_p, as transformers does.

    Args:
        logits: (vocab_size,).
        sampling: Not greedy.

    Returns:
        (vocab_size,), float64. They need not sum to 1.
    """
    # The likeliest at 0 before the division: a tiny temperature makes infinity of anything else.
    scaled = (logits.double() - logits.double().max()) / sampling.temperature
    ordered, tokens = scaled.sort(descending=True, stable=True)
    kept = ordered[: sampling.top_k or None].softmax(dim=0)
    if sampling.top_p < 1.0:
        kept = kept.masked_fill(kept.cumsum(dim=0) - kept >= sampling.top_p, 0.0)
    found = torch.zeros_like(scaled)
    found[tokens[: len(kept)]] = kept
    return found


def choose(
    logits: torch.Tensor, sampling: Sampling, generators: Sequence[torch.Generator | None]
) -> list[int]:
    """A token for each sequence.

    Args:
        logits: (batch, vocab_size), on any device.
        sampling: How.
        generators: Of the sequences; None for one that needs no token, which gets any. One number
            is drawn for a token, and none when greedy.

    Raises:
        InconsistentConfigError: BR104, logits that are NaN or infinite.
    """
    if not bool(logits.isfinite().all()):
        raise InconsistentConfigError(
            "the model's logits are NaN or infinite",
            hint="try --dtype float32; if that is no better, the weights are damaged: run "
            "`nemotron-bridge verify`",
        )
    tokens: list[int] = logits.argmax(dim=-1).tolist()
    if not sampling.is_greedy:
        for row, generator in enumerate(generators):
            if generator is not None:
                tokens[row] = _draw(probabilities(logits[row], sampling), generator)
    return tokens


def _draw(probabilities: torch.Tensor, generator: torch.Generator) -> int:
    shares = probabilities.cumsum(dim=0)
    # Below 1 even when multiplied: the number must fall into somebody's share.
    drawn = torch.rand((), dtype=torch.float64, generator=generator).clamp(max=1 - 2**-48)
    # The first token whose share ends beyond it: one of probability 0 has no share.
    return int(torch.searchsorted(shares, drawn.to(shares.device) * shares[-1], right=True))
