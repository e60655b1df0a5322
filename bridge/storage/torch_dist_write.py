"""Laying out a Megatron `torch_dist` checkpoint: every byte of every file but the tensors'.

    ROOT/latest_checkpointed_iteration.txt      the tracker: which iteration to load
    ROOT/iter_0000000/metadata.json             which backends wrote it
    ROOT/iter_0000000/common.pt                 `args`, iteration, versions
    ROOT/iter_0000000/.metadata                 key and chunk -> file, offset, length
    ROOT/iter_0000000/__GROUP_N.distcp          records of torch.save, one per chunk or object

Nothing of torch or Megatron-Core is imported, and equal input gives equal bytes. Format: what
`megatron.core.dist_checkpointing.save` of Megatron-Core 0.16.1 writes with torch 2.13.
"""

from __future__ import annotations

import argparse
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from bridge.dtypes import Dtype, dtype_named
from bridge.errors import PlanError
from bridge.storage.pickle_write import Call, Global, Items, New, dumps
from bridge.storage.source import FileLayout, Payload
from bridge.storage.torch_dist_config import (
    COMMON_NAME,
    CONFIG_NAME,
    METADATA_NAME,
    SUFFIX,
    TRACKER_NAME,
    config_bytes,
)
from bridge.storage.torch_record import (
    ALIGNMENT,
    empty_tensors_record,
    object_record,
    record_layout,
)
from bridge.tiling import Box, Shape, find_overlap

CONTENT_METADATA: Final = {"singleton_local_shards": False, "chained_optim_avoid_prefix": True}
CHECKPOINT_VERSION: Final = 3.0
DCP_VERSION: Final = "1.0.0"  # torch.distributed.checkpoint.filesystem.CURRENT_DCP_VERSION
DEFAULT_MAX_FILE_SIZE: Final = 5 << 30
"""In bytes; a record that alone is bigger gets a file of its own."""

_DCP: Final = "torch.distributed.checkpoint.metadata"


@dataclass(frozen=True, slots=True, kw_only=True)
class Chunk:
    """One record to be written: a box of the global tensor that its key names."""

    key: str
    global_shape: Shape
    dtype: Dtype
    box: Box
    file_group: str = "0"
    """Its files are named `__{file_group}_{n}.distcp`; Megatron writes one group per rank."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointLayout:
    """A whole checkpoint, paths relative to its root.

    `small_files` are complete; the tracker, which makes a checkpoint visible, comes last.
    """

    files: tuple[FileLayout, ...]
    small_files: dict[str, bytes]


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a record went."""

    file: str
    offset: int
    length: int


def extra_state_key(module: str, *, shard: int = 0, num_shards: int = 1) -> str:
    """The key of a module's `_extra_state` object, as `ShardedObject.unique_key` builds it."""
    return f"{module}._extra_state/shard_{shard}_{num_shards}"


def empty_extra_state() -> bytes:
    """The object that stands for "no extra state": one empty uint8 tensor in a list."""
    return empty_tensors_record(dtype_named("uint8"))


def iteration_directory(iteration: int) -> str:
    """The folder of an iteration: `iter_0000000`."""
    return f"iter_{iteration:07d}"


class _FileWriter:
    """Collects records for the files of one group, starting a new file when one is full."""

    def __init__(self, directory: str, group: str, max_file_size: int) -> None:
        self._directory, self._group, self._max = directory, group, max_file_size
        self.layouts: list[FileLayout] = []
        self._literals: list[tuple[int, bytes]] = []
        self._payloads: list[Payload] = []
        self._pending = bytearray()  # literal bytes that end at `_size`
        self._size = 0

    def _literal(self, data: bytes) -> None:
        self._pending += data
        self._size += len(data)

    def _flush(self) -> None:
        if self._pending:
            self._literals.append((self._size - len(self._pending), bytes(self._pending)))
            self._pending = bytearray()

    def _start_record(self, size: int) -> _Place:
        # Records begin aligned so that a payload, aligned within its record, is so in the file.
        padding = -self._size % ALIGNMENT
        if self._size and self._size + padding + size > self._max:
            self.finish()
            padding = 0
        self._literal(bytes(padding))
        name = f"__{self._group}_{len(self.layouts)}{SUFFIX}"
        return _Place(name, self._size, size)

    def add_object(self, record: bytes) -> _Place:
        place = self._start_record(len(record))
        self._literal(record)
        return place

    def add_chunk(self, chunk: Chunk) -> _Place:
        record = record_layout(chunk.dtype, chunk.box.shape)
        place = self._start_record(record.size)
        self._literal(record.prefix)
        if record.nbytes:
            self._flush()
            first, second = record.crc32_at
            self._payloads.append(
                Payload(
                    tensor=chunk.key,
                    box=chunk.box,
                    offset=self._size,
                    nbytes=record.nbytes,
                    crc32_at=(place.offset + first, place.offset + second),
                )
            )
            self._size += record.nbytes
        self._literal(record.suffix)
        return place

    def finish(self) -> None:
        """Close the current file, if anything is in it."""
        self._flush()
        if self._size:
            self.layouts.append(
                FileLayout(
                    path=f"{self._directory}/__{self._group}_{len(self.layouts)}{SUFFIX}",
                    size=self._size,
                    literals=tuple(self._literals),
                    payloads=tuple(self._payloads),
                )
            )
        self._literals, self._payloads, self._size = [], [], 0


