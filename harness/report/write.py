"""Every report of a run, in one directory."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from bridge.outputs import write_atomically
from harness.report.evidence import FILE_NAME, to_json
from harness.report.html import html
from harness.report.junit import junit
from harness.report.markdown import markdown

MATRIX_NAME: Final = "faults.json"
"""What `nemotron-bridge faults --report DIR` leaves there."""


def write_reports(data: Mapping[str, Any], directory: Path) -> None:
    """Write `evidence.json`, `junit.xml`, `report.md` and `report.html`.

    Evidence comes first: should another form fail, what it is made from is there. A kill matrix in
    the same directory is shown beside it.

    Args:
        data: Evidence.
        directory: Must exist.
    """
    kill_matrix = kill_matrix_in(directory)
    write_atomically(directory / FILE_NAME, to_json(data))
    write_atomically(directory / "junit.xml", junit(data))
    write_atomically(directory / "report.md", markdown(data, kill_matrix=kill_matrix))
    write_atomically(directory / "report.html", html(data, kill_matrix=kill_matrix))


def kill_matrix_in(directory: Path) -> dict[str, Any] | None:
    """The kill matrix of a run that reported into this directory; None without a readable one."""
    try:
        found = json.loads((directory / MATRIX_NAME).read_text("utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) and "killed_by" in found else None
