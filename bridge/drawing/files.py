"""A picture as a file: its suffix says in which form."""

from __future__ import annotations

from pathlib import Path

from bridge.drawing.architecture import Architecture
from bridge.drawing.figure import figure
from bridge.drawing.png import check_pillow, png
from bridge.drawing.svg import svg
from bridge.errors import CheckpointError, UsageError
from bridge.outputs import check_output, write_atomically


def check_picture(path: Path, *, overwrite: bool) -> None:
    """Refuse a file that could not be written, before anything is read.

    Raises:
        UsageError: BR001, neither .svg nor .png.
        CheckpointError: BR300, no place for a file.
        TargetExistsError: BR304, it is there, and not to be replaced.
        EnvironmentMissingError: BR500, a PNG without Pillow.
    """
    if path.suffix.lower() not in {".svg", ".png"}:
        raise UsageError(
            "a picture is an .svg or a .png file", where=f"--draw {path}", hint="name one"
        )
    check_output(path, overwrite=overwrite)
    if path.suffix.lower() == ".png":
        check_pillow()


def write_picture(found: Architecture, path: Path, *, overwrite: bool) -> None:
    """Draw a model into a file that has passed `check_picture`.

    Raises:
        CheckpointError: BR300, the disk is full, say.
    """
    drawn = figure(found)
    content = png(drawn) if path.suffix.lower() == ".png" else svg(drawn)
    try:
        write_atomically(path, content, overwrite=overwrite)
    except OSError as error:
        raise CheckpointError(f"cannot write the picture: {error}", where=str(path)) from None
