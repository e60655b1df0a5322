"""Conversion to another dtype: the one case in which elements are computed with.

A `RoundedSource` stands between a checkpoint and everything else, so that accounting, writing and
verification are those of any conversion. What an import keeps of its source (division into files,
index, `config.json`) is brought to the new dtype too: an export of it is a checkpoint as its
maker would have saved it in that dtype.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from threading import Lock
from typing import Any, Final

import numpy as np

from bridge.dtypes import Dtype, Words, dtype_named
from bridge.errors import CorruptFileError, DtypeMismatchError, UsageError
from bridge.rounding import Rounding, largest_finite, round_words, values_of
from bridge.storage.safetensors import ShardHeader
from bridge.storage.safetensors_layout import layout_shard
from bridge.storage.source import TensorInfo, TensorSource
from bridge.strict_json import parse_json
from bridge.tiling import Box, bands

_PIECE: Final = 1 << 17
"""Elements rounded at once: float64 scratch of 1 MiB, several times over, for each thread."""


_DTYPE_KEYS: Final = ("torch_dtype", "dtype")


@dataclass(frozen=True, slots=True, kw_only=True)
class Loss:
    """What rounding some elements cost. NaNs are not counted.

    Args:
        changed: Elements that have another value than before.
        underflowed: Those that became zero.
        overflowed: Those that became infinite.
        largest_relative_error: Over elements that stayed finite; 1 where one became zero.
    """

    changed: int = 0
    underflowed: int = 0
    overflowed: int = 0
    largest_relative_error: float = 0.0

    def __add__(self, other: Loss) -> Loss:
        """Of both together."""
        return Loss(
            changed=self.changed + other.changed,
            underflowed=self.underflowed + other.underflowed,
            overflowed=self.overflowed + other.overflowed,
            largest_relative_error=max(self.largest_relative_error, other.largest_relative_error),
        )


class RoundedSource:
    """A `TensorSource` that gives another one's tensors in one dtype.

    Args:
        source: What to read; it is not closed here.
        dtype: What to give. Tensors that hold no floating-point numbers stay as they are.
        rounding: How; a verification takes another way than what it verifies.
    """

    def __init__(
        self, source: TensorSource, dtype: Dtype, *, rounding: Rounding = round_words
    ) -> None:
        self._source, self._rounding = source, rounding
        self.dtype = dtype
        self.tensors = tensors_in(source.tensors, dtype)
        self.losses: dict[str, Loss] = {}
        self._lock = Lock()

    def read_into(self, name: str, box: Box, out: Words) -> None:
        """Fill `out` with a box, rounded; see `TensorSource`."""
        stored, wanted = self._source.tensors[name].dtype, self.tensors[name].dtype
        if stored == wanted:
            self._source.read_into(name, box, out)
            return
        loss = Loss()
        for band in bands(box, max_elements=_PIECE):
            words = np.empty(band.shape, stored.word)
            self._source.read_into(name, band, words)
            rounded = self._rounding(words, stored, wanted)
            place: tuple[Any, ...] = (*band.relative_to(box).slices, ...)
            out[place] = rounded
            loss += _loss(values_of(words, stored), values_of(rounded, wanted))
        with self._lock:
            self.losses[name] = self.losses.get(name, Loss()) + loss

    def close(self) -> None:
        """Nothing to release."""


def _loss(before: np.ndarray[Any, Any], after: np.ndarray[Any, Any]) -> Loss:
    changed = (before != after) & ~np.isnan(before)
    if not changed.any():
        return Loss()
    one, other = before[changed].astype("<f8"), after[changed].astype("<f8")
    finite = np.isfinite(other)
    with np.errstate(over="ignore"):  # of a subnormal float64; such a quotient is at most 1
        errors = np.abs(other[finite] / one[finite] - 1)
    return Loss(
        changed=one.size,
        underflowed=int(np.count_nonzero(other == 0)),
        overflowed=int(one.size - np.count_nonzero(finite)),
        largest_relative_error=float(errors.max(initial=0.0)),
    )


def tensors_in(tensors: Mapping[str, TensorInfo], dtype: Dtype | None) -> Mapping[str, TensorInfo]:
    """Tensors as a conversion gives them; those that hold no floating-point numbers stay."""
    if dtype is None:
        return tensors
    return {
        name: replace(info, dtype=dtype) if info.dtype.is_floating else info
        for name, info in tensors.items()
    }


def dtype_to_round_to(
    name: str | None, tensors: Mapping[str, TensorInfo], *, exact: bool = False
) -> Dtype | None:
    """The dtype that is asked for; None where every tensor has it, and nothing is to be done.

    Raises:
        UsageError: BR001, one that some tensor has not, where both sides are to be `exact`ly alike.
    """
    if name is None:
        return None
    wanted = dtype_named(name)
    odd = any(info.dtype.is_floating and info.dtype != wanted for info in tensors.values())
    if odd and exact:
        raise UsageError(
            "--verify full holds both sides against each other bit by bit, and --dtype makes them "
            "differ",
            hint="leave --verify away, which checks every rounding; then export in the same dtype, "
            "and `verify` that pair",
        )
    return wanted if odd else None


def main_dtype(tensors: Mapping[str, TensorInfo]) -> Dtype:
    """The dtype that most of the bytes have."""
    sizes: dict[Dtype, int] = {}
    for info in tensors.values():
        sizes[info.dtype] = sizes.get(info.dtype, 0) + info.nbytes
    return max(sizes, key=lambda dtype: sizes[dtype])


def refuse_overflow(losses: Mapping[str, Loss], dtype: Dtype) -> None:
    """Refuse finite elements that became infinite.

    Raises:
        DtypeMismatchError: BR303, every tensor that has any.
    """
    wrong = [f"{name}: {loss.overflowed}" for name, loss in losses.items() if loss.overflowed]
    if wrong:
        count = sum(loss.overflowed for loss in losses.values())
        raise DtypeMismatchError(
            f"{count} elements of {len(wrong)} tensors are too large for {dtype.name}, whose "
            f"largest value is {largest_finite(dtype):g}",
            where=wrong,
            hint="choose bfloat16 or float32, or let them become infinite with --allow-overflow; "
            "nothing was written",
        )


def rounding_note(loss: Loss, dtype: Dtype, num_parameters: int) -> str:
    """What a conversion's report says of its rounding."""
    if not loss.changed:
        return f"dtype: every element is exact in {dtype.name}"
    return (
        f"dtype: rounded to {dtype.name}, nearest, ties to even: {loss.changed:,} of "
        f"{num_parameters:,} elements changed value, the largest relative error is "
        f"{loss.largest_relative_error:.3g}; {loss.underflowed:,} became zero, "
        f"{loss.overflowed:,} infinite"
    )


