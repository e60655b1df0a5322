"""A directory in which files are built before they are uploaded."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Final

from bridge import scratch
from bridge.errors import CheckpointError
from bridge.scratch import held_directory

HINT: Final = (
    "--staging DIR takes another disk; more tensor and pipeline ranks, or a smaller "
    "--max-shard-size, make smaller files"
)
_PREFIX: Final = "nemotron-bridge-staging-"


@contextmanager
def staging_directory(parent: Path | None, *, needed: int) -> Iterator[Path]:
    """Give an empty directory, and remove it afterwards; those of processes killed go first.

    Args:
        parent: Where to make it; None takes TMPDIR or the system's temporary directory.
        needed: Bytes of the largest file that will be built in it.

    Raises:
        CheckpointError: BR300, there is no room for that file, or the system refuses.
    """
    root = parent if parent is not None else Path(tempfile.gettempdir())
    with ExitStack() as stack:
        try:
            directory = stack.enter_context(held_directory(parent, prefix=_PREFIX))
        except OSError as error:
            raise CheckpointError(
                f"cannot create a staging directory: {error.strerror}", where=str(root), hint=HINT
            ) from None
        free = shutil.disk_usage(directory).free
        if free < needed:
            raise CheckpointError(
                f"no room to build a file of {needed / 1e9:.3g} GB before its upload: "
                f"{free / 1e9:.3g} GB are free",
                where=str(root),
                hint=HINT,
            )
        yield directory


def sweep(parent: Path | None) -> None:
    """Remove what nobody holds any more.

    Args:
        parent: See `staging_directory`.
    """
    scratch.sweep(parent, prefix=_PREFIX)
