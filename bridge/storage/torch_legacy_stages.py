"""The stages of a `torch` checkpoint: what a rank's parameters are called in the whole model.

A file holds the rank's `model`, or `model0`, `model1`, ... of its virtual stages, perhaps in
wrappers, and layers count from 0 in each of them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any, Final

from bridge.errors import CheckpointError, CorruptFileError

PART: Final = re.compile(r"model(?P<vp>\d*)")
"""The name of a model part in a rank's file."""
LAYER: Final = re.compile(r"decoder\.layers\.(?P<layer>\d+)\.(?P<rest>.+)")
"""The name of a layer's parameter."""
_WRAPPERS: Final = re.compile(r"(?:module\.|model\.)*")


def parts_of(state: Mapping[Any, Any], where: str) -> Iterator[tuple[int, Mapping[str, object]]]:
    """A rank's model parts by virtual stage, their names without what wrappers put before them.

    Raises:
        CheckpointError: BR300, a kind of model too old to read.
        CorruptFileError: BR302, no model, or a parameter that is there twice.
    """
    found = False
    for key, part in state.items():
        match = PART.fullmatch(key) if isinstance(key, str) else None
        if match is None or not isinstance(part, dict):
            continue
        if "language_model" in part:
            raise CheckpointError(
                "the model is one of Megatron-LM's classes before Megatron-Core",
                where=where,
                hint="convert it with Megatron-LM: tools/checkpoint/convert.py --saver core",
            )
        found = True
        yield int(match["vp"] or 0), _unwrapped(part, where)
    if not found:
        raise CorruptFileError("holds no model", where=where)


def _unwrapped(part: Mapping[Any, object], where: str) -> dict[str, object]:
    """The parameters without what wrappers put before their names."""
    keys: dict[str, str] = {}
    found = {}
    for key, value in part.items():
        name = _WRAPPERS.sub("", str(key), count=1)
        if name in keys:
            raise CorruptFileError(f"{name} is stored as {keys[name]} and as {key}", where=where)
        keys[name], found[name] = str(key), value
    return found


def num_layers_of(part: Mapping[str, object]) -> int:
    """How many layers a model part shows."""
    matches = (LAYER.fullmatch(name) for name in part)
    return max((int(match["layer"]) + 1 for match in matches if match), default=0)


def first_layers(
    counts: Mapping[tuple[int, int], int], num_layers: int | None, where: str
) -> dict[tuple[int, int], int]:
    """The index of each stage's first layer in the whole model.

    A layer without parameters leaves no trace in the file, so a stage that ends in one looks too
    short; an even split tells how long it is.

    Raises:
        CheckpointError: BR300, the stages are too short, and no even split explains it.
    """
    seen = sum(counts.values())
    if num_layers is not None and seen != num_layers:
        even, rest = divmod(num_layers, len(counts))
        if rest or any(count > even for count in counts.values()):
            raise CheckpointError(
                f"the stages show {seen} of {num_layers} layers: where those without parameters "
                "are cannot be told",
                where=[f"{where}: stage {stage}: {count}" for stage, count in counts.items()],
                hint="convert it with Megatron-LM: --ckpt-convert-format torch_dist",
            )
        counts = dict.fromkeys(counts, even)
    found, start = {}, 0
    for stage, count in counts.items():
        found[stage] = start
        start += count
    return found


def in_whole_model(key: str, first_layer: int) -> str:
    """The name in the whole model of a stage's parameter."""
    match = LAYER.fullmatch(key)
    if match is None:
        return key
    return f"decoder.layers.{first_layer + int(match['layer'])}.{match['rest']}"
