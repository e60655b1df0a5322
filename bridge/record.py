"""What an import keeps beside the Megatron checkpoint, so that an export gives everything back.

    P/nemotron_bridge.json   versions, the plan's digest, the head of each source shard, sha256 of
                             every source tensor (when the import was verified)
    P/hf_source/             config.json, tokenizer and all other side files, byte for byte

Megatron reads neither. An export that finds them writes the source directory again, file by file
the same bytes; one that does not writes its own shards and needs `--hf-model` for the side files.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from bridge.errors import CheckpointError, CorruptFileError
from bridge.storage.input_files import is_plain_name
from bridge.storage.remote import Location
from bridge.storage.safetensors import SINGLE_NAME, ShardHeader, parse_header
from bridge.storage.target import read_small_file
from bridge.strict_json import parse_json

RECORD_NAME: Final = "nemotron_bridge.json"
SIDE_DIRECTORY: Final = "hf_source"
FORMAT_VERSION: Final = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceRecord:
    """The Hugging Face checkpoint that a Megatron checkpoint was made from."""

    bridge_version: str
    plan_sha256: str
    iteration: int
    """The iteration that was imported; later ones, from training, are other weights."""
    carried_fields: tuple[str, ...] = ()
    """Unknown configuration fields that the user let through."""
    headers: Mapping[str, bytes]
    """Shard file to its raw header."""
    index: bytes | None
    """The raw `model.safetensors.index.json`, if the source had one."""
    tensor_sha256: Mapping[str, str] = field(default_factory=dict)
    side_file_sha256: Mapping[str, str] = field(default_factory=dict)
    hf_model_id: str | None = None
    """The source's id, where it came from the Hub; a path here would say nothing elsewhere."""

    def to_json(self) -> bytes:
        """Serialise."""
        record = {
            "format_version": FORMAT_VERSION,
            "bridge_version": self.bridge_version,
            "plan_sha256": self.plan_sha256,
            "iteration": self.iteration,
            "carried_fields": list(self.carried_fields),
            "shards": {file: base64.b64encode(raw).decode() for file, raw in self.headers.items()},
            "index": None if self.index is None else base64.b64encode(self.index).decode(),
            "tensor_sha256": dict(self.tensor_sha256),
            "side_file_sha256": dict(self.side_file_sha256),
        }
        if self.hf_model_id is not None:
            record["hf_model_id"] = self.hf_model_id
        return json.dumps(record, indent=1).encode() + b"\n"

    def shard_headers(self, where: str) -> list[ShardHeader]:
        """Parse the heads of the source's shards."""
        return [
            parse_header(raw, file=file, size=_described_size(raw, where), where=f"{where}: {file}")
            for file, raw in self.headers.items()
        ]


def _described_size(raw: bytes, where: str) -> int:
    try:
        entries: dict[str, Any] = parse_json(raw[8:])
        ends = [
            entry["data_offsets"][1] for name, entry in entries.items() if name != "__metadata__"
        ]
        return len(raw) + int(max(ends, default=0))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CorruptFileError(f"a recorded header is damaged: {error}", where=where) from None


def read_record(checkpoint: Location) -> SourceRecord | None:
    """The record of a Megatron checkpoint's root directory, None when it has none.

    Raises:
        CorruptFileError: BR302, there is one and it is not ours.
    """
    path = checkpoint / RECORD_NAME
    if not path.is_file():
        return None
    try:
        found = parse_json(read_small_file(path))
        if found["format_version"] != FORMAT_VERSION:
            raise CheckpointError(
                f"written in format {found['format_version']}, this version reads {FORMAT_VERSION}",
                where=str(path),
                hint="use the version of nemotron-bridge that wrote it, or remove the file and "
                "export with --hf-model",
            )
        return _parse(found)
    except (ValueError, KeyError, TypeError, AttributeError, binascii.Error) as error:
        raise CorruptFileError(
            f"not a record of this bridge: {error}",
            where=str(path),
            hint="remove the file and export with --hf-model",
        ) from None


def _parse(found: Mapping[str, Any]) -> SourceRecord:
    # Shard names become paths of the export: nothing but a plain file name may stand there.
    if not all(is_plain_name(one) and one.endswith(".safetensors") for one in found["shards"]):
        raise ValueError("a shard's name is not that of a file")
    if found["index"] is None and set(found["shards"]) != {SINGLE_NAME}:
        raise ValueError(f"no index, which shards other than {SINGLE_NAME} have")
    return SourceRecord(
        bridge_version=str(found["bridge_version"]),
        plan_sha256=str(found["plan_sha256"]),
        iteration=int(found["iteration"]),
        carried_fields=tuple(map(str, found["carried_fields"])),
        headers={
            str(file): base64.b64decode(raw, validate=True) for file, raw in found["shards"].items()
        },
        index=None if found["index"] is None else _index(found["index"], set(found["shards"])),
        tensor_sha256=dict(found["tensor_sha256"]),
        side_file_sha256=dict(found["side_file_sha256"]),
        hf_model_id=None if found.get("hf_model_id") is None else str(found["hf_model_id"]),
    )


def _index(encoded: str, shards: set[str]) -> bytes:
    """The source's index; it becomes the export's, byte for byte."""
    raw = base64.b64decode(encoded, validate=True)
    if set(parse_json(raw)["weight_map"].values()) != shards:
        raise ValueError("the index is of other shards")
    return raw


def sha256_of(data: bytes) -> str:
    """Hex digest."""
    return hashlib.sha256(data).hexdigest()
