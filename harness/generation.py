"""Greedy decoding by the reference, through transformers' own `generate` and its cache.

A single forward pass never touches the cache; remote code written for another transformers has
given right logits and wrong text because of it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from harness.probes import Probe

Array = np.ndarray[Any, np.dtype[Any]]

PROMPT_LENGTH: Final = 6
NEW_TOKENS: Final = 8


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Generated:
    """What a model made of prompts.

    Args:
        prompts: (batch, seq), int64.
        tokens: (batch, num_steps), int64, what it chose.
        logits: (batch, num_steps, vocab_size), what it chose by.
    """

    prompts: Array
    tokens: Array
    logits: Array


def prompts_of(probe: Probe) -> Array:
    """The first tokens of a probe, a token at least."""
    return np.ascontiguousarray(probe.input_ids[:, :PROMPT_LENGTH])


def hf_greedy(model: Any, prompts: Array, *, num_steps: int = NEW_TOKENS) -> Generated:  # noqa: ANN401 - transformers is not typed
    """Decode greedily with a transformers model, cache on, as many steps as are asked for.

    Args:
        model: The model; its own generation settings are put back.
        prompts: (batch, seq), int64.
        num_steps: Tokens to choose for each sequence; no token ends it sooner.
    """
    import torch
    from transformers import GenerationConfig

    settings = GenerationConfig(
        max_new_tokens=num_steps,
        do_sample=False,
        num_beams=1,
        use_cache=True,
        eos_token_id=None,
        pad_token_id=0,
        return_dict_in_generate=True,
        output_logits=True,
    )
    own = model.generation_config
    # What is left out of the settings given, an end of sequence too, some versions take from the
    # model's own: so these are made its own.
    model.generation_config = settings
    try:
        with torch.no_grad():
            found = model.generate(
                torch.from_numpy(prompts).to(model.device),
                attention_mask=torch.ones(prompts.shape, dtype=torch.int64, device=model.device),
            )
    finally:
        model.generation_config = own
    logits = torch.stack(found.logits, dim=1)
    return Generated(
        prompts=prompts,
        tokens=found.sequences[:, prompts.shape[1] :].cpu().numpy(),
        logits=(logits if logits.dtype == torch.float64 else logits.float()).cpu().numpy(),
    )
