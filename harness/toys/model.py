"""Small models that keep what makes each published variant hard, and prove that they do.

A toy is cut from the real `config.json`, so it has every field of the original, nulls included.
It states in words what it stands for and carries the predicates; a toy that has lost its property
cannot be built. No two of its dimensions coincide, so no transposed or misplaced tensor fits by
luck, and its weights (`bridge.storage.philox`) are large enough for mistakes to show.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from bridge.dtypes import Words, dtype_named
from bridge.errors import InconsistentConfigError
from bridge.storage import philox
from bridge.tiling import Shape
from harness.oracle import Absent, Architecture, Attention, Mlp, Replaced, Weight, read_config
from harness.toys.properties import COMMON_PROPERTIES, Property

Config = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Toy:
    """A small model with a published variant's traits.

    Args:
        name: Id, as in test ids and `toy:NAME`.
        stands_for: The checkpoint or feature it represents, in words.
        config: Its `config.json`.
        properties: What it must keep; checked when it is built.
        common: What it must keep besides, by default what every toy does.

    Raises:
        InconsistentConfigError: BR104, the toy lost a property; all lost ones are named.
    """

    name: str
    stands_for: str
    config: Config
    properties: tuple[Property, ...]
    common: tuple[Property, ...] = COMMON_PROPERTIES

    def __post_init__(self) -> None:
        """Hold the configuration to every claim."""
        model = self.architecture
        lost = [claim for claim, holds in (*self.common, *self.properties) if not holds(model)]
        if lost:
            raise InconsistentConfigError(
                f"toy {self.name} no longer has what it stands for",
                where=lost,
                hint="change the toy's dimensions, not its properties",
            )

    @property
    def architecture(self) -> Architecture:
        """The oracle's reading of the configuration."""
        return read_config(self.config)

    @property
    def claims(self) -> tuple[str, ...]:
        """Its own properties in words."""
        return tuple(claim for claim, _ in self.properties)

    def config_for(self, dtype: str) -> Config:
        """The configuration of a checkpoint stored in this dtype."""
        key = "torch_dtype" if "torch_dtype" in self.config else "dtype"
        return self.config | {key: dtype}

    def tensors(self) -> dict[str, Shape]:
        """Name and shape of every tensor of the checkpoint, in the model's order."""
        return hf_tensors(self.architecture)

    def words(self, name: str, *, seed: int, dtype: str) -> Words:
        """One tensor's bit patterns, `uint32` for float32, `uint16` for bfloat16."""
        shape = self.tensors()[name]
        kind = dtype_named(dtype)
        out = np.empty(math.prod(shape), kind.word)
        mean, std = philox.mean_and_std(name, shape)
        philox.fill_words(out, kind, seed=seed, name=name, start=0, mean=mean, std=std)
        return out.reshape(shape)

    def weights(
        self, seed: int = 0, *, dtype: str = "float32"
    ) -> Iterator[tuple[str, philox.Float32s]]:
        """Every tensor as float32 numbers, exact; with bfloat16, as rounded to it."""
        lookup = self.weight(seed, dtype=dtype)
        for name in self.tensors():
            yield name, lookup(name)[:].astype(np.float32, copy=False)

    def weight(self, seed: int = 0, *, dtype: str = "float32") -> Weight:
        """The weights by name, as the oracle wants them."""

        def lookup(name: str) -> philox.Float32s:
            words = self.words(name, seed=seed, dtype=dtype)
            return (
                words.view(np.float32) if dtype == "float32" else philox.float32_of_bfloat16(words)
            )

        return lookup


def hf_tensors(model: Architecture) -> dict[str, Shape]:
    """Hugging Face names and shapes of a whole checkpoint, written out block by block."""
    hidden, square = model.hidden_size, (model.hidden_size, model.hidden_size)
    rows = model.num_attention_heads * model.kv_channels
    found: dict[str, Shape] = {"model.embed_tokens.weight": (model.vocab_size, hidden)}
    for layer_idx, (first, second) in enumerate(model.blocks):
        layer = f"model.layers.{layer_idx}"
        match first:
            case Replaced():
                found[f"{layer}.self_attn.linear_attn.weight"] = square
            case Attention(num_query_groups=groups):
                found[f"{layer}.self_attn.q_proj.weight"] = (rows, hidden)
                found[f"{layer}.self_attn.k_proj.weight"] = (groups * model.kv_channels, hidden)
                found[f"{layer}.self_attn.v_proj.weight"] = (groups * model.kv_channels, hidden)
                found[f"{layer}.self_attn.o_proj.weight"] = (hidden, rows)
            case Absent():
                pass
        match second:
            case Replaced():
                found[f"{layer}.mlp.linear_mlp.weight"] = square
            case Mlp(ffn_hidden_size=width):
                found[f"{layer}.mlp.gate_proj.weight"] = (width, hidden)
                found[f"{layer}.mlp.up_proj.weight"] = (width, hidden)
                found[f"{layer}.mlp.down_proj.weight"] = (hidden, width)
            case Absent():
                pass
        if not isinstance(first, Absent):
            found[f"{layer}.input_layernorm.weight"] = (hidden,)
        if not isinstance(second, Absent):
            found[f"{layer}.post_attention_layernorm.weight"] = (hidden,)
    found["model.norm.weight"] = (hidden,)
    if not model.tied:
        found["lm_head.weight"] = (model.vocab_size, hidden)
    return found
