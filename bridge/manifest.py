"""The manifest of a conversion: sha256 of every tensor and file that went in and came out.

It lies in the target as `nemotron_bridge.manifest.json`, and names no path, time or host, so that
equal conversions have equal manifests. `bridge.manifest_check` holds a directory against it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Final, Self

from bridge import __version__
from bridge.errors import CheckpointError, CorruptFileError
from bridge.storage.input_files import is_plain_name
from bridge.storage.remote import Location
from bridge.storage.source import FileLayout
from bridge.storage.target import MANIFEST_NAME, read_small_file
from bridge.strict_json import parse_json

_FORMAT_VERSION: Final = 1
_UNSIGNED: Final = "0" * 64
_OWN: Final = "sha256_of_this_file"


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """A tensor, or a box of it, that is one run of bytes of a file."""

    tensor: str
    starts: tuple[int, ...]
    """Of the box; zeros where it is the whole tensor."""
    offset: int
    nbytes: int
    sha256: str = ""
    crc32: int = 0
    """Where somebody asked for it; no manifest has it."""

    def __str__(self) -> str:
        """The tensor, and where in it the box begins unless that is at its beginning."""
        return f"{self.tensor}{list(self.starts)}" if any(self.starts) else self.tensor

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        fields = (name for name in self.__dataclass_fields__ if name != "crc32")
        return {name: getattr(self, name) for name in fields}


@dataclass(frozen=True, slots=True, kw_only=True)
class FileEntry:
    """A file, and the tensors in it."""

    nbytes: int
    sha256: str = ""
    parts: tuple[Part, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        parts = [part.to_dict() for part in self.parts]
        return {"nbytes": self.nbytes, "sha256": self.sha256} | ({"parts": parts} if parts else {})

    @classmethod
    def parse(cls, found: Mapping[str, Any]) -> Self:
        """Of plain data. Raises KeyError, TypeError or ValueError where it is not such an entry."""
        parts = tuple(
            Part(
                tensor=str(part["tensor"]),
                starts=tuple(map(int, part["starts"])),
                offset=int(part["offset"]),
                nbytes=int(part["nbytes"]),
                sha256=str(part["sha256"]),
            )
            for part in found.get("parts", ())
        )
        return cls(nbytes=int(found["nbytes"]), sha256=str(found["sha256"]), parts=parts)


Files = Mapping[str, FileEntry]
"""Path relative to a directory, with forward slashes, to what the file holds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """What went in and what came out.

    Args:
        bridge_version: Who wrote it.
        what: Of the `bridge.storage.journal.Job`.
        source: Files that were read whole.
        source_tensors: sha256 of each tensor that was read, whole and row-major, where its file's
            `parts` do not say it.
        target: Every file of the target but the manifest.
    """

    bridge_version: str = __version__
    what: Mapping[str, str] = field(default_factory=dict)
    source: Files = field(default_factory=dict)
    source_tensors: Mapping[str, str] = field(default_factory=dict)
    target: Files = field(default_factory=dict)

    def __or__(self, other: Manifest) -> Manifest:
        """What both know of one conversion."""
        return replace(
            self,
            what={**self.what, **other.what},
            source={**self.source, **other.source},
            source_tensors={**self.source_tensors, **other.source_tensors},
            target={**self.target, **other.target},
        )

    def to_json(self) -> bytes:
        """Serialise, sealed with a hash of all its own bytes."""
        record = {
            "format_version": _FORMAT_VERSION,
            "bridge_version": self.bridge_version,
            "what": dict(self.what),
            "source": {name: entry.to_dict() for name, entry in sorted(self.source.items())},
            "source_tensors": dict(sorted(self.source_tensors.items())),
            "target": {name: entry.to_dict() for name, entry in sorted(self.target.items())},
            _OWN: _UNSIGNED,
        }
        unsigned = json.dumps(record, indent=1).encode() + b"\n"
        return _signed(unsigned, hashlib.sha256(unsigned).hexdigest())


def _signed(unsigned: bytes, digest: str) -> bytes:
    head, zeros, tail = unsigned.rpartition(_UNSIGNED.encode())
    return head + digest.encode() + tail if zeros else unsigned


def read_manifest(directory: Location) -> Manifest | None:
    """The manifest of a directory, None when it has none.

    Raises:
        CorruptFileError: BR302, it is damaged itself.
        CheckpointError: BR300, it cannot be read, or is of another version.
    """
    path = directory / MANIFEST_NAME
    if not path.is_file():
        return None
    raw = read_small_file(path)
    try:
        found = parse_json(raw)
        _refuse_altered(raw, str(found[_OWN]))
        if found["format_version"] != _FORMAT_VERSION:
            raise CheckpointError(
                f"written in format {found['format_version']}, this version reads "
                f"{_FORMAT_VERSION}",
                where=str(path),
                hint="check it with the version of nemotron-bridge that wrote it: "
                f"{found['bridge_version']}",
            )
        return Manifest(
            bridge_version=str(found["bridge_version"]),
            what={str(key): str(value) for key, value in found["what"].items()},
            source=_files(found["source"]),
            source_tensors={str(k): str(v) for k, v in found["source_tensors"].items()},
            target=_files(found["target"]),
        )
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CorruptFileError(
            f"the manifest is damaged: {error}",
            where=str(path),
            hint="nothing can be said of the files beside it; restore it, or convert again",
        ) from None


def _files(found: Mapping[str, Any]) -> dict[str, FileEntry]:
    for name in found:
        if not all(map(is_plain_name, name.split("/"))):
            raise ValueError(f"{name!r} is no file of a checkpoint")
    return {name: FileEntry.parse(entry) for name, entry in found.items()}


def _refuse_altered(raw: bytes, digest: str) -> None:
    head, own, tail = raw.rpartition(digest.encode())
    unsigned = head + _UNSIGNED.encode() + tail
    if not own or hashlib.sha256(unsigned).hexdigest() != digest:
        raise ValueError("its own hash is another")


def entry_of(layout: FileLayout) -> FileEntry:
    """What a file that was laid out is to hold, its hashes not known yet."""
    parts = [
        Part(tensor=one.tensor, starts=one.box.starts, offset=one.offset, nbytes=one.nbytes)
        for one in sorted(layout.payloads, key=lambda one: one.offset)
    ]
    return FileEntry(nbytes=layout.size, parts=tuple(parts))
