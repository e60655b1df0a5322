"""Where every byte of a safetensors file goes: how tensors are cut into files, and the headers."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable, Mapping, Sequence
from typing import Final

from bridge.storage.safetensors import SINGLE_NAME, ShardHeader, parse_header
from bridge.storage.source import FileLayout, Payload, TensorInfo
from bridge.tiling import Box

_WRITE_ORDER: Final = (
    "I64", "F64", "F32", "I32", "BF16", "F16", "I16", "F8_E4M3", "F8_E5M2", "I8", "U8", "BOOL",
)  # fmt: skip
"""Dtypes as the reference implementation orders them in a file: widest first."""


def layout_like(
    tensors: Mapping[str, TensorInfo],
    headers: Sequence[ShardHeader],
    index: bytes | None,
    *,
    max_shard_size: int,
) -> tuple[list[FileLayout], bytes | None]:
    """Files cut as these headers say where they describe just these tensors, else our own way.

    Args:
        tensors: As `layout_shards` takes them.
        headers: Of the files of another checkpoint; none where they are not known.
        index: That checkpoint's index, if it has one.
        max_shard_size: For files of our own, in bytes.

    Returns:
        The files, and the bytes of their index if there is one.
    """
    theirs = {name: stored.info for header in headers for name, stored in header.tensors.items()}
    if theirs == dict(tensors):
        return [layout_from_header(header) for header in headers], index
    return layout_shards(tensors, max_shard_size=max_shard_size)


def layout_shards(
    tensors: Mapping[str, TensorInfo], *, max_shard_size: int
) -> tuple[list[FileLayout], bytes | None]:
    """Cut tensors into shard files the way transformers names them.

    Args:
        tensors: In the order of the model; shards are filled in that order.
        max_shard_size: In bytes. A single tensor may exceed it.

    Returns:
        The files and, when there are several, the bytes of the index.
    """
    shards: list[dict[str, TensorInfo]] = [{}]
    filled = 0
    for name, info in tensors.items():
        if shards[-1] and filled + info.nbytes > max_shard_size:
            shards.append({})
            filled = 0
        shards[-1][name] = info
        filled += info.nbytes
    if len(shards) == 1:
        return [layout_shard(SINGLE_NAME, shards[0])], None
    names = [f"model-{n:05}-of-{len(shards):05}.safetensors" for n in range(1, len(shards) + 1)]
    weight_map = {name: file for file, shard in zip(names, shards, strict=True) for name in shard}
    index = {
        "metadata": {"total_size": total_nbytes(tensors.values())},
        "weight_map": dict(sorted(weight_map.items())),
    }
    files = [layout_shard(file, shard) for file, shard in zip(names, shards, strict=True)]
    return files, json.dumps(index, indent=2).encode() + b"\n"


def layout_shard(file: str, tensors: Mapping[str, TensorInfo]) -> FileLayout:
    """Lay out one file, byte for byte as the reference implementation would write it."""
    ordered = sorted(
        tensors.items(),
        key=lambda item: (_WRITE_ORDER.index(item[1].dtype.safetensors), item[0]),
    )
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name, info in ordered:
        header[name] = {
            "dtype": info.dtype.safetensors,
            "shape": list(info.shape),
            "data_offsets": [position, position + info.nbytes],
        }
        position += info.nbytes
    body = json.dumps(header, separators=(",", ":")).encode()
    body += b" " * (-len(body) % 8)
    raw = struct.pack("<Q", len(body)) + body
    return layout_from_header(parse_header(raw, file=file, size=len(raw) + position, where=file))


def layout_from_header(header: ShardHeader) -> FileLayout:
    """The layout of a file whose header is given: how an export gets the source's own bytes."""
    payloads = [
        Payload(
            tensor=name, box=Box.whole(stored.info.shape), offset=stored.offset,
            nbytes=stored.info.nbytes,
        )
        for name, stored in header.tensors.items()
    ]  # fmt: skip
    size = len(header.raw) + sum(payload.nbytes for payload in payloads)
    return FileLayout(
        path=header.file, size=size, literals=((0, header.raw),), payloads=tuple(payloads)
    )


def total_nbytes(tensors: Iterable[TensorInfo]) -> int:
    """Bytes of all tensors together."""
    return sum(info.nbytes for info in tensors)
