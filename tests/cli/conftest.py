"""Running a command line through the entry point."""

from __future__ import annotations

import pytest

from tests.commands import Outcome, Run, run

__all__ = ["Outcome", "Run", "run"]


@pytest.fixture(autouse=True)
def bits_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """`--verify auto` compares bits and no more: these tests are about other things.

    What it adds is in `test_block_parity.py`.
    """
    monkeypatch.setattr("bridge.cli_verification.block_verification", None)
