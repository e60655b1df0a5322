"""How one block, the embedding or the head is put together, each piece to be exchanged."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from harness import oracle
from harness.oracle import Absent, Architecture, Array, Attention, Replaced, Weight


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Setup:
    """All that one block needs, and how it puts it together.

    Args:
        model: The architecture.
        weight: Weights by name.
        layer_idx: Which block; -1 for the embedding, the number of blocks for the head.
        hidden: The state before it, (batch, seq, hidden_size), float64.
        input_ids: (batch, seq).
        position_ids: (seq,) or (batch, seq).
        tp: Ranks that share each tensor.
        turn: Changes rotary angles.
        norm: RMSNorm, or what stands for it.
        attention: Attention, or what stands for it.
        mlp: The gated feed-forward, or what stands for it.
        residuals: Which of the two residuals are added.
        after: Last change of the result, given the input too.
    """

    model: Architecture
    weight: Weight
    layer_idx: int
    hidden: Array
    input_ids: Any
    position_ids: Any
    tp: int = 1
    turn: Callable[[Array, Any, Any], Array] | None = None
    norm: Callable[..., Array] = oracle.rms_norm
    attention: Callable[..., Array] = oracle.attention
    mlp: Callable[..., Array] = oracle.mlp
    residuals: tuple[bool, bool] = (True, True)
    after: Callable[[Array, Array], Array] | None = None

    def compute(self) -> Array:
        """The state after it, or the logits."""
        if self.layer_idx < 0:
            found = oracle.embed(self.weight, self.model, self.input_ids)
        elif self.layer_idx >= len(self.model.blocks):
            found = self._head()
        else:
            found = self._block()
        return found if self.after is None else self.after(found, self.hidden)

    def _head(self) -> Array:
        model = self.model
        normed = self.norm(self.hidden, self.weight, "model.norm.weight", model.layernorm_epsilon)
        name = "model.embed_tokens.weight" if model.tied else "lm_head.weight"
        return oracle.linear(normed, self.weight, name, (model.vocab_size, model.hidden_size))

    def _block(self) -> Array:
        layer, model, hidden = f"model.layers.{self.layer_idx}", self.model, self.hidden
        for number, (kind, norm, part, linear) in enumerate(
            zip(
                model.blocks[self.layer_idx],
                ("input_layernorm", "post_attention_layernorm"),
                ("self_attn", "mlp"),
                ("linear_attn", "linear_mlp"),
                strict=True,
            )
        ):
            if isinstance(kind, Absent):
                continue
            epsilon = model.layernorm_epsilon
            normed = self.norm(hidden, self.weight, f"{layer}.{norm}.weight", epsilon)
            if isinstance(kind, Replaced):
                square = (model.hidden_size, model.hidden_size)
                name = f"{layer}.{part}.{linear}.weight"
                change = oracle.linear(normed, self.weight, name, square)
            elif isinstance(kind, Attention):
                change = self.attention(
                    normed, self._angles(), self.weight, prefix=f"{layer}.{part}", model=model,
                    groups=kind.num_query_groups,
                )  # fmt: skip
            else:
                change = self.mlp(normed, self.weight, f"{layer}.{part}", kind.ffn_hidden_size)
            hidden = hidden + change if self.residuals[number] else change
        return hidden

    def _angles(self) -> Array:
        positions = self.position_ids.reshape(-1, self.input_ids.shape[1])
        angles = oracle.rotary_angles(self.model, positions)
        if self.turn is None:
            return angles
        return self.turn(angles, positions, oracle.inverse_frequencies(self.model))


Mistake = tuple[str, str, Setup]
"""Its name, in words, and how it computes."""


def with_(setup: Setup, **changes: Any) -> Setup:  # noqa: ANN401 - its own fields
    """The same but for some fields."""
    return dataclasses.replace(setup, **changes)


def with_model(setup: Setup, **changes: Any) -> Setup:  # noqa: ANN401 - its own fields
    """The same but for some fields of the architecture."""
    return with_(setup, model=dataclasses.replace(setup.model, **changes))
