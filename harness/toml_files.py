"""TOML that somebody has written by hand: a document, or why it is none."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any


def read_toml(path: Path) -> dict[str, Any]:
    """Read a TOML file.

    Raises:
        OSError: It cannot be read.
        ValueError: It is no UTF-8, no TOML, or nests deeper than Python's stack is.
    """
    try:
        return tomllib.loads(path.read_text("utf-8"))
    except RecursionError:
        raise ValueError("nested too deeply") from None
