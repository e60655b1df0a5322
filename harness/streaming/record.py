"""What a walk has measured so far, and the states to go on from: one file, written block by block.

The file replaces its predecessor in one step, so a kill leaves the last finished block.
"""

from __future__ import annotations

import dataclasses
import io
import json
import math
import os
import struct
import tokenize
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Final

import numpy as np

from harness.block_states import BlockJudgement, judgement_of
from harness.metrics import Excess
from harness.report.files import writing_into
from harness.thresholds import Thresholds

Array = np.ndarray[Any, np.dtype[Any]]
FILE_NAME: Final = "streamed.npz"
_VERSION: Final = 1
_DOCUMENT: Final = "document"
# What a damaged file makes zipfile, NumPy, json and ourselves raise.
_DAMAGE: Final = (
    OSError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError,
    NotImplementedError, EOFError, SyntaxError, tokenize.TokenError, struct.error,
    zipfile.BadZipFile, zlib.error,
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class PartError:
    """What a segment adds to the state, given the reference's: two errors against the oracle's.

    Args:
        name: Which segment, in words.
        kind: What it is a part of: `SwiGLU 512`.
        segment_idx: Its place in the walk.
        candidate: Megatron's, rms relative to what is added.
        reference: The reference's.
    """

    name: str
    kind: str
    segment_idx: int
    candidate: float
    reference: float


@dataclass(slots=True, kw_only=True)
class Record:
    """Of every probe, by its name.

    Attributes:
        judgements: The embedding's, then each block's.
        parts: Layer index to the errors of its segments.
    """

    judgements: dict[str, list[BlockJudgement]] = field(default_factory=dict)
    parts: dict[str, dict[int, list[PartError]]] = field(default_factory=dict)


class Store:
    """The record in a directory, with the states after the last finished block.

    Args:
        directory: Of the report.
        identity: Of the walk; a file of another walk is left aside.
    """

    def __init__(self, directory: Path, identity: Mapping[str, Any]) -> None:
        self._path = directory / FILE_NAME
        self._identity = json.loads(json.dumps(identity))

    def save(self, next_segment: int, record: Record, states: Mapping[str, Array]) -> None:
        """Keep everything that a later run needs to go on at a segment."""
        document = {
            "version": _VERSION,
            "identity": self._identity,
            "next_segment": next_segment,
            "judgements": {
                name: [_as_data(one) for one in found] for name, found in record.judgements.items()
            },
            "parts": {
                name: {str(idx): [dataclasses.asdict(one) for one in parts]
                       for idx, parts in by_layer.items()}
                for name, by_layer in record.parts.items()
            },
        }  # fmt: skip
        text = np.frombuffer(json.dumps(document).encode(), np.uint8)
        partial = self._path.with_suffix(".partial")
        with writing_into(self._path.parent):
            with partial.open("wb") as file:
                arrays: dict[str, Any] = {_DOCUMENT: text, **states}
                np.savez(file, **arrays)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(self._path)

    def load(
        self, *, dtype: str, thresholds: Thresholds
    ) -> tuple[int, Record, dict[str, Array]] | None:
        """What `save` has kept: next segment, record, states.

        None of another walk, of none, or of a file that is damaged: there is nothing to go on from.
        """
        try:
            with self._path.open("rb") as raw:
                states = _arrays(raw)
            document = json.loads(states.pop(_DOCUMENT).tobytes())
            if document["version"] != _VERSION or document["identity"] != self._identity:
                return None
            next_segment = document["next_segment"]
            if type(next_segment) is not int or next_segment < 0:
                return None
            return next_segment, _record(document, dtype=dtype, thresholds=thresholds), states
        except _DAMAGE:
            return None

    def forget(self) -> None:
        """Remove what an earlier run has left."""
        self._path.unlink(missing_ok=True)


def _arrays(raw: BinaryIO) -> dict[str, Array]:
    """The arrays of an archive of `np.savez`, none of which takes more memory than it has bytes.

    Raises:
        ValueError: It is compressed, or an array's header says another size than its data have.
            Damaged archives raise any of `_DAMAGE`.
    """
    found = {}
    size = raw.seek(0, io.SEEK_END)
    with zipfile.ZipFile(raw) as archive:
        for info in archive.infolist():
            if info.compress_type != zipfile.ZIP_STORED or info.compress_size > size:
                raise ValueError(f"{info.filename} is compressed, or bigger than the archive")
            data = io.BytesIO(archive.read(info))
            np.lib.format.read_magic(data)
            shape, fortran, kind = np.lib.format.read_array_header_1_0(data)
            start = data.tell()
            if (
                kind.hasobject
                or math.prod(shape) * kind.itemsize != data.getbuffer().nbytes - start
            ):
                raise ValueError(f"{info.filename} is not {kind} of shape {shape}")
            flat = np.frombuffer(data.getvalue(), kind, offset=start).copy()
            array = flat.reshape(shape, order="F" if fortran else "C")
            found[info.filename.removesuffix(".npy")] = array
    return found


def _record(document: Mapping[str, Any], *, dtype: str, thresholds: Thresholds) -> Record:
    record = Record()
    for name, found in document["judgements"].items():
        record.judgements[name] = [
            judgement_of(
                one["layer_idx"], one["kind"], _excess(one["forced"]), _excess(one["free"]),
                dtype=dtype, thresholds=thresholds,
            )
            for one in found
        ]  # fmt: skip
        record.parts[name] = {
            int(idx): [PartError(**one) for one in parts]
            for idx, parts in document["parts"][name].items()
        }
    return record


def _as_data(one: BlockJudgement) -> dict[str, Any]:
    return {
        "layer_idx": one.layer_idx,
        "kind": one.kind,
        "forced": _plain(one.forced),
        "free": _plain(one.free),
    }


def _plain(measured: Excess) -> dict[str, Any]:
    found = {one.name: getattr(measured, one.name) for one in dataclasses.fields(measured)}
    return {
        name: value.tolist() if isinstance(value, np.ndarray) else value
        for name, value in found.items()
    }


def _excess(data: Mapping[str, Any]) -> Excess:
    fields = dict(data) | {"problems": tuple(data["problems"])}
    for name in ("candidate_by_position", "reference_by_position"):
        found = np.array(data[name], np.float64)
        fields[name] = found if found.size else np.empty((0, 0))
    return Excess(**fields)


def relative_error(found: Array, truth: Array) -> float:
    """rms(found - truth) / rms(truth); 0 where both are zero."""
    difference = float(np.sqrt(np.mean(np.square(found.astype(np.float64) - truth))))
    scale = float(np.sqrt(np.mean(np.square(truth))))
    if scale == 0:
        return 0.0 if difference == 0 else float("inf")
    return difference / scale


def worst_part(parts: Sequence[PartError], floor: float) -> PartError | None:
    """The part that is farthest from the truth, in units of the reference's own error."""
    return max(parts, key=lambda one: one.candidate / max(one.reference, floor), default=None)
