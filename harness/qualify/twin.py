"""The shrunk twin of an architecture: the same kinds of blocks in the same order, small sizes.

Faults, layouts and gradients need whole models on several ranks, and hundreds of runs. A published
variant is too large for that and a toy of another variant would prove another model. The twin is
cut from the configuration in question: a part of its blocks, none moved, and the smallest sizes at
which every trait (see `harness.qualify.traits`) is the original's. It is built as a toy, so a twin
that has lost a trait cannot be built.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from bridge.errors import BridgeError, InconsistentConfigError, UnsupportedFieldError
from bridge.hf_config import spec_from_hf_config
from bridge.parameters import num_parameters
from harness.faults import CATALOGUE, applicable
from harness.oracle import Architecture, Attention, Mlp, read_config
from harness.qualify.traits import traits_of
from harness.toys import Toy
from harness.toys.properties import Property

Config = dict[str, Any]
_FEWEST_BLOCKS: Final = 6
"""Kept where the original has them: virtual stages on two pipeline ranks, and an uneven split."""
_CHANNELS: Final = (8, 12, 16, 24, 32, 48, 64, 96, 128)
_VOCAB_STEP: Final = 512
"""Vocabularies that differ by multiples of it are padded alike at TP 1, 2 and 4."""
_RELEASED_STEP: Final = 256
"""What `ffn_mult` rounds widths up to."""
_IDS: Final = ("bos_token_id", "eos_token_id", "pad_token_id")
_MOST_PARAMETERS: Final = 200_000_000
"""Of a twin, five times the largest of a published variant."""
_ANOTHER_WAY: Final = (
    "qualify it by `verify` at its own size, and prove the checks on a toy: `faults`"
)
_SEARCHED: Final = 16
"""Vocabularies tried at one head size until no two dimensions coincide by luck."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Twin:
    """A small model and where its blocks come from.

    Args:
        toy: The model.
        layer_idx: For each of its blocks the original's, increasing.
    """

    toy: Toy
    layer_idx: tuple[int, ...]


def make_twin(name: str, config: Mapping[str, Any]) -> Twin:
    """Cut the smallest twin of a configuration that has all its traits.

    Args:
        name: What to call it.
        config: A `config.json` that both the bridge and the oracle read.

    Raises:
        InconsistentConfigError: BR104, a special token that is no id.
        UnsupportedFieldError: BR103, no smaller model has the traits, those that the best of them
            lost are named; or none that is small.
    """
    _refuse_odd_ids(config)
    model = read_config(config)
    chosen = _blocks_kept(model)
    wanted = traits_of(model)
    properties = tuple(_keeps(trait, value) for trait, value in wanted.items())
    spoilable = faults_of(config)
    lost: list[str] = list(wanted)
    for candidate in _candidates(config, model, chosen):
        try:
            found = traits_of(read_config(candidate))
            missing = [trait for trait, value in wanted.items() if found[trait] != value]
            lacking = set() if missing else spoilable - faults_of(candidate)
        except (BridgeError, ValueError, KeyError, ZeroDivisionError):
            continue
        missing += [f"something that {fault} spoils" for fault in sorted(lacking)]
        if not missing:
            _refuse_large(candidate)
            toy = Toy(
                name=name,
                stands_for=f"the traits of a model of {len(model.blocks)} blocks, shrunk",
                config=candidate,
                properties=properties,
                common=(),
            )
            return Twin(toy=toy, layer_idx=chosen)
        lost = min(lost, missing, key=len)
    raise UnsupportedFieldError(
        "no small model has all the traits of this one, so faults could not be tried on its like",
        where=lost,
        hint=_ANOTHER_WAY,
    )


def _refuse_large(config: Mapping[str, Any]) -> None:
    """Refuse a twin on which hundreds of runs would take days; smaller ones lack a trait."""
    size = num_parameters(spec_from_hf_config(config))
    if size > _MOST_PARAMETERS:
        raise UnsupportedFieldError(
            f"the smallest model with all the traits of this one has {size:,} parameters, at most "
            f"{_MOST_PARAMETERS:,} can go through every layout and fault",
            where=f"{config['num_hidden_layers']} blocks, hidden_size {config['hidden_size']}",
            hint=_ANOTHER_WAY,
        )


