"""The Hugging Face side: its model, quietly loaded, and its logits."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]


def load_hf_model(
    path: Path, *, dtype: str, trust_remote_code: bool = False, carry: Collection[str] = ()
) -> Any:  # noqa: ANN401 - transformers is not typed
    """The reference model of a checkpoint, without transformers' own progress bars."""
    import torch
    from transformers.utils import logging as transformers_logging

    from bridge.decilm import load_reference

    transformers_logging.disable_progress_bar()
    return load_reference(
        path,
        dtype=getattr(torch, dtype),
        trust_remote_code=trust_remote_code,
        carry=carry,
    )


def hf_logits(model: Any, input_ids: Array, position_ids: Array) -> Array:  # noqa: ANN401 - transformers is not typed
    """Logits of a transformers model, (batch, seq, vocab_size), float32 or float64."""
    import torch

    positions = torch.from_numpy(np.broadcast_to(position_ids, input_ids.shape).copy())
    with torch.no_grad():
        found = model(
            input_ids=torch.from_numpy(input_ids).to(model.device),
            position_ids=positions.to(model.device),
            # Without a mask transformers takes positions with gaps for packed sequences.
            attention_mask=torch.ones(input_ids.shape, dtype=torch.int64, device=model.device),
            use_cache=False,
        ).logits
    logits: Array = (found if found.dtype == torch.float64 else found.float()).cpu().numpy()
    return logits
