"""Which programs that run Hugging Face checkpoints cannot take a model of this family, and why.

An export gives a valid Hugging Face directory whatever its blocks are; some of its consumers read
only a part of what DeciLM can say, and not all of them notice. What is said here was read in their
own loaders, of the versions named.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from bridge.plan import ranges
from bridge.spec import BlockSpec, GroupedQueryAttention, Linear, ModelSpec, NoOp

Refusal = Callable[[ModelSpec, Mapping[str, Any]], str | None]
"""Why it cannot take a model with this configuration; None when this is no obstacle."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Consumer:
    """A program, and everything that keeps a model of this family from running in it.

    Args:
        name: As its users know it.
        source: What was read, and of which version.
        refusals: Obstacles.
    """

    name: str
    source: str
    refusals: Sequence[Refusal]


def _blocks(spec: ModelSpec, has: Callable[[BlockSpec], bool]) -> str:
    found = [index for index, block in enumerate(spec.blocks) if has(block)]
    return ranges(found) if found else ""


def _linear_attention(spec: ModelSpec, _: Mapping[str, Any]) -> str | None:
    found = _blocks(spec, lambda block: isinstance(block.attention, Linear))
    return f"no linear layer in place of attention (blocks {found})" if found else None


def _linear_ffn(spec: ModelSpec, _: Mapping[str, Any]) -> str | None:
    found = _blocks(spec, lambda block: isinstance(block.ffn, Linear))
    return f"no linear layer in place of an FFN (blocks {found})" if found else None


def _attention_without_ffn(spec: ModelSpec, _: Mapping[str, Any]) -> str | None:
    found = _blocks(
        spec,
        lambda block: (
            isinstance(block.attention, GroupedQueryAttention) and isinstance(block.ffn, NoOp)
        ),
    )
    return f"it loses the attention of blocks without an FFN (blocks {found})" if found else None


def _newer_schema(spec: ModelSpec, config: Mapping[str, Any]) -> str | None:
    keys = {"n_heads_in_group": "attention", "ffn_mult": "ffn"}
    blocks = config.get("block_configs")
    if not spec.heterogeneous_block_specs or not isinstance(blocks, list):
        return None
    missing = [
        key
        for key, half in keys.items()
        if any(isinstance(block, dict) and key not in (block.get(half) or {}) for block in blocks)
    ]
    return f"it reads {' and '.join(missing)}, which these blocks do not say" if missing else None


def _whole_first_ffn_mult(_: ModelSpec, config: Mapping[str, Any]) -> str | None:
    blocks = config.get("block_configs")
    ffn = blocks[0].get("ffn") if isinstance(blocks, list) and blocks else None
    value = ffn.get("ffn_mult") if isinstance(ffn, dict) else None
    if isinstance(value, int):
        return f"it wants the first ffn_mult written as {value}.0, not {value}"
    return None


CONSUMERS: Final = (
    Consumer(
        name="vLLM",
        source="vllm/model_executor/models/nemotron_nas.py",
        refusals=(_linear_attention, _linear_ffn),
    ),
    Consumer(
        name="SGLang",
        source="sglang 0.5.23, srt/models/nemotron_nas.py; it warns of what it does not load",
        refusals=(_linear_attention, _linear_ffn, _newer_schema),
    ),
    Consumer(
        name="llama.cpp",
        source="convert_hf_to_gguf.py, DeciModel; names in gguf 0.19.0",
        refusals=(_linear_ffn, _attention_without_ffn, _whole_first_ffn_mult),
    ),
    Consumer(
        name="mlx-lm",
        source="mlx-lm 0.32.2, models/nemotron-nas.py",
        refusals=(_linear_attention, _linear_ffn, _newer_schema),
    ),
)


def consumer_refusals(spec: ModelSpec, config: Mapping[str, Any]) -> dict[str, list[str]]:
    """By consumer, why it cannot take the model; those that can are not there.

    Args:
        spec: The model.
        config: Its `config.json`, as exported.
    """
    found = {
        one.name: [reason for refuses in one.refusals if (reason := refuses(spec, config))]
        for one in CONSUMERS
    }
    return {name: reasons for name, reasons in found.items() if reasons}


def consumer_notes(spec: ModelSpec, config: Mapping[str, Any]) -> list[str]:
    """The same as lines of a report."""
    return [
        f"{name} cannot take this model: {'; '.join(reasons)}"
        for name, reasons in consumer_refusals(spec, config).items()
    ]
