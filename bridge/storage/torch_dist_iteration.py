"""Which iteration of a Megatron checkpoint is meant: by its tracker, or named itself."""

from __future__ import annotations

import re
from typing import Final

from bridge.errors import CheckpointError, CorruptFileError
from bridge.storage.remote import Location
from bridge.storage.torch_dist_config import CONFIG_NAME, METADATA_NAME, TRACKER_NAME
from bridge.storage.torch_dist_read import TorchDistReader

RELEASE: Final = "release"
_ITERATION: Final = re.compile(r"iter_(\d{7,})")


def open_checkpoint(path: Location) -> tuple[Location, int]:
    """Find the iteration to read.

    Args:
        path: A checkpoint's root, whose tracker file names the iteration, or an iteration's own
            directory: `iter_0000010`, `release`, or any that holds `metadata.json`.

    Returns:
        The iteration's directory and its number; `release` counts as 0, as in Megatron-LM.

    Raises:
        CheckpointError: BR300, no such directory, or neither tracker nor iteration in it.
        CorruptFileError: BR302, a tracker that does not say, or names an iteration that is not
            there.
    """
    if not path.is_dir():
        raise CheckpointError("no such directory", where=str(path))
    if (path / METADATA_NAME).is_file() or (path / CONFIG_NAME).is_file():
        return path, _iteration_of(path)
    present = sorted(
        child.name
        for child in path.iterdir()
        if child.is_dir() and (_ITERATION.fullmatch(child.name) or child.name == RELEASE)
    )
    there = f"the directory holds {', '.join(present) or 'no iteration'}"
    tracker = path / TRACKER_NAME
    try:
        text = tracker.read_text(encoding="utf-8").strip()
    except FileNotFoundError:
        raise CheckpointError(
            f"no Megatron checkpoint: {TRACKER_NAME} is missing",
            where=str(path),
            hint=f"{there}; name one of them directly" if present else there,
        ) from None
    except (OSError, ValueError) as error:
        raise CorruptFileError(f"cannot read the tracker: {error}", where=str(tracker)) from None
    if text != RELEASE and not (text.isascii() and text.isdigit()):
        raise CorruptFileError(
            f"the tracker holds {text[:40]!r}, neither an iteration nor 'release'",
            where=str(tracker),
            hint=there,
        )
    directory = path / (RELEASE if text == RELEASE else f"iter_{int(text):07d}")
    if not directory.is_dir():
        raise CorruptFileError(
            f"the tracker names {directory.name}, which is missing", where=str(tracker), hint=there
        )
    return directory, 0 if text == RELEASE else int(text)


def _iteration_of(directory: Location) -> int:
    """The iteration of a directory, by its name or else by what it says itself."""
    name = directory.resolve().name
    match = _ITERATION.fullmatch(name)
    if match:
        return int(match[1])
    if name == RELEASE:
        return 0
    with TorchDistReader(directory, ignore=lambda _: True) as reader:
        iteration = reader.common().get("iteration")
    if not isinstance(iteration, int):
        raise CorruptFileError(
            "neither the directory's name nor its common state tells the iteration",
            where=str(directory),
            hint=f"rename it to iter_0000000 and name it in {TRACKER_NAME}",
        )
    return iteration
