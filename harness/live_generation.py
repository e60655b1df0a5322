"""Greedy decoding inside the ranks, through the KV cache that `nemotron-bridge generate` uses."""

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
    model to count, as they are in use. Under sequence parallelism, which goes with no cache, every
    step is a forward pass over all tokens so far.

    Args:
        context: This rank.
        request: The model.
        prompts: (batch, seq).
        follow: (batch, num_steps), the tokens that the other model chose.

    Returns:
        (batch, num_steps, vocab_size), float32 or float64, from rank 0; None from the others.
    """
    import torch

    from bridge.forward import forward, from_last_stage
    from bridge.generation.decoder import Decoder

    parts = model(context, request)
    spec, layout = request.spec, request.layout
    tokens = torch.from_numpy(np.concatenate([prompts, follow[:, :-1]], axis=1))
    start, (batch, length) = prompts.shape[1], tokens.shape
    with torch.no_grad():
        if layout.sequence_parallel:
            so_far = [tokens[:, :end] for end in range(start, length + 1)]
            steps = [forward(parts, spec, layout, one)[:, -1] for one in so_far]
        else:
            decoder = Decoder(parts, spec, layout, batch_size=batch, max_sequence_length=length)
            fed = [tokens[:, :start], *(tokens[:, at : at + 1] for at in range(start, length))]
            shape = (batch, spec.vocab_size)
            steps = [from_last_stage(decoder.feed(one), shape, parts, layout) for one in fed]
    if context.rank != 0:
        return None
    found = torch.stack(steps, dim=1)
    return (found if found.dtype == torch.float64 else found.float()).cpu().numpy()
