"""Hold what the bridge makes of a model now against what is on record."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

Json = Any
"""What `json.loads` gives."""

LOGITS_LIMIT: Final = 1e-8
"""Of the root mean square. The oracle is float64: another BLAS moves it by 1e-14 or so, and the
records hold ten digits. The smallest mistake (one epsilon for the next) moves it by 1e-6."""
FREQUENCY_LIMIT: Final = 1e-6
"""Relative. float32 power functions differ by an ulp, 1.2e-7, between libraries; rules do not."""
_MOST_PLACES: Final = 4
"""Named per field; a changed rule moves every tensor, and the first ones say which rule it is."""


def differences(recorded: Mapping[str, Json], observed: Mapping[str, Json]) -> list[str]:
    """Every field that differs, each with the first places where it does.

    Args:
        recorded: The fields on record.
        observed: The same fields as they are now.
    """
    found: list[str] = []
    for name in dict.fromkeys((*recorded, *observed)):
        if name not in recorded:
            found.append(f"{name}: nothing is on record")
        elif name not in observed:
            found.append(f"{name}: on record, yet nothing makes it any more")
        else:
            places = list(_field(name, recorded[name], observed[name]))
            found += places[:_MOST_PLACES]
            if len(places) > _MOST_PLACES:
                found.append(f"{name}: {len(places) - _MOST_PLACES} more differences")
    return found


def count_values(value: Json) -> int:
    """How many single values a field holds."""
    if isinstance(value, Mapping):
        return sum(map(count_values, value.values()))
    if isinstance(value, list):
        return sum(map(count_values, value))
    return 1


def _field(name: str, recorded: Json, observed: Json) -> Iterator[str]:
    numeric = {"logits": LOGITS_LIMIT, "inv_freq": FREQUENCY_LIMIT}
    if name not in numeric or not _both_numbers(recorded, observed):
        yield from _exactly(name, recorded, observed)
        return
    ones, others = list(_numbers((), recorded)), list(_numbers((), observed))
    if [place for place, _ in ones] != [place for place, _ in others]:
        yield f"{name}: {len(others)} numbers, {len(ones)} are on record, or another shape"
        return
    if not ones:
        yield f"{name}: no numbers are on record"
        return
    size = math.sqrt(sum(number * number for _, number in ones) / len(ones))
    for (place, was), (_, now) in zip(ones, others, strict=True):
        scale = size if name == "logits" else abs(was)
        if not abs(now - was) <= numeric[name] * scale:  # also when either is NaN
            at = "".join(f"[{index}]" for index in place)
            yield (
                f"{name}{at}: {now!r}, on record is {was!r}: off by {abs(now - was):.3g}, "
                f"limit {numeric[name] * scale:.3g}"
            )


def _both_numbers(*values: Json) -> bool:
    return all(
        isinstance(value, list) and all(math.isfinite(number) for _, number in _numbers((), value))
        for value in values
    )


def _numbers(place: tuple[int, ...], value: Json) -> Iterator[tuple[tuple[int, ...], float]]:
    if isinstance(value, list):
        for index, one in enumerate(value):
            yield from _numbers((*place, index), one)
    else:
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        yield place, value if is_number else math.nan


def _exactly(place: str, recorded: Json, observed: Json) -> Iterator[str]:
    if isinstance(recorded, Mapping) and isinstance(observed, Mapping):
        for key in dict.fromkeys((*recorded, *observed)):
            if key not in observed:
                yield f"{place}: {key} is on record, and not there any more"
            elif key not in recorded:
                yield f"{place}: {key} is new: {_short(observed[key])}"
            else:
                yield from _exactly(f"{place}: {key}", recorded[key], observed[key])
    elif isinstance(recorded, list) and isinstance(observed, list):
        yield from _sequences(place, recorded, observed)
    # 1, 1.0 and True are equal in Python, and three different things in a config.json.
    elif type(recorded) is not type(observed) or recorded != observed:
        yield f"{place}: {_short(observed)}, on record is {_short(recorded)}"


def _sequences(place: str, recorded: Sequence[Json], observed: Sequence[Json]) -> Iterator[str]:
    if len(recorded) != len(observed):
        yield f"{place}: {len(observed)} entries, {len(recorded)} are on record"
    for index, (was, now) in enumerate(zip(recorded, observed, strict=False)):
        yield from _exactly(f"{place}[{index}]", was, now)


def _short(value: Json) -> str:
    text = value if isinstance(value, str) else repr(value)
    return text if len(text) <= 160 else f"{text[:157]}..."
