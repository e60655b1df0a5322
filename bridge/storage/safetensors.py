"""Hugging Face checkpoints: sharded safetensors, read by box; `safetensors_layout` writes them.

The header is parsed here rather than by the `safetensors` package because a conversion needs the
byte ranges, which that package does not give. Format: 8 bytes of little-endian header length, that
many bytes of JSON, then the data. Source: https://github.com/huggingface/safetensors, README.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final, Self

from bridge.dtypes import Words, dtype_from_safetensors
from bridge.errors import CheckpointError, CorruptFileError
from bridge.storage.extents import Extent, flat_index, is_contiguous
from bridge.storage.input_files import MAX_JSON, is_plain_name, open_stream, read_input
from bridge.storage.remote import Location
from bridge.storage.remote_ranges import each_file, open_ranges
from bridge.storage.source import TensorInfo
from bridge.strict_json import parse_json
from bridge.tiling import Box

INDEX_NAME: Final = "model.safetensors.index.json"
SINGLE_NAME: Final = "model.safetensors"
MAX_HEADER: Final = 100_000_000  # the reference implementation's own limit, in bytes
_MAX_DIMENSIONS: Final = 32  # numpy 1's limit; without one a header could keep us multiplying


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredTensor:
    """Where a tensor's bytes are."""

    info: TensorInfo
    file: str
    offset: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardHeader:
    """One file's head: its raw bytes, length prefix included, and what they say."""

    file: str
    raw: bytes
    tensors: Mapping[str, StoredTensor]


def read_header(directory: Location, file: str) -> ShardHeader:
    """Read and check the header of one safetensors file.

    Raises:
        CorruptFileError: BR302, lengths, offsets, shapes or dtypes that contradict each other.
    """
    path = directory / file
    try:
        with open_stream(path) as stream:
            size = path.stat().st_size
            prefix = stream.read(8)
            length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else size
            if length > min(MAX_HEADER, size - 8):
                raise CorruptFileError(
                    "the header is longer than the file or than any header may be", where=str(path)
                )
            body = stream.read(length)
    except OSError as error:
        raise CheckpointError(f"cannot read the file: {error.strerror}", where=str(path)) from None
    return parse_header(prefix + body, file=file, size=size, where=str(path))


def parse_header(raw: bytes, *, file: str, size: int, where: str) -> ShardHeader:
    """Parse raw header bytes of a file of `size` bytes. Raises as `read_header`."""
    try:
        entries = parse_json(raw[8:])
        _check_metadata(entries.pop("__metadata__", {}))
        spans = sorted(
            (_stored(name, entry, file, len(raw), where) for name, entry in entries.items()),
            key=lambda pair: (pair[1].offset, pair[1].info.nbytes),  # empty ones first
        )
    except CorruptFileError:
        raise
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise CorruptFileError(f"the header is not safetensors': {error}", where=where) from None
    position = len(raw)
    for name, stored in spans:
        if stored.offset != position:
            raise CorruptFileError(
                f"{name} starts at byte {stored.offset}, expected {position}: the data has a hole "
                "or an overlap",
                where=where,
            )
        position += stored.info.nbytes
    if position != size:
        raise CorruptFileError(
            f"the header describes {position} bytes, the file has {size}",
            where=where,
            hint="the file is truncated or damaged: copy or download it again",
        )
    return ShardHeader(file=file, raw=raw, tensors=dict(spans))


def _check_metadata(found: object) -> None:
    if not isinstance(found, dict) or not all(isinstance(one, str) for one in found.values()):
        raise ValueError("__metadata__ is not strings by name")


def _stored(
    name: str, entry: Mapping[str, Any], file: str, data_start: int, where: str
) -> tuple[str, StoredTensor]:
    if not (isinstance(entry["shape"], list) and isinstance(entry["data_offsets"], list)):
        raise CorruptFileError(f"{name} has a shape or offsets that are no list", where=where)
    shape = tuple(entry["shape"])
    start, stop = entry["data_offsets"]
    integers = (*shape, start, stop)
    if len(shape) > _MAX_DIMENSIONS or any(
        not isinstance(n, int) or isinstance(n, bool) or not 0 <= n < 2**63 for n in integers
    ):
        raise CorruptFileError(f"{name} has a shape or offset that is no size", where=where)
    dtype = dtype_from_safetensors(entry["dtype"], where=f"{where}: {name}")
    info = TensorInfo(shape=shape, dtype=dtype)
    if info.nbytes != stop - start:
        raise CorruptFileError(
            f"{name} of shape {shape} needs {info.nbytes} bytes, the header gives {stop - start}",
            where=where,
        )
    return name, StoredTensor(info=info, file=file, offset=data_start + start)


