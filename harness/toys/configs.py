"""Cutting a toy's `config.json` from a published one: same fields, smaller numbers."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from typing import Any, Final

from bridge.errors import InconsistentConfigError
from harness.locations import suites_dir

Config = dict[str, Any]
LINEAR: Final = "linear"
Part = float | str | None
"""A sub-block in short: its number in the schema's own words, LINEAR, or None for a no-op."""


def published_config(name: str) -> Config:
    """The real `config.json` of a published checkpoint, from `suites/variants/`."""
    loaded: Config = json.loads((suites_dir() / "variants" / f"{name}.json").read_text("utf-8"))
    return loaded


def shrink(real: Mapping[str, Any], *, vocab_size: int, **changes: object) -> Config:
    """The real configuration with some values changed and no field added or lost.

    The vocabulary's special ids move below the new vocabulary size.

    Raises:
        InconsistentConfigError: BR104, a change names a field the original does not have.
    """
    unknown = sorted(changes.keys() - real.keys())
    if unknown:
        raise InconsistentConfigError("a toy has exactly the fields of its original", where=unknown)
    ids = {
        "vocab_size": vocab_size,
        "bos_token_id": vocab_size - 7,
        "eos_token_id": [vocab_size - 6, vocab_size - 4, vocab_size - 3],
    }
    return copy.deepcopy(dict(real)) | ids | changes


def released_blocks(real: Mapping[str, Any], parts: list[tuple[Part, Part]]) -> list[Config]:
    """Blocks in the released schema: (n_heads_in_group, ffn_mult) each, all fields kept."""
    template = real["block_configs"][0]
    return [
        {
            "attention": template["attention"] | _part("n_heads_in_group", attention),
            "ffn": template["ffn"] | _part("ffn_mult", ffn),
        }
        for attention, ffn in parts
    ]


def puzzle_blocks(parts: list[tuple[Part, Part]]) -> list[Config]:
    """Blocks in the newer schema: (num_key_value_heads, intermediate_size) each."""
    attention_rest = {
        "llama4": None,
        "mamba": None,
        "num_sink_tokens": None,
        "sparsify": None,
        "unshifted_sink": False,
        "use_prefill_window_in_sink_attention": False,
        "window_length": None,
    }
    ffn_rest = {"gated": True, "hidden_act": "silu", "moe": None, "sparsify": None}
    return [
        {
            "attention": attention_rest | _part("num_key_value_heads", attention),
            "ffn": ffn_rest | _part("intermediate_size", ffn),
            "parallel_blocks": None,
        }
        for attention, ffn in parts
    ]


def _part(key: str, value: Part) -> Config:
    number = None if value == LINEAR else value
    return {key: number, "no_op": value is None, "replace_with_linear": value == LINEAR}
