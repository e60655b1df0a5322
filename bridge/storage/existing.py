"""What is at a target already, and whether it may give way."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path
from typing import Final

from bridge.errors import TargetExistsError
from bridge.storage.locks import LOCK_NAME, PARTIAL, locked
from bridge.storage.target import MANIFEST_NAME

_OF_CHECKPOINTS: Final = (
    "config.json", MANIFEST_NAME, "latest_checkpointed_iteration.txt", "iter_*", "*.safetensors",
    "*.safetensors.index.json", ".metadata",
)  # fmt: skip
"""Without any of these a directory is no checkpoint, and `--overwrite` does not mean it."""


def refuse_existing(target: Path, *, overwrite: bool) -> None:
    """See that a target, its links followed, is not there or may give way.

    Raises:
        TargetExistsError: BR304, it may not.
    """
    if target.is_symlink():
        raise TargetExistsError(
            "the target is a link that leads to itself", where=str(target), hint="remove the link"
        )
    if target.exists() and not target.is_dir():
        raise TargetExistsError("the target is a file", where=str(target), hint="give a directory")
    if target.is_mount():
        raise TargetExistsError(
            "the target is a mount point, which no directory can take the place of",
            where=str(target),
            hint="give a directory in it",
        )
    if Path.cwd().is_relative_to(target):
        raise TargetExistsError(
            "the target is, or holds, the current directory, which would be another one then",
            where=str(target),
            hint="give a directory in it, or run the command from elsewhere",
        )
    if not is_occupied(target):
        return
    if not overwrite:
        raise TargetExistsError(
            "the target already exists",
            where=str(target),
            hint="choose another directory, or pass --overwrite to replace it once the new one "
            "is complete",
        )
    if not any(True for pattern in _OF_CHECKPOINTS for _ in target.glob(pattern)):
        raise TargetExistsError(
            "the target exists and is no checkpoint; --overwrite replaces nothing else",
            where=str(target),
            hint="choose another directory, or remove this one yourself",
        )
    if not os.access(target, os.W_OK):
        raise TargetExistsError(
            "the target is write-protected",
            where=str(target),
            hint="allow its owner to write there if it is to be replaced (chmod u+w)",
        )
    _refuse_busy(target)


def _refuse_busy(target: Path) -> None:
    """Refuse a target in which another process builds one of its own."""
    for lock in target.rglob(f".*{PARTIAL}/{LOCK_NAME}"):
        try:
            with locked(lock, fcntl.LOCK_SH):
                pass
        except BlockingIOError:
            raise TargetExistsError(
                "another process is building a checkpoint in this one",
                where=[str(target), str(lock)],
                hint="wait for it, or choose another target",
            ) from None


def is_occupied(target: Path) -> bool:
    """Whether there is a directory with anything in it."""
    return target.is_dir() and any(target.iterdir())
