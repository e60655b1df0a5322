"""Running a command line through the entry point."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import NamedTuple, Protocol

import pytest

from harness.cli import main


class Outcome(NamedTuple):
    """What a command printed and returned."""

    code: int
    out: str
    err: str


class Run(Protocol):
    """Runs one command line."""

    def __call__(self, *arguments: str | Path) -> Outcome:
        """Give what it printed, and its exit code."""
        ...


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run a command line through the entry point, in this process."""

    def runner(*arguments: str | Path) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["nemotron-bridge", *map(str, arguments)])
        code = 0
        try:
            main()
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        captured = capsys.readouterr()
        return Outcome(code, captured.out, captured.err)

    return runner