class SafetensorsSource:
    """The tensors of a Hugging Face checkpoint directory.

    Args:
        directory: Where the weight files are.
        strict_index: Refuse an index that contradicts the files. Without it the contradictions
            are in `index_problems`, for whoever reports them with others.
        files: The weight files, where that is known; else the index tells, or the directory.

    Raises:
        CheckpointError: BR300, there are no safetensors files, or the index names others.
        CorruptFileError: BR302, a header or the index contradicts the files.
    """

    def __init__(
        self,
        directory: Location,
        *,
        strict_index: bool = True,
        files: Sequence[str] | None = None,
    ) -> None:
        self.directory = directory
        names = files if files is not None else _weight_files(directory)
        self.headers = each_file(directory, partial(read_header, directory), names)
        self._stored: dict[str, StoredTensor] = {}
        for header in self.headers.values():
            for name, stored in header.tensors.items():
                if name in self._stored:
                    raise CorruptFileError(
                        f"{name} is in {self._stored[name].file} and in {header.file}",
                        where=str(directory),
                    )
                self._stored[name] = stored
        self.tensors = {name: stored.info for name, stored in self._stored.items()}
        self.index_problems = _index_problems(
            directory, {name: stored.file for name, stored in self._stored.items()}
        )
        if strict_index and self.index_problems:
            raise CorruptFileError(
                f"the index is stale: {len(self.index_problems)} tensors are not where it says",
                where=self.index_problems,
            )
        self._files = open_ranges(directory)

    def read_into(self, name: str, box: Box, out: Words) -> None:
        """Fill `out` with a box; see `TensorSource`."""
        stored = self._stored[name]
        self._files.read_box(
            stored.file,
            stored.offset,
            shape=stored.info.shape,
            word=stored.info.dtype.word,
            box=box,
            out=out,
        )

    def extents(self, name: str, box: Box) -> list[Extent] | None:
        """Where a box lies; see `bridge.storage.extents.FileSource`."""
        stored = self._stored[name]
        shape, itemsize = stored.info.shape, stored.info.dtype.itemsize
        if not isinstance(self.directory, Path) or not is_contiguous(box, shape):
            return None
        start = stored.offset + flat_index(box.starts, shape) * itemsize
        return [Extent(self.directory / stored.file, start, box.volume * itemsize)]

    def close(self) -> None:
        """Release the files."""
        self._files.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _weight_files(directory: Location) -> list[str]:
    try:
        found = sorted(path.name for path in directory.glob("*.safetensors") if path.is_file())
    except OSError as error:
        raise CheckpointError(
            f"cannot list the directory: {error.strerror}", where=str(directory)
        ) from None
    index = _read_index(directory)
    if index is not None:
        named = sorted({str(name) for name in index.values()})
        strange = [name for name in named if not is_plain_name(name)]
        if strange:
            raise CorruptFileError(
                f"the index names files outside the directory: {', '.join(strange)}",
                where=str(directory / INDEX_NAME),
            )
        missing = sorted(set(named) - set(found))
        if missing:
            raise CheckpointError(
                f"{len(missing)} of {len(named)} weight files are not there",
                where=[str(directory / name) for name in missing],
                hint="the download or copy is incomplete",
            )
        if SINGLE_NAME in found and SINGLE_NAME not in named:
            raise CheckpointError(
                f"both {SINGLE_NAME} and {INDEX_NAME} are there, of different checkpoints",
                where=str(directory),
                hint=f"transformers would read {SINGLE_NAME}: remove what is not wanted",
            )
        return named
    if SINGLE_NAME in found:
        return [SINGLE_NAME]
    raise CheckpointError(
        f"neither {SINGLE_NAME} nor {INDEX_NAME} is there",
        where=str(directory),
        hint="a Hugging Face checkpoint with safetensors weights is expected; older .bin weights "
        "can be saved again with transformers' save_pretrained",
    )


def _read_index(directory: Location) -> Mapping[str, object] | None:
    path = directory / INDEX_NAME
    try:
        index = parse_json(read_input(path, most=MAX_JSON))
        weight_map = index["weight_map"]
    except FileNotFoundError:
        return None
    except NotADirectoryError:
        raise CheckpointError(
            "a configuration alone has no weights",
            where=str(directory),
            hint="give the checkpoint's directory, its weights are needed too",
        ) from None
    except OSError as error:
        raise CheckpointError(f"cannot read the index: {error.strerror}", where=str(path)) from None
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise CorruptFileError(
            f"not an index of safetensors files: {error}", where=str(path)
        ) from None
    if not isinstance(weight_map, dict):
        raise CorruptFileError("weight_map is not an object", where=str(path))
    return weight_map


def _index_problems(directory: Location, where_found: Mapping[str, str]) -> list[str]:
    """Every tensor that is not where the index says, in words."""
    index = _read_index(directory)
    if index is None:
        return []
    problems = []
    for name in sorted(index.keys() | where_found.keys()):
        said, found = index.get(name), where_found.get(name)
        if said is None:
            problems.append(f"index: {name} is in {found}, which the index does not say")
        elif found is None:
            problems.append(f"index: {name} should be in {said}, and is in no file")
        elif said != found:
            problems.append(f"index: {name} should be in {said}, and is in {found}")
    return problems
