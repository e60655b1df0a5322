"""A live Megatron model behind its KV cache: tokens in, the logits of the next one out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from bridge.errors import InconsistentConfigError, LayoutError
from bridge.forward import run_stages
from bridge.spec import ModelSpec, ParallelLayout


class Decoder:
    """One batch of sequences that grow together. Every rank of the layout feeds it the same tokens.

    The cache is Megatron-Core's own `StaticInferenceContext`: each attention of this rank keeps the
    keys and values of its own query groups, (max_sequence_length, batch, num_query_groups / TP,
    kv_channels) in the model's dtype, and no other sub-block keeps anything. Keys are kept without
    their rotation, which is computed anew at each step.

    Args:
        model_parts: What `bridge.model.build_model` gave this rank.
        spec: The model.
        layout: How it is cut, without sequence parallelism.
        batch_size: Sequences.
        max_sequence_length: Tokens of each that the cache has room for.

    Raises:
        LayoutError: BR200, sequence parallelism: there is no sequence in one token.
        InconsistentConfigError: BR104, more tokens than the model has positions.
    """

    def __init__(
        self,
        model_parts: Sequence[Any],
        spec: ModelSpec,
        layout: ParallelLayout,
        *,
        batch_size: int,
        max_sequence_length: int,
    ) -> None:
        from megatron.core.inference.contexts import StaticInferenceContext

        if layout.sequence_parallel:
            raise LayoutError(
                f"generation with the sequence parallelism of {layout.name}",
                hint="build the model for the same layout without it",
            )
        if max_sequence_length > spec.max_position_embeddings:
            raise InconsistentConfigError(
                f"{max_sequence_length} tokens for a model of {spec.max_position_embeddings} "
                "positions",
                where="max_position_embeddings",
            )
        self._model_parts, self._spec, self._layout = model_parts, spec, layout
        self._cache = StaticInferenceContext(batch_size, max_sequence_length)

    @property
    def num_tokens(self) -> int:
        """How many of each sequence are in the cache."""
        found: int = self._cache.sequence_len_offset
        return found

    def feed(self, input_ids: torch.Tensor) -> torch.Tensor | None:
        """Append tokens and compute the logits of what follows the last of them.

        Args:
            input_ids: (batch_size, num_tokens), the same on every rank; after the first time one
                token a sequence.

        Returns:
            (batch_size, vocab_size) in the dtype the model computes in, without the padding of the
            vocabulary, on the ranks of the last stage; None on the others.

        Raises:
            InconsistentConfigError: BR104, token ids outside the vocabulary, tokens for which
                there is no room, or several behind a cache, among which attention would not be
                causal.
        """
        batch, length = input_ids.shape
        room = self._cache.max_sequence_length - self.num_tokens
        if batch != self._cache.max_batch_size or length > room or (self.num_tokens and length > 1):
            raise InconsistentConfigError(
                f"{batch} x {length} tokens for a cache of {self._cache.max_batch_size} x "
                f"{self._cache.max_sequence_length} that holds {self.num_tokens} of each sequence"
            )
        passage = run_stages(
            self._model_parts, self._spec, self._layout, input_ids, None, grad=False,
            cache=self._cache,
        )  # fmt: skip
        self._cache.increment_sequence_len_offset(length)
        self._cache.enable_decode_mode()
        return None if passage.logits is None else passage.logits[:, -1]
