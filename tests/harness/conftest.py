"""What tests of the harness share."""

from __future__ import annotations

from tests.commands import run

__all__ = ["run"]
