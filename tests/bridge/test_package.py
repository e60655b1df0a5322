"""The package's front door."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import bridge


@pytest.mark.parametrize("name", bridge.__all__)
def test_every_public_name_is_there(name: str) -> None:
    """Each is what its home module calls by that name."""
    assert getattr(bridge, name).__name__ == name


def test_an_unknown_name_is_an_attribute_error() -> None:
    """As for any module."""
    with pytest.raises(AttributeError, match="no attribute 'frobnicate'"):
        bridge.frobnicate  # noqa: B018 (the access is the test)


def test_importing_the_package_loads_no_torch() -> None:
    """Nor numpy, nor transformers: the names are loaded when they are used."""
    code = (
        "import sys, bridge; sys.exit(bool({'torch', 'numpy', 'transformers'} & set(sys.modules)))"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], check=False, cwd=root, timeout=60)  # noqa: S603 (our own interpreter)
    assert done.returncode == 0