def files_in(
    headers: Iterable[ShardHeader], index: bytes | None, dtype: Dtype | None, *, where: str
) -> tuple[dict[str, bytes], bytes | None]:
    """The same tensors in the same files, in another dtype; None changes nothing.

    Args:
        headers: Of the files.
        index: Their index, if they have one.
        dtype: The new one.
        where: The index, for errors.

    Returns:
        Each file's raw header, and an index whose `total_size` is the new one.

    Raises:
        CorruptFileError: BR302, it is not an index.
    """
    if dtype is None:
        return {header.file: header.raw for header in headers}, index
    raw, nbytes = {}, 0
    for header in headers:
        infos = {name: stored.info for name, stored in header.tensors.items()}
        layout = layout_shard(header.file, tensors_in(infos, dtype))
        ((_, raw[header.file]),) = layout.literals
        nbytes += layout.payload_nbytes
    return raw, None if index is None else _index_in(index, nbytes, where)


def _index_in(index: bytes, nbytes: int, where: str) -> bytes:
    found = _json_object(index, where)
    metadata = found.get("metadata")
    found["metadata"] = {**(metadata if isinstance(metadata, dict) else {}), "total_size": nbytes}
    return _json_bytes(found)


def config_in(config: bytes, dtype: Dtype, *, where: str) -> bytes:
    """A `config.json` that says the dtype, in the key of transformers 4 or 5 that it has.

    One that says it already stays as it is, byte for byte.

    Raises:
        CorruptFileError: BR302, it is not a configuration.
    """
    found = _json_object(config, where)
    keys = [key for key in _DTYPE_KEYS if key in found]
    if keys and all(found[key] == dtype.name for key in keys):
        return config
    return _json_bytes(found | dict.fromkeys(keys or ["torch_dtype"], dtype.name))


def stated_dtype(config: bytes, *, where: str) -> str | None:
    """The dtype that a `config.json` says, by torch's name; None if it says none.

    Raises:
        CorruptFileError: BR302, it is not a configuration.
    """
    found = _json_object(config, where)
    stated = [found[key] for key in _DTYPE_KEYS if found.get(key) is not None]
    return str(stated[0]).removeprefix("torch.") if stated else None


def _json_object(data: bytes, where: str) -> dict[str, Any]:
    try:
        found = parse_json(data)
    except ValueError as error:
        raise CorruptFileError(f"not JSON: {error}", where=where) from None
    if not isinstance(found, dict):
        raise CorruptFileError("not a JSON object", where=where)
    return found


def _json_bytes(data: Mapping[str, Any]) -> bytes:
    return json.dumps(data, indent=2, ensure_ascii=False).encode() + b"\n"
