"""What a repository keeps of a run: still evidence, and nothing of where it was made."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from harness.report.evidence import read_evidence
from harness.report.keep import kept, main

KEPT = Path(__file__).parents[3] / "docs" / "evidence"
Evidence = Callable[..., dict[str, Any]]


def test_only_what_passed_loses_details(make_evidence: Evidence) -> None:
    """Values and limits stay; failures stay whole."""
    data = make_evidence()
    found = kept(data, details=False)
    for before, after in zip(data["cases"], found["cases"], strict=True):
        if before["status"] == "passed" and "details" in before:
            assert after == {**before, "details": {}}
        else:
            assert after == before
    assert kept(data) == data
    assert any(case["details"] for case in data["cases"] if case["status"] == "passed")


def test_where_the_report_lay_is_left_out(make_evidence: Evidence, tmp_path: Path) -> None:
    """The rest of the command is what can be typed again; the file is a case a line."""
    data = make_evidence(
        command=[
            "nemotron-bridge",
            "parity",
            "--report",
            "/somewhere/else",
            "--select",
            "x",
            "--workdir",
            "/somewhere",
            "--report=/somewhere",
        ]
    )
    (tmp_path / "evidence.json").write_text(json.dumps(data), "utf-8")
    main([str(tmp_path), str(tmp_path / "deep" / "kept")])
    found = read_evidence(tmp_path / "deep" / "kept")
    assert found == {**data, "command": ["nemotron-bridge", "parity", "--select", "x"]}
    text = (tmp_path / "deep" / "kept" / "evidence.json").read_text("utf-8")
    assert sum(line.startswith('{"id":') for line in text.splitlines()) == len(data["cases"])
    assert "/somewhere" not in (tmp_path / "deep" / "kept" / "report.md").read_text("utf-8")


def test_the_evidence_kept_here_is_valid_and_passed() -> None:
    """By the schema as it is now; each with its report."""
    files = sorted(KEPT.glob("*/evidence.json"))
    assert files
    for path in files:
        assert read_evidence(path.parent)["verdict"] == "passed", path
        assert (path.parent / "report.md").is_file()
