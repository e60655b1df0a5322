"""Mistakes of norms, feed-forwards, residuals, the embedding and the head."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Final

import numpy as np

from harness import oracle
from harness.mistakes.setup import Mistake, Setup, with_, with_model
from harness.mistakes.weights import columns_in_order, columns_kept, renamed, transposed
from harness.oracle import Absent, Array, Replaced, Weight

_NEIGHBOURS: Final = 32
"""Other blocks, the nearest first, whose weights a block may have been given."""


def of_norms(setup: Setup) -> Iterator[Mistake]:
    """Epsilon and weights of the norms."""
    for epsilon in (0.0, 1e-12, 1e-8, 1e-6, 1e-5, 3e-4, 1e-4, 1e-3):
        yield (
            "norm-eps",
            f"an epsilon of {epsilon:g}",
            with_model(setup, layernorm_epsilon=epsilon),
        )
    yield "norm-weight-ignored", "norms without their weights", with_(setup, norm=_bare_norm)
    yield "norm-centred", "LayerNorm for RMSNorm", with_(setup, norm=_centred_norm)
    for sign, name in ((-1, "norm-one-less"), (1, "norm-one-more")):
        yield (
            name,
            f"norm weights {sign:+d}: layernorm_1p",
            with_(setup, norm=partial(_shifted_norm, sign)),
        )


def _bare_norm(x: Array, _weight: Weight, _name: str, epsilon: float) -> Array:
    unit: Array = x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + epsilon)
    return unit


def _centred_norm(x: Array, weight: Weight, name: str, epsilon: float) -> Array:
    return oracle.rms_norm(x - x.mean(axis=-1, keepdims=True), weight, name, epsilon)


def _shifted_norm(sign: int, x: Array, weight: Weight, name: str, epsilon: float) -> Array:
    plain = oracle.rms_norm(x, weight, name, epsilon)
    return plain + sign * _bare_norm(x, weight, name, epsilon)


def of_mlp(setup: Setup, width: int) -> Iterator[Mistake]:
    """Halves, activation and shards of a gated feed-forward."""
    weight = setup.weight
    yield (
        "gate-up-swapped",
        "gate and up exchanged",
        with_(setup, weight=renamed(weight, {"gate_proj": "up_proj", "up_proj": "gate_proj"})),
    )
    for name, says, activation in (
        ("gelu-for-silu", "GELU in place of SiLU", _gelu),
        ("gelu-for-silu", "GELU by tanh in place of SiLU", _gelu_tanh),
        ("relu-for-silu", "ReLU in place of SiLU", lambda x: np.maximum(x, 0)),
        ("activation-missing", "no activation", lambda x: x),
    ):
        yield name, says, with_(setup, mlp=partial(_mlp, activation))
    half = width // 2
    order = [*range(half, width), *range(half)]
    yield (
        "fc2-halves-swapped",
        "down's input shards joined in the wrong order",
        with_(setup, weight=columns_in_order(weight, {"down_proj": order})),
    )
    if setup.tp > 1:
        share = width // setup.tp
        order = [
            unit for rank in range(setup.tp - 1, -1, -1)
            for unit in range(rank * share, (rank + 1) * share)
        ]  # fmt: skip
        yield (
            "fc2-shards-reversed",
            "down's shards dealt out backwards",
            with_(setup, weight=columns_in_order(weight, {"down_proj": order})),
        )


def _mlp(
    activation: Callable[[Array], Array], x: Array, weight: Weight, prefix: str, width: int
) -> Array:
    hidden = x.shape[-1]
    gate, up = (
        oracle.linear(x, weight, f"{prefix}.{name}_proj.weight", (width, hidden))
        for name in ("gate", "up")
    )
    return oracle.linear(
        activation(gate) * up, weight, f"{prefix}.down_proj.weight", (hidden, width)
    )


def _gelu(x: Array) -> Array:
    erf = np.vectorize(math.erf, otypes=[np.float64])
    found: Array = 0.5 * x * (1 + erf(x / math.sqrt(2)))
    return found


def _gelu_tanh(x: Array) -> Array:
    found: Array = 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    return found


def of_block(setup: Setup) -> Iterator[Mistake]:
    """Sub-blocks and residuals left out or taken twice; sums that are not summed."""
    model, layer_idx = setup.model, setup.layer_idx
    yield "block-skipped", "the whole block left out", with_(setup, after=lambda _out, x: x)
    yield (
        "no-op-adds-its-input",
        "a no-op run as the identity: the input added twice",
        with_(setup, after=lambda out, x: out + x),
    )
    yield (
        "residual-dropped",
        "the block's input is not added",
        with_(setup, after=lambda out, x: out - x),
    )
    for number, (part, kind) in enumerate(
        zip(("attention", "ffn"), model.blocks[layer_idx], strict=True)
    ):
        if isinstance(kind, Absent):
            continue
        kept = (number != 0, number != 1)
        yield (
            "residual-dropped",
            f"the {part}'s residual is not added",
            with_(setup, residuals=kept),
        )
        blocks = list(model.blocks)
        first, second = blocks[layer_idx]
        blocks[layer_idx] = (Absent(), second) if number == 0 else (first, Absent())
        yield f"{part}-skipped", f"the {part} left out", with_model(setup, blocks=tuple(blocks))
        if isinstance(kind, Replaced):
            name = "linear_attn" if number == 0 else "linear_mlp"
            yield (
                "linear-transposed",
                f"{name} transposed",
                with_(setup, weight=transposed(setup.weight, name)),
            )
    for rank in range(setup.tp if setup.tp > 1 else 0):
        yield (
            "all-reduce-missing",
            f"only TP rank {rank}'s part of each sum",
            with_(setup, weight=columns_kept(setup.weight, rank, setup.tp)),
        )


def of_other_blocks(setup: Setup) -> Iterator[Mistake]:
    """The weights of other blocks."""
    model, mine = setup.model, setup.layer_idx
    order = sorted(range(len(model.blocks)), key=lambda other: (abs(other - mine), other))
    for other in order[1 : _NEIGHBOURS + 1]:
        name = "layers-shifted" if abs(other - mine) == 1 else "layers-swapped"
        yield name, f"computes block {other}'s weights", with_(setup, layer_idx=other)


def of_embedding(setup: Setup) -> Iterator[Mistake]:
    """Rows, tokens and scale of the embedding."""
    size, ids = setup.model.vocab_size, setup.input_ids
    for step in (1, -1):
        yield "embedding-shifted", f"rows {step:+d}", with_(setup, input_ids=(ids + step) % size)
        yield (
            "rank-other-tokens",
            f"tokens moved by {step:+d}",
            with_(setup, input_ids=np.roll(ids, step, axis=-1)),
        )
    root = math.sqrt(setup.model.hidden_size)
    yield (
        "embedding-scaled",
        "times the root of hidden_size",
        with_(setup, after=lambda out, _x: out * root),
    )
    yield (
        "embedding-for-output",
        "rows of the output layer",
        with_(setup, weight=renamed(setup.weight, {"model.embed_tokens": "lm_head"})),
    )


def of_head(setup: Setup) -> Iterator[Mistake]:
    """Tie, gathering and temperature of the output layer."""
    model = setup.model
    yield (
        "tie-ignored",
        "embedding and output layer taken for one, or for two",
        with_model(setup, tied=not model.tied),
    )
    if setup.tp > 1:
        yield (
            "logits-gathered-backwards",
            "vocabulary shards joined backwards",
            with_(setup, after=partial(_gathered_backwards, setup.tp)),
        )
    positions = setup.position_ids.reshape(-1, setup.input_ids.shape[1])
    for scale in (1.1, 1 / 1.1):
        far = np.where(positions >= 8192, scale, 1.0)[..., None]
        yield (
            "far-temperature",
            f"logits beyond position 8192 times {scale:.3g}",
            with_(setup, after=lambda out, _x, far=far: out * far),
        )


def _gathered_backwards(tp: int, logits: Array, _hidden: Array) -> Array:
    size = logits.shape[-1]
    padded = -(-size // (128 * tp)) * 128 * tp
    wide = np.pad(logits, ((0, 0), (0, 0), (0, padded - size)))
    return np.concatenate(np.split(wide, tp, axis=-1)[::-1], axis=-1)[..., :size]
