"""The documentation tells the truth: its commands run as they are printed.

Blocks marked `bash` are run, page by page, each page in a directory of its own; blocks marked `sh`
need a real checkpoint, a GPU or a cluster, and so do scripts: `test_commands.py` parses them, and
`tests/test_clusters.py` reads those of its page.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import bridge

ROOT = Path(__file__).parents[2]


def commands(page: Path) -> list[str]:
    """The blocks of a page that a reader pastes into a shell."""
    text = page.read_text(encoding="utf-8")
    return re.findall(r"^```bash\n(?!#!)(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)


PAGES = sorted(
    page
    for page in (ROOT / "docs").rglob("*.md")
    if "evidence" not in page.parts and commands(page)
)


@pytest.mark.ranks
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_commands_of_a_page_run(page: Path, tmp_path: Path) -> None:
    """As a reader would paste them, one after the other; the first that fails ends the page."""
    command = tmp_path / "bin" / "nemotron-bridge"
    command.parent.mkdir()
    command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m harness "$@"\n')
    command.chmod(0o755)
    done = subprocess.run(  # noqa: S603  # the page's own commands
        ["bash", "-euxo", "pipefail", "-c", "\n".join(commands(page))],  # noqa: S607  # the user's bash
        cwd=tmp_path,
        env=os.environ
        | {
            "PATH": f"{command.parent}{os.pathsep}{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
        },
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_every_public_name_is_in_the_reference() -> None:
    """The page on Python has what `from bridge import ...` has, each once, and no other of it."""
    page = (ROOT / "docs" / "reference" / "python.md").read_text(encoding="utf-8")
    named = re.findall(r"^\.\. auto\w+:: bridge\.(\w+)$", page, flags=re.MULTILINE)
    assert sorted(named) == sorted(bridge.__all__)


def test_every_page_is_reached() -> None:
    """No reader finds a page that no table of contents names."""
    index = (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
    named = set(re.findall(r"^([\w/*-]+)$", index, flags=re.MULTILINE))
    for page in (ROOT / "docs").rglob("*.md"):
        name = page.relative_to(ROOT / "docs").with_suffix("").as_posix()
        if name != "index" and not name.startswith("evidence/"):
            assert name in named or f"{name.rpartition('/')[0]}/*" in named, name
