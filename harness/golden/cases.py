"""The covering set: which traits there are, and the model that each row of them makes.

No published model is here: these are small, synthetic, and as mixed as the family allows. Their
weights come from portable Philox streams, so a record made on one machine holds on any other.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Final, TypeVar

from bridge.errors import ConfigError
from bridge.spec import (
    AttentionSpec,
    BlockSpec,
    FfnSpec,
    GroupedQueryAttention,
    Linear,
    Llama3Scaling,
    ModelSpec,
    NoOp,
    RopeSpec,
    SwiGLU,
)
from bridge.storage.synthetic import synthesize
from bridge.transfer import TransferLimits
from harness.config_forms import ROPE_STYLES, SCHEMAS, write_config
from harness.golden.covering import Factors, Row, covering_rows

PREFIX: Final = "golden-"
"""Of the models' names in case ids; a suite says `golden:NAME`."""

_Kind = TypeVar("_Kind")

_LLAMA: Final = "llama"
_HEADS: Final = 4
_MIXES: Final = ("plain", "with linear", "with no-op", "all kinds")
_SHARD_SIZE: Final = 16_384
"""Bytes: some shards even of the smallest of these models."""

FACTORS: Final = Factors(
    values={
        "schema": (_LLAMA, *SCHEMAS),
        "attention": _MIXES,  # of the blocks after the first
        "ffn": _MIXES,
        "block 0": ("full", "no-op", "linear", "no-op attention", "no-op ffn"),
        "query groups": ("one", "several", "one per head", "unequal"),
        "head_dim": ("absent", "stated", "wider", "narrower"),
        "width": ("even", "odd", "unequal"),
        "vocabulary": ("tiny", "odd", "even", "unpadded"),
        "embeddings": ("tied", "untied"),
        "rope": ("plain", "llama3 x8", "llama3 x16", "other"),
        "rope keys": ROPE_STYLES,
        "epsilon": ("1e-05", "1e-06", "0.0003"),
        "layers": ("1", "4", "7"),
        "context": ("131072", "2048"),
        "dtype": ("float32", "bfloat16"),
    },
    conflicts=(
        ("schema", (_LLAMA,), "attention", _MIXES[1:]),
        ("schema", (_LLAMA,), "ffn", _MIXES[1:]),
        ("schema", (_LLAMA,), "block 0", ("no-op", "linear", "no-op attention", "no-op ffn")),
        ("schema", (_LLAMA,), "query groups", ("unequal",)),
        ("schema", (_LLAMA,), "width", ("unequal",)),
        # `ffn_mult` states multiples of 256 only, and that code computes its head_dim.
        ("schema", ("released",), "width", ("odd",)),
        ("schema", ("released",), "head_dim", ("wider", "narrower")),
        # That code takes 128 for an absent head_dim; the bridge refuses to choose.
        ("schema", ("2025-11",), "head_dim", ("absent",)),
        # One block has nothing after it, and nothing to differ from.
        ("layers", ("1",), "attention", _MIXES[1:]),
        ("layers", ("1",), "ffn", _MIXES[1:]),
        ("layers", ("1",), "block 0", ("no-op", "linear", "no-op attention", "no-op ffn")),
        ("layers", ("1",), "query groups", ("unequal",)),
        ("layers", ("1",), "width", ("unequal",)),
    ),
)
_EXTREMES: Final[dict[str, Row]] = {
    # Models whose other traits would be void; so they are no rows of the set.
    "all-no-op": {"layers": "1", "block 0": "no-op", "schema": "released"},
    "all-linear": {
        "layers": "1", "block 0": "linear", "schema": "puzzletron", "head_dim": "stated",
        "dtype": "bfloat16",
    },
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class GoldenModel:
    """One model of the set.

    Args:
        name: As in file names, without `PREFIX`.
        factors: The traits it was made from.
        spec: What it is.
        config: Its `config.json`, which states just that.
        seed: Of its weights.
    """

    name: str
    factors: Row
    spec: ModelSpec
    config: dict[str, Any]
    seed: int

    @property
    def dtype(self) -> str:
        """What it is recorded in."""
        return self.spec.params_dtype


@cache
def golden_models() -> dict[str, GoldenModel]:
    """The whole set by name, the same on every machine."""
    rows = covering_rows(FACTORS)
    named = {f"{row['schema']}-{number:02}": row for number, row in enumerate(rows, start=1)}
    first = {name: values[0] for name, values in FACTORS.values.items()}
    named |= {name: first | row for name, row in _EXTREMES.items()}
    return {
        name: _model(name, row, seed) for seed, (name, row) in enumerate(named.items(), start=1)
    }


def golden_model(name: str) -> GoldenModel:
    """One model of the set, by its name in case ids or in file names.

    Raises:
        ConfigError: BR100, there is none of this name.
    """
    try:
        return golden_models()[name.removeprefix(PREFIX)]
    except KeyError:
        raise ConfigError(
            f"no golden model is called {name.removeprefix(PREFIX)!r}",
            hint=f"known: {', '.join(golden_models())}",
        ) from None


def write_checkpoint(model: GoldenModel, directory: Path, *, dtype: str | None = None) -> None:
    """Write a model as a Hugging Face checkpoint of several shards.

    Args:
        model: Of the set.
        directory: Created; must not exist.
        dtype: `float32` or `bfloat16`; its own by default.

    Raises:
        TargetExistsError: BR304, the directory is there already.
    """
    directory.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        config = Path(scratch) / "config.json"
        key = "torch_dtype" if "torch_dtype" in model.config else "dtype"
        stated = model.config | {key: dtype or model.dtype}
        config.write_text(json.dumps(stated, indent=2) + "\n", "utf-8")
        synthesize(
            config, directory, seed=model.seed, max_shard_size=_SHARD_SIZE,
            limits=TransferLimits(),
        )  # fmt: skip


def _model(name: str, row: Row, seed: int) -> GoldenModel:
    schema = None if row["schema"] == _LLAMA else row["schema"]
    # No two sizes coincide that a transposed tensor could hide behind.
    hidden, kv_channels = {
        "absent": (24, 6), "stated": (32, 8), "wider": (20, 8), "narrower": (36, 6),
    }[row["head_dim"]]  # fmt: skip
    spec = ModelSpec(
        hidden_size=hidden,
        num_attention_heads=_HEADS,
        kv_channels=kv_channels,
        vocab_size={"tiny": 3, "odd": 61, "even": 70, "unpadded": 128}[row["vocabulary"]],
        max_position_embeddings=int(row["context"]),
        layernorm_epsilon=float(row["epsilon"]),
        rope=_rope(row["rope"]),
        share_embeddings_and_output_weights=row["embeddings"] == "tied",
        params_dtype=row["dtype"],
        blocks=_blocks(row),
        heterogeneous_block_specs=schema is not None,
    )
    config = write_config(
        spec, schema=schema, rope_style=row["rope keys"], state_head_dim=row["head_dim"] != "absent"
    )
    return GoldenModel(name=name, factors=row, spec=spec, config=config, seed=seed)


def _rope(kind: str) -> RopeSpec:
    if kind == "plain":
        return RopeSpec(rotary_base=10000.0)
    factor, low, high, original = {
        "llama3 x8": (8.0, 1.0, 4.0, 8192),
        "llama3 x16": (16.0, 1.0, 4.0, 8192),
        "other": (2.5, 0.5, 3.5, 4096),
    }[kind]
    return RopeSpec(
        rotary_base=12345.678 if kind == "other" else 500000.0,
        scaling=Llama3Scaling(
            factor=factor,
            low_freq_factor=low,
            high_freq_factor=high,
            original_max_position_embeddings=original,
        ),
    )


def _blocks(row: Row) -> tuple[BlockSpec, ...]:
    step = 256 if row["schema"] == "released" else 8
    widths = {
        "even": [5 * 8 if step == 8 else 256],
        "odd": [33],
        "unequal": [256, 512] if step == 256 else [40, 56, 22],
    }[row["width"]]
    groups = {"one": [1], "several": [2], "one per head": [_HEADS], "unequal": [2, 1, _HEADS]}[
        row["query groups"]
    ]
    count = int(row["layers"])

    def attention(layer_idx: int) -> AttentionSpec:
        return GroupedQueryAttention(num_query_groups=groups[layer_idx % len(groups)])

    def ffn(layer_idx: int) -> FfnSpec:
        return SwiGLU(ffn_hidden_size=widths[layer_idx % len(widths)])

    blocks = [_first_block(row["block 0"], attention(0), ffn(0))]
    for layer_idx in range(1, count):
        turn = layer_idx - 1
        kinds = _mix(row["attention"], attention(layer_idx))
        # A step behind, and one more every round, so that every two kinds meet in one block.
        others = _mix(row["ffn"], ffn(layer_idx))
        blocks.append(
            BlockSpec(
                attention=kinds[turn % len(kinds)],
                ffn=others[(turn + 1 + turn // 3) % len(others)],
            )
        )
    return tuple(blocks)


def _first_block(kind: str, attention: AttentionSpec, ffn: FfnSpec) -> BlockSpec:
    match kind:
        case "no-op":
            return BlockSpec(attention=NoOp(), ffn=NoOp())
        case "linear":
            return BlockSpec(attention=Linear(), ffn=Linear())
        case "no-op attention":
            return BlockSpec(attention=NoOp(), ffn=ffn)
        case "no-op ffn":
            return BlockSpec(attention=attention, ffn=NoOp())
        case _:
            return BlockSpec(attention=attention, ffn=ffn)


def _mix(mix: str, whole: _Kind) -> Sequence[_Kind | Linear | NoOp]:
    return {
        "plain": (whole,),
        "with linear": (whole, Linear()),
        "with no-op": (whole, NoOp()),
        "all kinds": (whole, Linear(), NoOp()),
    }[mix]