def layout_checkpoint(
    chunks: Sequence[Chunk],
    objects: Mapping[str, bytes],
    *,
    args: Mapping[str, object],
    iteration: int = 0,
    common: Mapping[str, object] | None = None,
    max_file_size: int = DEFAULT_MAX_FILE_SIZE,
) -> CheckpointLayout:
    """Lay out a checkpoint of one iteration.

    Args:
        chunks: In the order of their records; those of one key must partition its tensor.
        objects: Key, such as `extra_state_key` gives, to its complete record. They go first in the
            first group's files.
        args: Megatron's arguments, stored as an `argparse.Namespace`. Plain data and `Dtype`s.
        iteration: Names the folder, and is what training resumes from.
        common: Further entries of `common.pt`; they win over the ones that are always there.
        max_file_size: In bytes. Files are cut between records.

    Returns:
        Files whose payloads name a chunk's key and box, and small files with their bytes.

    Raises:
        PlanError: BR400, chunks that overlap, leave holes or disagree, a key used twice, or
            `args` that are not plain data.
    """
    by_key = _check(chunks, objects)
    directory = iteration_directory(iteration)
    groups = list(dict.fromkeys(chunk.file_group for chunk in chunks)) or ["0"]
    for group in groups:
        if not group.isalnum():
            raise PlanError(f"no name for a group of files: {group!r}")
    writers = {group: _FileWriter(directory, group, max_file_size) for group in groups}
    object_places = {key: writers[groups[0]].add_object(record) for key, record in objects.items()}
    chunk_places = [writers[chunk.file_group].add_chunk(chunk) for chunk in chunks]
    for writer in writers.values():
        writer.finish()
    places = defaultdict[str, list[tuple[Box, _Place]]](list)
    for chunk, place in zip(chunks, chunk_places, strict=True):
        places[chunk.key].append((chunk.box, place))
    state = {
        "args": argparse.Namespace(**args),
        "checkpoint_version": CHECKPOINT_VERSION,
        "iteration": iteration,
        "content_metadata": CONTENT_METADATA,
        **(common or {}),
    }
    return CheckpointLayout(
        files=tuple(layout for writer in writers.values() for layout in writer.layouts),
        small_files={
            f"{directory}/{METADATA_NAME}": _metadata(by_key, places, object_places),
            f"{directory}/{CONFIG_NAME}": config_bytes(),
            f"{directory}/{COMMON_NAME}": object_record(state, archive="common"),
            TRACKER_NAME: str(iteration).encode(),
        },
    )


def _check(chunks: Sequence[Chunk], objects: Mapping[str, bytes]) -> dict[str, Chunk]:
    """Prove that the chunks of each key partition one tensor; give the first chunk of each."""
    first: dict[str, Chunk] = {}
    boxes = defaultdict[str, list[Box]](list)
    for chunk in chunks:
        one = first.setdefault(chunk.key, chunk)
        if (chunk.global_shape, chunk.dtype) != (one.global_shape, one.dtype):
            raise PlanError(f"chunks of {chunk.key} disagree about its shape or dtype")
        if chunk.box.volume and Box.whole(chunk.global_shape).intersect(chunk.box) != chunk.box:
            raise PlanError(f"chunk {chunk.box} of {chunk.key} sticks out of {chunk.global_shape}")
        boxes[chunk.key].append(chunk.box)
    for key, of_key in boxes.items():
        overlap = find_overlap(of_key)
        if overlap:
            raise PlanError(f"chunks {overlap[0]} and {overlap[1]} of {key} overlap")
        total = math.prod(first[key].global_shape)
        if sum(box.volume for box in of_key) != total or (not total and len(of_key) > 1):
            raise PlanError(f"the chunks of {key} do not make up its {total} elements")
    twice = first.keys() & objects.keys()
    if twice:
        raise PlanError("keys of both tensors and objects", where=sorted(twice))
    return first


def _size(shape: Shape) -> Call:
    return Call(Global("torch", "Size"), (shape,))


def _metadata(
    by_key: Mapping[str, Chunk],
    places: Mapping[str, Sequence[tuple[Box, _Place]]],
    objects: Mapping[str, _Place],
) -> bytes:
    """Pickle a `torch.distributed.checkpoint.metadata.Metadata`."""
    state: dict[str, object] = {}
    storage: list[tuple[object, object]] = []

    def store(place: _Place, key: str, **offset: object) -> None:
        index = New(Global(_DCP, "MetadataIndex"), {"fqn": key, "index": None, **offset})
        fields = {
            "relative_path": place.file,
            "offset": place.offset,
            "length": place.length,
        }
        info = New(Global("torch.distributed.checkpoint.filesystem", "_StorageInfo"), fields)
        storage.append((index, info))

    for key, chunk in by_key.items():
        of_key = [
            New(
                Global(_DCP, "ChunkStorageMetadata"),
                {"offsets": _size(box.starts), "sizes": _size(box.shape)},
            )
            for box, _ in places[key]
        ]
        state[key] = New(
            Global(_DCP, "TensorStorageMetadata"),
            {
                "properties": New(Global(_DCP, "TensorProperties"), _properties(chunk.dtype)),
                "size": _size(chunk.global_shape),
                "chunks": of_key,
            },
        )
        for box, place in places[key]:
            store(place, key, offset=_size(box.starts))
    for key, place in objects.items():
        state[key] = New(Global(_DCP, "BytesStorageMetadata"), {})
        store(place, key)
    return dumps(
        New(
            Global(_DCP, "Metadata"),
            {
                "state_dict_metadata": state,
                "planner_data": None,
                "storage_data": Items(tuple(storage)),
                "storage_meta": None,
                "version": DCP_VERSION,
            },
        )
    )


def _properties(dtype: Dtype) -> tuple[object, ...]:
    """The state of `TensorProperties`: dtype, layout, requires_grad, memory format, pin_memory."""
    layout = Call(Global("torch.serialization", "_get_layout"), ("torch.strided",))
    contiguous = Call(Global(_DCP, "_MEM_FORMAT_ENCODING"), (0,))
    return (dtype, layout, False, contiguous, False)
