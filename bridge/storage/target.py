"""Directories that appear whole or not at all, and the small files carried into them."""

from __future__ import annotations

import glob
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePath, PurePosixPath
from typing import Final

from bridge.errors import CheckpointError, TargetExistsError, UsageError
from bridge.storage.input_files import read_input
from bridge.storage.remote import Location, RemotePath

_PARTIAL: Final = ".partial-"
_OLD: Final = "-old"
# Weights in any format; an export writes its own.
_WEIGHT_SUFFIXES: Final = frozenset(
    {".safetensors", ".bin", ".pt", ".pth", ".gguf", ".ggml", ".onnx", ".h5", ".msgpack", ".nemo"}
)
_WEIGHT_NAMES: Final = frozenset(
    {"model.safetensors.index.json", "pytorch_model.bin.index.json", "consolidated.safetensors"}
)


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


@contextmanager
def new_directory(target: Path, *, overwrite: bool) -> Iterator[Path]:
    """Give a directory beside `target` to fill; rename it into place when the block succeeds.

    A link is followed: what it points to is created or replaced. A failure removes what was built.
    A kill leaves a hidden `.NAME.partial-PID` that no reader mistakes for a checkpoint and that the
    next attempt on this machine sweeps away; had an old target been moved aside by then, it is put
    back first. An existing target is replaced only with `overwrite`, and only once the new one is
    complete.

    Raises:
        TargetExistsError: BR304, the target exists and is not an empty directory.
        CheckpointError: BR300, the system refuses.
    """
    target = Path(os.path.realpath(target))
    partial = target.parent / f".{target.name}{_PARTIAL}{os.getpid()}"
    try:
        _sweep(target)
        _refuse_existing(target, overwrite=overwrite)
        partial.mkdir(parents=True)
    except OSError as error:
        raise CheckpointError(
            f"cannot create the target: {error.strerror}", where=str(target)
        ) from None
    try:
        yield partial
        _sync_tree(partial)
        _put_in_place(partial, target)
    except OSError as error:
        raise CheckpointError(
            f"cannot write the target: {error.strerror}", where=str(error.filename or target)
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _refuse_existing(target: Path, *, overwrite: bool) -> None:
    if target.exists() and not target.is_dir():
        raise TargetExistsError("the target is a file", where=str(target), hint="give a directory")
    if _occupied(target) and not overwrite:
        raise TargetExistsError(
            "the target already exists",
            where=str(target),
            hint="choose another directory, or pass --overwrite to replace it once the new one "
            "is complete",
        )


def _occupied(target: Path) -> bool:
    return target.is_dir() and any(target.iterdir())


def _sweep(target: Path) -> None:
    """Clear up after processes that were killed; give back a target they had moved aside."""
    for left in sorted(target.parent.glob(f".{glob.escape(target.name)}{_PARTIAL}*")):
        pid = left.name.rpartition(_PARTIAL)[2].removesuffix(_OLD)
        # A container often gives the next attempt the number that the killed one had.
        mine = pid == str(os.getpid())
        if not pid.isdigit() or (Path(f"/proc/{pid}").exists() and not mine):
            continue
        if left.name.endswith(_OLD) and not target.exists():
            left.rename(target)
        else:
            shutil.rmtree(left, ignore_errors=True)


def _sync_tree(directory: Path) -> None:
    for path in (directory, *(path for path in directory.rglob("*") if path.is_dir())):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _put_in_place(partial: Path, target: Path) -> None:
    if not _occupied(target):
        if target.is_dir():
            target.rmdir()
        partial.rename(target)
        return
    old = target.parent / f".{target.name}{_PARTIAL}{os.getpid()}{_OLD}"
    target.rename(old)
    try:
        partial.rename(target)
    except OSError:
        old.rename(target)
        raise
    shutil.rmtree(old, ignore_errors=True)


def side_files(directory: Location) -> tuple[list[str], list[str]]:
    """What an HF checkpoint holds besides its weights, relative, sorted.

    Returns:
        The files to carry: configuration, tokenizer, generation settings, chat template, remote
        code, licence and whatever else the publisher put there. And those that stay behind:
        weights in other formats, hidden directories, linked directories.
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
        else:
            carried.append(name)
    return carried, left


def _is_weight(path: Location) -> bool:
    return path.suffix in _WEIGHT_SUFFIXES or path.name in _WEIGHT_NAMES


def write_small_file(directory: Path, name: str, data: bytes) -> None:
    """Write a file of a directory under construction, and make sure it is on the disk."""
    path = directory / name
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
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
