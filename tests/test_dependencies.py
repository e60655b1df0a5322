"""What the packages import is what pyproject.toml installs, so that the wheel works by itself.

`nox -s wheel` tries it in an empty environment; this reads it off the code, wherever a test runs.
"""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from functools import cache
from importlib.metadata import packages_distributions
from pathlib import Path
from typing import Any, Final

import pytest

ROOT = Path(__file__).parents[1]
OWN: Final = ("bridge", "harness")
OPTIONAL: Final = {
    "PIL": ("pillow", "png"),
    "pytest": ("pytest", "test"),
    "hypothesis": ("hypothesis", "test"),
    "transformer_engine": ("transformer-engine", "te"),
}
"""What is imported only where somebody wants it: its distribution, and the extra it is in.

By hand, for it need not be installed here.
"""


@cache
def project() -> dict[str, Any]:
    """pyproject.toml's own table."""
    table: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    return table


def normal(requirement: str) -> str:
    """The name of a distribution, as an index spells it."""
    return re.sub(r"[-_.]+", "-", re.split(r"[ \[<>=!~;]", requirement)[0]).lower()


@cache
def imports() -> dict[str, list[str]]:
    """Top-level packages that are not ours nor Python's, and the files that import them."""
    found: dict[str, list[str]] = {}
    for path in sorted(path for own in OWN for path in (ROOT / own).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and not node.level:
                names = [node.module or ""]
            else:
                continue
            for top in {name.partition(".")[0] for name in names}:
                if top not in OWN and top not in sys.stdlib_module_names:
                    found.setdefault(top, []).append(path.relative_to(ROOT).as_posix())
    return found


@pytest.mark.parametrize("package", sorted(imports()))
def test_what_is_imported_is_a_dependency(package: str) -> None:
    """Of the project itself, or of the extra that is named above."""
    if package in OPTIONAL:
        distribution, extra = OPTIONAL[package]
        wanted = {normal(one) for one in project()["optional-dependencies"][extra]}
        assert distribution in wanted, (extra, imports()[package])
        return
    wanted = {normal(one) for one in project()["dependencies"]}
    installed_by = {normal(one) for one in packages_distributions().get(package, [])}
    assert installed_by & wanted, (installed_by, imports()[package])


def test_what_is_optional_is_imported() -> None:
    """Or the table above has an entry that hides something one day."""
    assert set(OPTIONAL) <= set(imports())
