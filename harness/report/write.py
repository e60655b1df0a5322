"""Every report of a run, in one directory."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from harness.report.evidence import FILE_NAME, to_json
from harness.report.files import write_atomically
from harness.report.html import html
from harness.report.junit import junit
from harness.report.markdown import markdown


def write_reports(
    data: Mapping[str, Any], directory: Path, *, kill_matrix: Mapping[str, Any] | None = None
) -> None:
    """Write `evidence.json`, `junit.xml`, `report.md` and `report.html`.

    Evidence comes first: should another form fail, what it is made from is there.

    Args:
        data: Evidence.
        directory: Must exist.
        kill_matrix: What `nemotron-bridge faults --json` prints, to be shown beside it.
    """
    write_atomically(directory / FILE_NAME, to_json(data))
    write_atomically(directory / "junit.xml", junit(data))
    write_atomically(directory / "report.md", markdown(data, kill_matrix=kill_matrix))
    write_atomically(directory / "report.html", html(data, kill_matrix=kill_matrix))
