"""Where the harness's own data lies, in a checkout and in an installed wheel."""

from __future__ import annotations

from pathlib import Path
from typing import Final

_PACKAGE: Final = Path(__file__).parent


def suites_dir() -> Path:
    """The `suites/` folder: beside the packages in a checkout, inside `harness` in a wheel."""
    packaged = _PACKAGE / "data" / "suites"
    return packaged if packaged.is_dir() else _PACKAGE.parent / "suites"


def golden_dir() -> Path:
    """The `golden/` folder, found as `suites_dir` is."""
    packaged = _PACKAGE / "data" / "golden"
    return packaged if packaged.is_dir() else _PACKAGE.parent / "golden"