def faults_of(config: Mapping[str, Any]) -> set[str]:
    """The faults that a model can have; its twin must be able to have each of them."""
    spec = spec_from_hf_config(config)
    return {name for name, fault in CATALOGUE.items() if applicable(fault, spec)}


def _keeps(trait: str, value: object) -> Property:
    return f"{trait}: {value}", lambda model: traits_of(model)[trait] == value


# Which blocks


def _blocks_kept(model: Architecture) -> tuple[int, ...]:
    """A part of the blocks, in order: each distinct one, each pair of neighbouring kinds, ends."""
    kinds = [(type(one), type(other)) for one, other in model.blocks]
    first: dict[object, int] = {}
    for layer_idx, block in enumerate(model.blocks):
        first.setdefault(block, layer_idx)
    kept = {0, len(kinds) - 1, *first.values()}
    _share_a_width(model, kept)
    while len(kept) < min(_FEWEST_BLOCKS, len(kinds)):
        kept.add(min(set(range(len(kinds))) - kept))
    _mend_neighbours(kinds, kept)
    return tuple(sorted(kept))


def _share_a_width(model: Architecture, kept: set[int]) -> None:
    """Keep a second block of some width where the original has one."""
    seen: dict[int, int] = {}
    for layer_idx, (_, ffn) in enumerate(model.blocks):
        if isinstance(ffn, Mlp):
            if ffn.ffn_hidden_size in seen:
                kept |= {seen[ffn.ffn_hidden_size], layer_idx}
                return
            seen[ffn.ffn_hidden_size] = layer_idx


def _mend_neighbours(kinds: Sequence[object], kept: set[int]) -> None:
    """Keep blocks until the kinds that follow one another are those of the original.

    A pair that the original lacks is undone by what lies between the two; a pair that is lost is
    kept whole. Both add blocks, so it ends, at the latest with all of them.
    """
    wanted = set(itertools.pairwise(kinds))
    while True:
        order = sorted(kept)
        made = {(kinds[a], kinds[b]): (a, b) for a, b in itertools.pairwise(order)}
        foreign = next((gap for pair, gap in made.items() if pair not in wanted), None)
        if foreign is not None:
            kept |= _bridge(kinds, foreign, wanted)
            continue
        lost = wanted - made.keys()
        if not lost:
            return
        pairs = enumerate(itertools.pairwise(kinds))
        start = next(number for number, pair in pairs if pair in lost)
        kept |= {start, start + 1}


def _bridge(kinds: Sequence[object], gap: tuple[int, int], wanted: set[Any]) -> set[int]:
    """The fewest blocks between two, in order, with which only wanted pairs are neighbours."""
    start, stop = gap
    routes: dict[int, tuple[int, ...]] = {start: ()}
    for layer_idx in range(start + 1, stop + 1):
        before = [
            (*route, layer_idx)
            for earlier, route in routes.items()
            if (kinds[earlier], kinds[layer_idx]) in wanted
        ]
        if before:
            routes[layer_idx] = min(before, key=len)
    return set(routes[stop][:-1])


# Which sizes


