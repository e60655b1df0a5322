"""DeciLM's `block_configs`, in each of the dense schemas that were published.

| schema | query groups | FFN width |
| --- | --- | --- |
| `released` (51B, Super, Ultra) | `num_attention_heads // n_heads_in_group` | `ffn_mult`, rounded |
| `2025-11` | `num_attention_heads // n_heads_in_group` | `intermediate_size` |
| `puzzletron` (AnyModel) | `num_key_value_heads` | `intermediate_size` |

The keys decide, block by block; what a schema adds for other architectures (MoE, Mamba, parallel
blocks, sinks, windows) must be off.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from bridge.errors import ConfigError
from bridge.hf_fields import Findings, is_number, same_value
from bridge.spec import (
    MAX_LAYERS,
    AttentionSpec,
    BlockSpec,
    FfnSpec,
    GroupedQueryAttention,
    Linear,
    ModelSpec,
    NoOp,
    SwiGLU,
)

_OFF: Final = (None, False)

# Field of a sub-block -> the values Megatron-Core can express.
_ATTENTION_OFF: Final[Mapping[str, tuple[object, ...]]] = {
    "window_length": _OFF,
    "num_sink_tokens": _OFF,
    "use_prefill_window_in_sink_attention": _OFF,
    "unshifted_sink": _OFF,
    "sparsify": _OFF,
    "llama4": _OFF,
    "mamba": _OFF,
}
_FFN_OFF: Final[Mapping[str, tuple[object, ...]]] = {
    "sparsify": _OFF,
    "moe": _OFF,
    "hidden_act": (None, "silu"),
    "gated": (None, True),
}
_BLOCK_OFF: Final[Mapping[str, tuple[object, ...]]] = {"parallel_blocks": (None, False, [])}
_ATTENTION_KEYS: Final = frozenset(
    {"no_op", "replace_with_linear", "n_heads_in_group", "num_key_value_heads", "num_kv_heads"}
)
_FFN_KEYS: Final = frozenset({"no_op", "replace_with_linear", "ffn_mult", "intermediate_size"})


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockSchema:
    """How one generation of the configuration spells groups and widths."""

    groups_key: str
    width_key: str

    def matches(self, blocks: object) -> bool:
        """Whether every block spells both in this schema."""
        return isinstance(blocks, list) and all(
            isinstance(block, Mapping)
            and isinstance(attention := block.get("attention"), Mapping)
            and isinstance(ffn := block.get("ffn"), Mapping)
            and self.groups_key in attention
            and self.width_key in ffn
            for block in blocks
        )


BLOCK_SCHEMAS: Final[Mapping[str, BlockSchema]] = {
    "released": BlockSchema(groups_key="n_heads_in_group", width_key="ffn_mult"),
    "2025-11": BlockSchema(groups_key="n_heads_in_group", width_key="intermediate_size"),
    "puzzletron": BlockSchema(groups_key="num_key_value_heads", width_key="intermediate_size"),
}


def ffn_mult_to_width(ffn_mult: float, hidden_size: int) -> int:
    """`ffn_hidden_size` of an `ffn_mult`: two thirds of it, rounded up to a multiple of 256.

    The multiplier is first rounded to six digits, as the published configuration class does on
    load. Source: megatron-core 0.16.1 `MLPConfig.ffn_mult_to_intermediate_size`, and the released
    checkpoints' own code.
    """
    width = int(2 * round(ffn_mult, 6) * hidden_size / 3)
    return -(-width // 256) * 256


def width_to_ffn_mult(width: int, hidden_size: int) -> float | None:
    """A multiplier that gives exactly this width, None when the schema cannot say it."""
    for target in (width, width - 0.5, width - 1, width - 128):
        candidate = round(target * 3 / (2 * hidden_size), 6)
        if candidate > 0 and ffn_mult_to_width(candidate, hidden_size) == width:
            return candidate
    return None


def read_blocks(
    blocks: object,
    *,
    hidden_size: int,
    num_attention_heads: int,
    num_layers: int,
    findings: Findings,
) -> tuple[BlockSpec, ...]:
    """Read every block; problems go to `findings`, named by block and field."""
    if not isinstance(blocks, list):
        findings.inconsistent.append("block_configs must be a list")
        return ()
    if len(blocks) != num_layers:
        findings.inconsistent.append(
            f"block_configs has {len(blocks)} entries, num_hidden_layers={num_layers}"
        )
    if len(blocks) > MAX_LAYERS:  # none of them is looked at: they need not be cheap to refuse
        findings.inconsistent.append(f"block_configs has {len(blocks)} entries, beyond any model")
        return ()
    found = []
    for layer_idx, block in enumerate(blocks):
        place = f"block_configs[{layer_idx}]"
        if not isinstance(block, Mapping):
            findings.inconsistent.append(f"{place} must be an object")
            continue
        _check_keys(block, _BLOCK_OFF, {"attention", "ffn"}, place, findings)
        attention = _read_attention(
            block.get("attention"), num_attention_heads, f"{place}.attention", findings
        )
        ffn = _read_ffn(block.get("ffn"), hidden_size, f"{place}.ffn", findings)
        found.append(BlockSpec(attention=attention, ffn=ffn))
    return tuple(found)


def _check_keys(
    values: Mapping[str, Any],
    off: Mapping[str, tuple[object, ...]],
    known: set[str] | frozenset[str],
    place: str,
    findings: Findings,
) -> None:
    for key, value in values.items():
        if key in off:
            if not any(same_value(value, one) for one in off[key]):
                findings.unsupported.append(f"{place}.{key}={value!r}")
        elif key not in known:
            findings.unmapped.append(f"{place}.{key}")


def _kind(values: Mapping[str, Any], place: str, findings: Findings) -> NoOp | Linear | None:
    flags = {}
    for key in ("no_op", "replace_with_linear"):
        flag = values.get(key, False)
        if flag is not None and not isinstance(flag, bool):
            findings.inconsistent.append(f"{place}.{key}={flag!r} must be true or false")
        flags[key] = flag is True
    if flags["no_op"] and flags["replace_with_linear"]:
        findings.inconsistent.append(f"{place} is both no_op and replace_with_linear")
    if flags["no_op"]:
        return NoOp()
    return Linear() if flags["replace_with_linear"] else None


def _count(value: object) -> int | None:
    good = isinstance(value, int) and not isinstance(value, bool) and 0 < value < 2**40
    return value if good else None  # type: ignore[return-value]  # `good` has narrowed it


def _read_attention(
    values: object, num_attention_heads: int, place: str, findings: Findings
) -> AttentionSpec:
    if not isinstance(values, Mapping):
        findings.inconsistent.append(f"{place} must be an object")
        return NoOp()
    _check_keys(values, _ATTENTION_OFF, _ATTENTION_KEYS, place, findings)
    kind = _kind(values, place, findings)
    if kind is not None:
        return kind
    stated = []
    for key in ("num_key_value_heads", "num_kv_heads", "n_heads_in_group"):
        if values.get(key) is None:
            continue
        number = _count(values[key])
        if number is None:
            findings.inconsistent.append(
                f"{place}.{key}={values[key]!r} must be a positive integer"
            )
        elif num_attention_heads % number:
            findings.inconsistent.append(
                f"{place}.{key}={number} does not divide num_attention_heads={num_attention_heads}"
            )
        else:
            stated.append(num_attention_heads // number if key == "n_heads_in_group" else number)
            continue
        return NoOp()
    if len(set(stated)) != 1:
        what = (
            "contradictory head counts"
            if stated
            else "neither n_heads_in_group nor num_key_value_heads"
        )
        findings.inconsistent.append(f"{place}: {what}")
        return NoOp()
    return GroupedQueryAttention(num_query_groups=stated[0])


def _read_ffn(values: object, hidden_size: int, place: str, findings: Findings) -> FfnSpec:
    if not isinstance(values, Mapping):
        findings.inconsistent.append(f"{place} must be an object")
        return NoOp()
    _check_keys(values, _FFN_OFF, _FFN_KEYS, place, findings)
    kind = _kind(values, place, findings)
    if kind is not None:
        return kind
    stated = []
    if values.get("intermediate_size") is not None:
        stated.append(_count(values["intermediate_size"]))
    mult = values.get("ffn_mult")
    if mult is not None:
        good = is_number(mult) and 0 < mult < 1e6
        stated.append(ffn_mult_to_width(mult, hidden_size) if good else None)
    if len(set(stated)) != 1 or not stated[0]:
        what = (
            "a width that is contradictory or not a positive number"
            if stated
            else "neither ffn_mult nor intermediate_size"
        )
        findings.inconsistent.append(f"{place}: {what}")
        return NoOp()
    return SwiGLU(ffn_hidden_size=stated[0])


def write_blocks(spec: ModelSpec, *, schema: str | None) -> tuple[list[dict[str, Any]], str]:
    """Write `block_configs` for a spec.

    Returns:
        The blocks and the name of the schema used.

    Raises:
        ConfigError: BR100, the schema asked for cannot say this model's widths or head size.
    """
    expressible = spec.kv_channels * spec.num_attention_heads == spec.hidden_size and all(
        width_to_ffn_mult(block.ffn.ffn_hidden_size, spec.hidden_size) is not None
        for block in spec.blocks
        if isinstance(block.ffn, SwiGLU)
    )
    name = schema or ("released" if expressible else "puzzletron")
    if name not in BLOCK_SCHEMAS:
        raise ConfigError(
            f"unknown block schema {name!r}", hint=f"known: {', '.join(BLOCK_SCHEMAS)}"
        )
    if name == "released" and not expressible:
        raise ConfigError(
            "the released block schema cannot state these FFN widths or this head size",
            hint="widths must be multiples of 256 and head_dim hidden_size // num_attention_heads; "
            "use schema 'puzzletron'",
        )
    return [_write_block(block, spec, BLOCK_SCHEMAS[name]) for block in spec.blocks], name


def _write_block(block: BlockSpec, spec: ModelSpec, schema: BlockSchema) -> dict[str, Any]:
    groups: int | None = None
    match block.attention:
        case GroupedQueryAttention(num_query_groups=count):
            by_head = schema.groups_key == "n_heads_in_group"
            groups = spec.num_attention_heads // count if by_head else count
        case Linear() | NoOp():
            pass
    width: float | None = None
    match block.ffn:
        case SwiGLU(ffn_hidden_size=size):
            by_mult = schema.width_key == "ffn_mult"
            width = width_to_ffn_mult(size, spec.hidden_size) if by_mult else size
        case Linear() | NoOp():
            pass
    return {
        "attention": {
            schema.groups_key: groups,
            "no_op": isinstance(block.attention, NoOp),
            "num_sink_tokens": None,
            "replace_with_linear": isinstance(block.attention, Linear),
            "sparsify": None,
            "unshifted_sink": False,
            "use_prefill_window_in_sink_attention": False,
            "window_length": None,
        },
        "ffn": {
            schema.width_key: width,
            "no_op": isinstance(block.ffn, NoOp),
            "replace_with_linear": isinstance(block.ffn, Linear),
            "sparsify": None,
        },
    }
