"""Tiles of live tensors by name, and what bits mean in words.

A line of a tensor is a row where outputs are dealt out to ranks, a column where inputs are; a norm
is one line.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np

from harness import oracle
from harness.compare import Words, read_safetensors, words_of

Line = tuple[str | None, int]
"""A Hugging Face tensor and a row of it, or a column, or 0 for a norm; None for padding."""
Numbers = np.ndarray[Any, np.dtype[np.float64]]
LAYER: Final = re.compile(r"(?:model|decoder)\.layers\.(\d+)\.(.+)")
ENDLESS: Final = 1 << 62
"""The last line of a tile that is a whole tensor."""


def short_name(name: str) -> str:
    """`decoder.layers.7.self_attention.linear_qkv.weight` as "layer 7 linear_qkv"."""
    match = LAYER.fullmatch(name)
    leaf = (match[2] if match else name).removesuffix(".weight")
    for prefix in ("self_attention.linear_", "mlp.linear_", "self_attn.", "decoder.", "model."):
        if leaf.startswith(prefix):
            leaf = leaf.removeprefix(prefix if not prefix.endswith("linear_") else prefix[:-7])
    return f"layer {match[1]} {leaf}" if match else leaf


def layer_of(tensor: str) -> int:
    """The layer in a short name, for sorting: the embedding first, the head last."""
    match = re.match(r"layer (\d+) ", tensor)
    return int(match[1]) if match else -1 if "embedding" in tensor else 1 << 30


class Source:
    """Lines of the Hugging Face checkpoint, in the dtype that a rank holds them in."""

    def __init__(self, hf: Path, model: oracle.Architecture) -> None:
        self._tensors: Mapping[str, Any] = read_safetensors(hf)
        self.model = model
        self._kept: tuple[tuple[str, str, bool], Words] | None = None

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def lines(self, name: str, dtype: str, *, by_column: bool) -> Words:
        """All lines of a tensor, (lines, length)."""
        key = name, dtype, by_column
        if self._kept is None or self._kept[0] != key:
            import torch

            tensor = self._tensors[name].to(getattr(torch, dtype.removeprefix("torch.")))
            words = words_of(tensor)
            words = words[None] if words.ndim == 1 else words
            self._kept = key, words.T if by_column else words
        return self._kept[1]

    def others(self, name: str) -> list[str]:
        """Tensors that `name` could be taken for: other layers' and, of a norm, other norms."""
        match = LAYER.fullmatch(name)
        if match is None:
            twins = {"model.embed_tokens.weight": ["lm_head.weight"],
                     "lm_head.weight": ["model.embed_tokens.weight"]}.get(name, [])  # fmt: skip
            return [one for one in twins if one in self]
        leaves = [match[2]]
        if "layernorm" in match[2]:
            leaves = ["input_layernorm.weight", "post_attention_layernorm.weight"]
        mine = int(match[1])
        order = sorted(range(len(self.model.blocks)), key=lambda idx: abs(idx - mine))
        names = [f"model.layers.{layer_idx}.{leaf}" for layer_idx in order for leaf in leaves]
        return [one for one in names if one != name and one in self]

    def tile(self, line: Line, *, from_layer: int | None) -> tuple[str, int, int]:
        """The tile that a line belongs to: its name, its first line and the one after its last."""
        name, number = line
        if name is None:
            return "the vocabulary's padding", 0, ENDLESS
        match = LAYER.fullmatch(name)
        if match is None:
            if name == "model.norm.weight":
                return "the final norm", 0, 1
            return "output rows" if name == "lm_head.weight" else "tokens", 0, ENDLESS
        layer_idx, leaf = int(match[1]), match[2].removesuffix(".weight")
        prefix = "" if layer_idx == from_layer else f"layer {layer_idx}'s "
        label, first, last = _tile(self.model, layer_idx, leaf, number)
        return prefix + label, first, last


def _tile(
    model: oracle.Architecture, layer_idx: int, leaf: str, number: int
) -> tuple[str, int, int]:
    channels = model.kv_channels
    head = number // channels
    span = head * channels, (head + 1) * channels
    attention = model.blocks[layer_idx][0]
    match leaf:
        case "self_attn.q_proj" | "self_attn.o_proj" if isinstance(attention, oracle.Attention):
            group = head // (model.num_attention_heads // attention.num_query_groups)
            return f"query group {group}'s head {head}", *span
        case "self_attn.k_proj":
            return f"query group {head}'s K", *span
        case "self_attn.v_proj":
            return f"query group {head}'s V", *span
        case "input_layernorm":
            return "the norm before attention", 0, 1
        case "post_attention_layernorm":
            return "the norm before the feed-forward", 0, 1
        case _:
            part = leaf.rpartition(".")[2].removesuffix("_proj")
            return part, 0, ENDLESS


def numbers_of(words: Words, dtype: str) -> Numbers:
    """Bit patterns as numbers."""
    import torch

    signed = np.ascontiguousarray(words).view(np.dtype(f"i{words.itemsize}"))
    tensor = torch.from_numpy(signed).view(getattr(torch, dtype.removeprefix("torch.")))
    found: Numbers = tensor.double().numpy()
    return found


def as_numbers(actual: Words, wanted: Words, dtype: str) -> tuple[str, str] | None:
    """NaN, one value throughout, a multiple, or a constant more: said as such."""
    ours, right = numbers_of(actual, dtype), numbers_of(wanted, dtype)
    if np.isnan(ours).all():
        return "NaN", "not-loaded"
    if not np.isfinite(ours).all():
        return f"{int((~np.isfinite(ours)).sum())} of {ours.size} NaN or infinite", ""
    if ours.size < 2:
        return None
    if (ours == ours.flat[0]).all() and not (right == right.flat[0]).all():
        value = float(ours.flat[0])
        return {0.0: "zeros", 1.0: "ones"}.get(value, f"{value:.6g} throughout"), "not-loaded"
    precision = 4 * {2: 2.0**-8, 4: 2.0**-24}.get(actual.itemsize, 2.0**-53)
    size = float(np.abs(right).max())
    ratio = float((ours * right).sum() / max(float((right * right).sum()), 1e-300))
    if size and np.abs(ours - ratio * right).max() <= precision * max(1, abs(ratio)) * size:
        return f"x {ratio:.6g}", "scaled"
    offset = float(np.median(ours - right))
    largest = max(size, float(np.abs(ours).max()))
    if np.abs(ours - right - offset).max() <= precision * largest < abs(offset):
        return f"{offset:+.6g} throughout", "shifted"
    return None


def one_element(index: Sequence[int], ours: int, right: int, dtype: str) -> tuple[str, str]:
    """Say how one element differs; as a flipped bit where it is one."""
    flipped = ours ^ right
    place = f"element {list(index)}"
    if flipped.bit_count() == 1:
        return f"1 {place}: bit {flipped.bit_length() - 1} flipped", "bit-flipped"
    width = 16 if "16" in dtype else 64 if "64" in dtype else 32
    both = np.array([ours, right], dtype=f"u{width // 8}")
    a, b = numbers_of(both, dtype).tolist()
    return f"1 {place}: holds {a:.9g}, Megatron reads {b:.9g}", "one-element"
