"""Greedy decoding inside the ranks: every step a forward pass over all tokens so far."""

from __future__ import annotations

from typing import Any

import numpy as np

from harness.live import ModelRequest, model
from harness.ranks import RankContext

Array = np.ndarray[Any, np.dtype[Any]]


def decode(
    context: RankContext, request: ModelRequest, prompts: Array, follow: Array
) -> Array | None:
    """Logits of every step of greedy decoding along the tokens of another model.

    As long as both choose the same tokens this is greedy decoding; where they part, the other's
    token is taken, so that one near-tie does not end the comparison. Positions are left for the
    model to count, as they are in use.

    Args:
        context: This rank.
        request: The model.
        prompts: (batch, seq).
        follow: (batch, num_steps), the tokens that the other model chose.

    Returns:
        (batch, num_steps, vocab_size), float32 or float64, from rank 0; None from the others.
    """
    import torch

    from bridge.forward import forward

    parts = model(context, request)
    tokens = np.concatenate([prompts, follow], axis=1)
    steps = []
    with torch.no_grad():
        for length in range(prompts.shape[1], tokens.shape[1]):
            so_far = torch.from_numpy(np.ascontiguousarray(tokens[:, :length]))
            steps.append(forward(parts, request.spec, request.layout, so_far)[:, -1])
    if context.rank != 0:
        return None
    found = torch.stack(steps, dim=1)
    return (found if found.dtype == torch.float64 else found.float()).cpu().numpy()