def _candidates(
    config: Mapping[str, Any], model: Architecture, chosen: Sequence[int]
) -> Iterator[Config]:
    """Smaller configurations of these blocks, smallest first."""
    groups = [one.num_query_groups for one, _ in model.blocks if isinstance(one, Attention)]
    common = math.gcd(model.num_attention_heads, *groups)
    if not groups:  # nothing has heads, and yet the configuration counts them
        common = model.num_attention_heads
    divisors = sorted((n for n in range(1, common + 1) if common % n == 0), reverse=True)
    channels = [one for one in _CHANNELS if one < model.kv_channels] + [model.kv_channels]
    sizes = sorted(
        ((model.num_attention_heads // divisor) * size, divisor, size)
        for divisor in divisors
        for size in channels
    )
    for _, divisor, kv_channels in sizes:
        for attempt in range(_SEARCHED):
            yield _shrunk(
                config, model, chosen, divisor=divisor, kv_channels=kv_channels, attempt=attempt
            )


def _shrunk(
    config: Mapping[str, Any], model: Architecture, chosen: Sequence[int], *,
    divisor: int, kv_channels: int, attempt: int,
) -> Config:  # fmt: skip
    heads = model.num_attention_heads // divisor
    rows = model.num_attention_heads * model.kv_channels
    hidden = heads * max(1, round(kv_channels * model.hidden_size / rows))
    if np.sign(hidden - heads * kv_channels) != np.sign(model.hidden_size - rows):
        hidden = heads * (kv_channels + (1 if model.hidden_size > rows else -1))
    by_mult = any(
        block.get("ffn", {}).get("ffn_mult") is not None
        for block in config.get("block_configs") or ()
    )
    widths = _widths(model, hidden, taken={hidden, heads * kv_channels}, by_mult=by_mult)
    vocab_size = min(model.vocab_size, model.vocab_size % _VOCAB_STEP + _VOCAB_STEP * (1 + attempt))
    found: Config = copy.deepcopy(dict(config))
    found |= {
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "num_hidden_layers": len(chosen),
        "vocab_size": vocab_size,
    }
    if found.get("head_dim") is not None:
        found["head_dim"] = kv_channels
    if found.get("num_key_value_heads") is not None:
        found["num_key_value_heads"] //= divisor
    if found.get("intermediate_size") is not None and found.get("block_configs") is None:
        found["intermediate_size"] = widths[found["intermediate_size"]]
    if found.get("block_configs") is not None:
        found["block_configs"] = [
            _block(found["block_configs"][layer_idx], model.blocks[layer_idx][1], widths,
                   hidden=hidden, divisor=divisor)
            for layer_idx in chosen
        ]  # fmt: skip
    _lower_ids(found, vocab_size)
    return found


def _widths(model: Architecture, hidden: int, *, taken: set[int], by_mult: bool) -> dict[int, int]:
    """Small widths by the original's: in its order, near its ratio to hidden_size, all distinct."""
    found: dict[int, int] = {}
    least = 0
    for width in sorted({one.ffn_hidden_size for _, one in model.blocks if isinstance(one, Mlp)}):
        step, rest = (_RELEASED_STEP, 0) if by_mult else (4, width % 4)
        count = max(0 if rest else 1, round((width * hidden / model.hidden_size - rest) / step))
        while (smaller := count * step + rest) <= least or (
            smaller in taken and width != model.hidden_size
        ):
            count += 1
        found[width] = least = smaller
    return found


def _block(
    block: Mapping[str, Any], ffn: object, widths: Mapping[int, int], *, hidden: int, divisor: int
) -> Config:
    """One block's entry with every field kept; query heads per group are those of the original."""
    found: Config = copy.deepcopy(dict(block))
    for key in ("num_key_value_heads", "num_kv_heads"):
        if found["attention"].get(key) is not None:
            found["attention"][key] = max(1, found["attention"][key] // divisor)
    if isinstance(ffn, Mlp):
        width = widths[ffn.ffn_hidden_size]
        if found["ffn"].get("intermediate_size") is not None:
            found["ffn"]["intermediate_size"] = width
        if found["ffn"].get("ffn_mult") is not None:
            # Half a step below the width: rounded up, it is the width whatever the digits do.
            found["ffn"]["ffn_mult"] = (width - _RELEASED_STEP / 2) * 3 / (2 * hidden)
    return found


def _lower_ids(config: Config, vocab_size: int) -> None:
    """Move special tokens below the vocabulary's end, equal ones together, in their order."""
    stated = [one for key in _IDS for one in _as_list(config.get(key))]
    lowered = {
        token: vocab_size - place
        for place, token in enumerate(sorted(set(stated), reverse=True), start=1)
    }
    for key in _IDS:
        value = config.get(key)
        if isinstance(value, list):
            config[key] = [lowered[one] for one in value]
        elif value is not None:
            config[key] = lowered[value]


def _refuse_odd_ids(config: Mapping[str, Any]) -> None:
    """Refuse special tokens that are neither an id nor a list of ids: no twin has their like."""
    odd = [
        f"{key}={config[key]!r}"
        for key in _IDS
        if any(
            isinstance(one, bool) or not isinstance(one, int) for one in _as_list(config.get(key))
        )
    ]
    if odd:
        raise InconsistentConfigError(
            "special tokens are ids, or lists of them", where=odd,
            hint="compare with the published file",
        )  # fmt: skip


def _as_list(value: Any) -> list[Any]:  # noqa: ANN401 - JSON
    if value is None:
        return []
    return list(value) if isinstance(value, list) else [value]
