"""Single files that commands write where the user says."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from bridge.errors import CheckpointError


def check_output(path: Path) -> None:
    """Refuse a file that could not be written, before hours are spent on what it is to hold.

    Raises:
        CheckpointError: BR300, no such directory, a directory itself, or no permission.
    """
    if path.is_dir():
        problem = "is a directory"
    elif not path.parent.is_dir():
        problem = "is in no such directory"
    elif not os.access(path if path.exists() else path.parent, os.W_OK):
        problem = "is not writable"
    else:
        return
    raise CheckpointError(
        f"the output {problem}", where=str(path), hint="name a file in a directory that is there"
    )


def write_whole(path: Path, content: bytes) -> None:
    """Write a file that is there whole or not at all; one that is there is replaced.

    Raises:
        CheckpointError: BR300, it cannot be written.
    """
    check_output(path)
    try:
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=path.name, delete=False) as file:
            partial = Path(file.name)
            try:
                file.write(content)
                file.close()
                partial.chmod(0o644)  # a temporary file is the writer's alone
                partial.replace(path)
            finally:
                partial.unlink(missing_ok=True)
    except OSError as error:
        raise CheckpointError(f"cannot write the output: {error}", where=str(path)) from None
