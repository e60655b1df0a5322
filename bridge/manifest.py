"""The manifest of a conversion: sha256 of every tensor and file that went in and came out.

It lies in the target as `nemotron_bridge.manifest.json`, and names no path, time or host, so that
equal conversions have equal manifests. `verify --manifest` holds a directory against it, at any
later time and without the other side: which file is not what it was, and which tensor in it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any, Final, Self

import numpy as np

from bridge import __version__
from bridge.errors import BridgeError, CheckpointError, CorruptFileError, named_refusals
from bridge.progress import Advance, Progress, Silent
from bridge.reading import TransferLimits, all_or_first_error, read_bands
from bridge.storage.files import FileRanges
from bridge.storage.remote import Location
from bridge.storage.remote_ranges import open_ranges
from bridge.storage.source import FileLayout, TensorSource
from bridge.storage.target import MANIFEST_NAME, read_small_file
from bridge.strict_json import parse_json
from bridge.tiling import Box, Tile, Tiling

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

    def __str__(self) -> str:
        """The tensor, and where in it the box begins unless that is at its beginning."""
        return f"{self.tensor}{list(self.starts)}" if any(self.starts) else self.tensor

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {name: getattr(self, name) for name in self.__dataclass_fields__}


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
    source: Files
    source_tensors: Mapping[str, str] = field(default_factory=dict)
    target: Files

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


def hash_files(
    directory: Location, files: Files, *, limits: TransferLimits, advance: Advance
) -> dict[str, FileEntry]:
    """Read files from their first byte to their last, and fill in the hashes.

    Raises:
        CheckpointError: BR300, a file is not there or cannot be read.
        CorruptFileError: BR302, a file ends early.
    """
    ranges = open_ranges(directory)
    try:
        with ThreadPoolExecutor(limits.threads) as pool:
            # Hashing one file is one thread's work: begin with the biggest, or it ends alone.
            order = sorted(files, key=lambda name: -files[name].nbytes)
            found = all_or_first_error(
                pool.submit(_hash_file, ranges, name, files[name], limits.window_nbytes, advance)
                for name in order
            )
        return dict(zip(order, found, strict=True))
    finally:
        ranges.close()


def _hash_file(
    ranges: FileRanges, name: str, entry: FileEntry, band_nbytes: int, advance: Advance
) -> FileEntry:
    whole, buffer = hashlib.sha256(), np.empty(min(band_nbytes, max(1, entry.nbytes)), "u1")
    parts: list[Part] = []
    position = 0

    def read_to(stop: int, digest: Any) -> None:  # noqa: ANN401 - hashlib has no type for it
        nonlocal position
        while position < stop:
            band = buffer[: min(buffer.size, stop - position)]
            ranges.read_into(name, position, band)
            whole.update(band.data)
            if digest is not None:
                digest.update(band.data)
            position += band.size
            advance(band.size)

    for part in entry.parts:
        read_to(part.offset, None)
        digest = hashlib.sha256()
        read_to(part.offset + part.nbytes, digest)
        parts.append(
            Part(
                tensor=part.tensor,
                starts=part.starts,
                offset=part.offset,
                nbytes=part.nbytes,
                sha256=digest.hexdigest(),
            )
        )
    read_to(entry.nbytes, None)
    return FileEntry(nbytes=entry.nbytes, sha256=whole.hexdigest(), parts=tuple(parts))


def hash_tensors(
    source: TensorSource, names: Sequence[str], *, limits: TransferLimits, advance: Advance
) -> dict[str, str]:
    """sha256 of whole tensors, row-major and little-endian, however they are stored."""
    with ThreadPoolExecutor(limits.threads) as pool:
        found = all_or_first_error(
            pool.submit(_hash_tensor, source, name, limits.band_nbytes, advance) for name in names
        )
    return dict(zip(names, found, strict=True))


def _hash_tensor(source: TensorSource, name: str, band_nbytes: int, advance: Advance) -> str:
    info, digest = source.tensors[name], hashlib.sha256()
    whole = Box.whole(info.shape)
    tiling = Tiling(info.shape, (Tile(name, whole, whole),))
    word = info.dtype.word
    for words in read_bands(source, tiling, whole, word=word, band_nbytes=band_nbytes):
        data = words.reshape(-1).view("u1").data
        digest.update(data)
        advance(len(data))
    return digest.hexdigest()


def differences(
    directory: Location, files: Files, *, limits: TransferLimits, advance: Advance
) -> list[str]:
    """Every file that is not what it was, and the tensors in it that are not, in words."""
    ranges = open_ranges(directory)

    def check(name: str) -> list[str]:
        path, entry = directory / name, files[name]
        size = path.stat().st_size if path.is_file() else None
        if size != entry.nbytes:
            advance(entry.nbytes)
            found = "is not there" if size is None else f"has {size} bytes"
            return [f"{name}: {found}, it had {entry.nbytes}"]
        try:
            now = _hash_file(ranges, name, entry, limits.window_nbytes, advance)
        except BridgeError as error:
            return [f"{name}: {error.message}"]
        return [f"{name}: {text}" for text in _differences(entry, now)]

    try:
        with ThreadPoolExecutor(limits.threads) as pool:
            order = sorted(files, key=lambda name: -files[name].nbytes)
            found = all_or_first_error(pool.submit(check, name) for name in order)
        return sorted(text for texts in found for text in texts)
    finally:
        ranges.close()


@dataclass(frozen=True, slots=True, kw_only=True)
class ManifestReport:
    """What holding a directory against its manifest found."""

    directory: str
    bridge_version: str
    num_files: int
    num_tensors: int
    nbytes: int
    differences: Sequence[str]
    not_listed: Sequence[str]
    """Files that were not there when the manifest was written."""

    def to_dict(self) -> dict[str, Any]:
        """Plain data for `--json`."""
        return {name: getattr(self, name) for name in self.__dataclass_fields__}


@named_refusals()
def check_manifest(
    directory: Location, *, limits: TransferLimits | None = None, progress: Progress | None = None
) -> ManifestReport:
    """Hold every byte of a directory against the manifest in it.

    Args:
        directory: A checkpoint that `import`, `export` or `AutoBridge` has written.
        limits: Memory and threads.
        progress: Who watches.

    Raises:
        CheckpointError: BR300, there is no directory, or no manifest in it.
        CorruptFileError: BR302, the manifest itself is damaged.
    """
    manifest = read_manifest(directory)
    if manifest is None:
        raise CheckpointError(
            f"there is no {MANIFEST_NAME}",
            where=str(directory),
            hint="import and export write one, unless --verify none is given",
        )
    nbytes = sum(entry.nbytes for entry in manifest.target.values())
    with (progress or Silent()).phase("verify", nbytes) as advance:
        wrong = differences(
            directory, manifest.target, limits=limits or TransferLimits(), advance=advance
        )
    tensors = {part.tensor for entry in manifest.target.values() for part in entry.parts}
    root = PurePosixPath(str(directory))
    paths: Iterable[Location] = directory.rglob("*")
    found = {str(PurePosixPath(str(path)).relative_to(root)) for path in paths if path.is_file()}
    return ManifestReport(
        directory=str(directory),
        bridge_version=manifest.bridge_version,
        num_files=len(manifest.target),
        num_tensors=len(tensors),
        nbytes=nbytes,
        differences=wrong,
        not_listed=sorted(found - manifest.target.keys() - {MANIFEST_NAME}),
    )


def _differences(before: FileEntry, after: FileEntry) -> list[str]:
    if before.sha256 == after.sha256:
        return []
    wrong = [
        f"{one} (bytes {one.offset} to {one.offset + one.nbytes - 1})"
        for one, other in zip(before.parts, after.parts, strict=True)
        if one.sha256 != other.sha256
    ]
    if wrong:
        return wrong
    return ["its bytes before, between or after the tensors" if before.parts else "its bytes"]


def _files(found: Mapping[str, Any]) -> dict[str, FileEntry]:
    for name in found:
        if not name or name.startswith("/") or "\\" in name or ".." in name.split("/"):
            raise ValueError(f"{name!r} is no file of a checkpoint")
    return {name: FileEntry.parse(entry) for name, entry in found.items()}
