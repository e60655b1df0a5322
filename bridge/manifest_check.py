"""Hold a directory against the manifest in it, at any later time and without the other side.

Which file is not what it was, which tensor in it, and what has come that a loader would take.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from bridge.errors import CheckpointError, named_refusals
from bridge.hashing import differences
from bridge.manifest import Manifest, read_manifest
from bridge.progress import Progress, Silent
from bridge.reading import TransferLimits
from bridge.storage.remote import Location
from bridge.storage.target import MANIFEST_NAME, may_be_loaded


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
    """Files that were not there when the manifest was written, and that no loader would take."""

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
    if not directory.is_dir():
        raise CheckpointError(
            "there is no such directory", where=str(directory), hint="give that of a checkpoint"
        )
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
    loadable, others = come_since(directory, manifest)
    wrong = [*wrong, *(f"{name}: was not there" for name in loadable)]
    return ManifestReport(
        directory=str(directory),
        bridge_version=manifest.bridge_version,
        num_files=len(manifest.target),
        num_tensors=len(tensors),
        nbytes=nbytes,
        differences=wrong,
        not_listed=others,
    )


def come_since(directory: Location, manifest: Manifest) -> tuple[list[str], list[str]]:
    """Files that a manifest does not have: those that a loader would take, and others."""
    found = sorted(_leaves(directory) - manifest.target.keys() - {MANIFEST_NAME})
    return (
        [name for name in found if may_be_loaded(name)],
        [name for name in found if not may_be_loaded(name)],
    )


def _leaves(directory: Location) -> set[str]:
    """Whatever lies below a directory and is none itself: links to directories, FIFOs, too."""
    root = PurePosixPath(str(directory))
    paths: Iterable[Location] = directory.rglob("*")
    return {
        str(PurePosixPath(str(path)).relative_to(root))
        for path in paths
        if not path.is_dir() or (isinstance(path, Path) and path.is_symlink())
    }
