"""Which iteration of a Megatron checkpoint is meant, by its tracker or by name, and its reader."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final

from bridge.errors import CheckpointError, CorruptFileError
from bridge.storage.input_files import read_input, refuse_link_out
from bridge.storage.remote import Location, reason
from bridge.storage.torch_dist_config import CONFIG_NAME, METADATA_NAME, TRACKER_NAME
from bridge.storage.torch_dist_read import TorchDistReader
from bridge.storage.torch_legacy import TorchLegacyReader
from bridge.storage.torch_legacy_ranks import rank_directories

RELEASE: Final = "release"
NEMO_WEIGHTS: Final = "weights"
"""Where NeMo 2 keeps the checkpoint itself, beside `context` with configuration and tokenizer."""
_ITERATION: Final = re.compile(r"iter_(\d{7,})")
_MAX_TRACKER: Final = 1 << 16  # bytes
_MAX_DIGITS: Final = 18
"""Of an iteration; a tracker with more is damaged, and no name of a directory."""


def open_checkpoint(path: Location) -> tuple[Location, int]:
    """Find the iteration to read.

    Args:
        path: A checkpoint's root, whose tracker file names the iteration, or an iteration's own
            directory: `iter_0000010`, `release`, or any that holds `metadata.json`.

    Returns:
        The iteration's directory and its number; `release` counts as 0, as in Megatron-LM.

    Raises:
        CheckpointError: BR300, no such directory, one that may not be read, or neither tracker nor
            iteration in it.
        CorruptFileError: BR302, a tracker that does not say, or names an iteration that is not
            there.
        UnsafeFileError: BR307, one that is a link to somewhere else.
    """
    with _named_if_unreadable(path):
        return _open_checkpoint(path)


def _open_checkpoint(path: Location) -> tuple[Location, int]:
    if path.name.endswith(".nemo") and path.is_file():
        raise CheckpointError(
            "a .nemo archive of NeMo 1 cannot be read",
            where=str(path),
            hint="load it with NeMo 2 and save it: the directory with weights/ and context/ can be",
        )
    if not path.is_dir():
        raise CheckpointError("no such directory", where=str(path))
    if _is_iteration(path):
        return path, _iteration_of(path)
    if _is_iteration(path / NEMO_WEIGHTS):
        refuse_link_out(path / NEMO_WEIGHTS)
        return path / NEMO_WEIGHTS, _iteration_of(path / NEMO_WEIGHTS)
    present = sorted(
        child.name
        for child in path.iterdir()
        if child.is_dir() and (_ITERATION.fullmatch(child.name) or child.name == RELEASE)
    )
    there = f"the directory holds {', '.join(present) or 'no iteration'}"
    tracker = path / TRACKER_NAME
    try:
        text = read_input(tracker, most=_MAX_TRACKER).decode("utf-8").strip()
    except FileNotFoundError:
        raise CheckpointError(
            f"no Megatron checkpoint: {TRACKER_NAME} is missing",
            where=str(path),
            hint=f"{there}; name one of them directly" if present else there,
        ) from None
    except (OSError, ValueError) as error:
        raise CorruptFileError(f"cannot read the tracker: {error}", where=str(tracker)) from None
    number = text.isascii() and text.isdigit() and len(text) <= _MAX_DIGITS
    if text != RELEASE and not number:
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
    refuse_link_out(directory)
    return directory, 0 if text == RELEASE else int(text)


def open_reader(
    directory: Location, *, ignore: Callable[[str], bool]
) -> TorchDistReader | TorchLegacyReader:
    """Open the checkpoint that an iteration's directory holds, in either format.

    Args:
        directory: As `open_checkpoint` gives it.
        ignore: Keys to leave unchecked until they are read, such as optimizer state.

    Raises:
        CheckpointError: BR300, neither format, or files that may not be read.
        CorruptFileError: BR302, files that contradict each other.
    """
    with _named_if_unreadable(directory):
        if not (directory / CONFIG_NAME).is_file() and rank_directories(directory):
            return TorchLegacyReader(directory)
        return TorchDistReader(directory, ignore=ignore)


@contextmanager
def _named_if_unreadable(where: Location) -> Iterator[None]:
    """Name what the system lets nobody of these rights look into.

    Raises:
        CheckpointError: BR300, with the file or directory.
    """
    try:
        yield
    except PermissionError as error:
        raise CheckpointError(
            f"cannot read it: {reason(error)}",
            where=str(error.filename or where),
            hint="every file and directory of the checkpoint has to be readable",
        ) from None


def _is_iteration(path: Location) -> bool:
    return (
        (path / METADATA_NAME).is_file()
        or (path / CONFIG_NAME).is_file()
        or (path.is_dir() and bool(rank_directories(path)))
    )


def _iteration_of(directory: Location) -> int:
    """The iteration of a directory, by its name or else by what it says itself."""
    name = directory.resolve().name
    match = _ITERATION.fullmatch(name)
    if match:
        return int(match[1])
    if name == RELEASE:
        return 0
    with open_reader(directory, ignore=lambda _: True) as reader:
        common = reader.common()
    # NeMo 2 counts in PyTorch Lightning's words.
    iteration = common.get("iteration", common.get("global_step"))
    if not isinstance(iteration, int):
        raise CorruptFileError(
            "neither the directory's name nor its common state tells the iteration",
            where=str(directory),
            hint=f"rename it to iter_0000000 and name it in {TRACKER_NAME}",
        )
    return iteration
