"""Text of strangers, for a terminal: shown, never obeyed.

Names of tensors, files and models come out of checkpoints. A terminal runs what it is sent: an
escape sequence retitles the window or rewrites what stands above it, a newline fakes a line of
ours, an override of direction turns a name around.
"""

from __future__ import annotations

import re
from typing import Final

_MOST: Final = 2000
_CONTROLS: Final = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # but newline and tab


def visible(text: str, *, keep: str = "", most: int | None = None) -> str:
    r"""Write out what does not print: ESC as `\x1b`, a newline as `\n`, an override as `\u202e`.

    Args:
        text: Of anybody.
        keep: Characters that stay, such as the newlines of a traceback.
        most: Characters to show of a longer text, and how many there are.
    """
    if most is not None and len(text) > most:
        text = f"{text[:most]}... ({len(text)} characters)"
    if text.isprintable():  # as nearly all of it is
        return text
    return "".join(one if one.isprintable() or one in keep else _written(one) for one in text)


def visible_line(text: str) -> str:
    """One line of a diagnostic, of a length that somebody can read."""
    return visible(text, most=_MOST)


def visible_prose(text: str) -> str:
    """What a model has written: its own newlines, tabs and joiners stay, controls are shown."""
    return _CONTROLS.sub(lambda found: _written(found[0]), text)


def _written(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")
