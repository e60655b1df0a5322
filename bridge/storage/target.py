"""What may be a target, and the small files carried into it; `building` makes it appear."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path, PurePath, PurePosixPath
from typing import Final

from bridge.errors import CheckpointError, UnsafeFileError, UsageError
from bridge.storage.input_files import is_plain_name, read_input
from bridge.storage.remote import Location, RemotePath

MANIFEST_NAME: Final = "nemotron_bridge.manifest.json"
"""Of `bridge.manifest`; each conversion writes its own."""
# Weights in any format; an export writes its own.
_WEIGHT_SUFFIXES: Final = frozenset(
    {".safetensors", ".bin", ".pt", ".pth", ".gguf", ".ggml", ".onnx", ".h5", ".msgpack", ".nemo"}
)
_WEIGHT_NAMES: Final = frozenset(
    {"model.safetensors.index.json", "pytorch_model.bin.index.json", "consolidated.safetensors"}
)

_LOADED_SUFFIXES: Final = frozenset({".distcp", ".jinja", ".json", ".model", ".py", ".yaml"})
_LOADED_NAMES: Final = frozenset({".metadata", "latest_checkpointed_iteration.txt", "merges.txt"})


def refuse_overlap(target: Location, sources: Iterable[Location]) -> None:
    """Refuse a target that holds a source, lies inside one, or is one.

    Replacing it would delete what is being read, and a checkpoint inside another would be carried
    along as a side file the next time.

    Raises:
        UsageError: BR001, naming both.
    """
    target_system, end = _anchor(target)
    for source in sources:
        system, start = _anchor(source)
        if system == target_system and (
            end == start or end in start.parents or start in end.parents
        ):
            raise UsageError(
                "source and target must not be one inside the other",
                where=[f"source {source}", f"target {target}"],
                hint="choose a directory beside the source; nothing was touched",
            )


def _anchor(location: Location) -> tuple[object, PurePath]:
    """Which filesystem a location is of, None for this machine's, and its one path there."""
    if isinstance(location, RemotePath) and "file" not in location.protocols:
        return type(location.fs), PurePosixPath(location.path)
    path = location.path if isinstance(location, RemotePath) else location
    return None, Path(os.path.realpath(path))


def may_be_loaded(name: str) -> bool:
    """Whether a file of this name, beside others, could change what a loader makes of a model."""
    path = PurePosixPath(name)
    return (
        _is_weight(path)
        or path.suffix in _LOADED_SUFFIXES
        or path.name in _LOADED_NAMES
        or path.parts[0].startswith("iter_")
    )


def side_files(directory: Location) -> tuple[list[str], list[str]]:
    """What an HF checkpoint holds besides its weights, relative, sorted.

    Returns:
        The files to carry: configuration, tokenizer, generation settings, chat template, remote
        code, licence and whatever else the publisher put there. And those that stay behind:
        weights in other formats, hidden directories, linked directories.

    Raises:
        UnsafeFileError: BR307, a name that no record can hold.
    """
    carried, left = [], []
    root = PurePosixPath(str(directory))
    paths: Iterable[Location] = directory.rglob("*")
    found = {PurePosixPath(str(path)).relative_to(root): path for path in paths}
    for relative in sorted(found):
        path, name = found[relative], relative.as_posix()
        hidden = any(part.startswith(".") for part in relative.parts[:-1])
        if path.is_dir():
            if path.is_symlink():
                left.append(f"{name}/")
        # A download from the Hub is a directory of links to files, so links count as files.
        elif not path.is_file() or hidden or _is_weight(path):
            left.append(name)
        elif name != MANIFEST_NAME:
            carried.append(name)
    if strange := [name for name in carried if not all(map(is_plain_name, name.split("/")))]:
        raise UnsafeFileError(
            "names of files that no record can hold",
            where=[f"{directory}/{name}" for name in strange],
            hint="rename the files: no backslash, nothing that cannot be printed, and UTF-8",
        )
    return carried, left


def _is_weight(path: PurePath | RemotePath) -> bool:
    return path.suffix in _WEIGHT_SUFFIXES or path.name in _WEIGHT_NAMES


def make_parents(directory: Path, name: str) -> None:
    """Make the directories of a file below one that is there.

    That one is not made: where its mount has vanished, it would come to lie on the disk beneath.
    """
    for parent in reversed(PurePosixPath(name).parents):
        if parent.name:
            (directory / parent).mkdir(exist_ok=True)


def write_small_file(directory: Path, name: str, data: bytes) -> None:
    """Write a file of a directory under construction, and make sure it is on the disk."""
    path = directory / name
    try:
        make_parents(directory, name)
        with path.open("xb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
    except OSError as error:
        raise CheckpointError(
            f"cannot write the file: {error.strerror}", where=str(path)
        ) from error


def read_small_file(path: Location) -> bytes:
    """Read a file whole.

    Raises:
        CheckpointError: BR300 when the system refuses, or as `read_input`.
    """
    try:
        return read_input(path)
    except OSError as error:
        raise CheckpointError(f"cannot read the file: {error.strerror}", where=str(path)) from None
