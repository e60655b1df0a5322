"""What a repository keeps of a run: still evidence, and nothing of where it was made."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from harness.errors import EvidenceError
from harness.faults.journal import read_matrix
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
            "/somewhere/far/away/hf",
            "--input=/somewhere/far/away/tokens",
            "a/relative/path/here",
            "https://else.where/a/b",
        ]
    )
    (tmp_path / "evidence.json").write_text(json.dumps(data), "utf-8")
    main([str(tmp_path), str(tmp_path / "deep" / "kept")])
    found = read_evidence(tmp_path / "deep" / "kept")
    left = ["--select", "x", "away/hf", "--input=away/tokens"]
    left += ["a/relative/path/here", "https://else.where/a/b"]
    assert found == {**data, "command": ["nemotron-bridge", "parity", *left]}
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


@pytest.mark.parametrize("name", ["evidence.json", "faults.jsonl"])
def test_what_cannot_be_read_leaves_no_directory(tmp_path: Path, name: str) -> None:
    """Nothing is begun that cannot be ended."""
    (tmp_path / name).write_text("{", "utf-8")
    with pytest.raises((EvidenceError, ValueError)):
        main([str(tmp_path), str(tmp_path / "kept")])
    assert not (tmp_path / "kept").exists()


def test_a_kill_matrix_is_kept_by_its_units(tmp_path: Path) -> None:
    """Without the places they ran at; the report is what they say."""
    check = {"toy": "51b", "seconds": 1.5, "seconds_by_check": {"rope": 1.5}, "looked": ["rope"]}
    units = [
        {**check, "fault": "rope-theta", "dtype": "float32", "killed_by": ["rope"],
         "first": "rope/51b/tp1-pp1/float32: /somewhere/else: off"},
        {**check, "fault": "rope-theta", "dtype": "bfloat16", "killed_by": [], "first": ""},
    ]  # fmt: skip
    identity = {"faults": ["rope-plain", "rope-theta"]}
    lines = [json.dumps(one) for one in ({"identity": identity}, *units)]
    (tmp_path / "faults.jsonl").write_text("\n".join(lines) + "\n", "utf-8")
    main([str(tmp_path), str(tmp_path / "kept")])
    text = (tmp_path / "kept" / "faults.jsonl").read_text("utf-8")
    assert "/somewhere" not in text
    assert [json.loads(line) for line in text.splitlines()] == [
        {"identity": identity},
        {**units[0], "first": "rope/51b/tp1-pp1/float32"},
        units[1],
    ]
    report = (tmp_path / "kept" / "report.md").read_text("utf-8")
    assert report.startswith("# PASSED: 1 of 1 faults killed by 1 checks on 51b\n")
    assert "In bfloat16 alone: 0 killed; these survived: rope-theta.\n" in report


def test_the_matrix_kept_here_has_no_survivor_and_every_check_is_needed() -> None:
    """By today's rules; what bfloat16 hides, float32 shows, and the page names it."""
    matrix = read_matrix(KEPT / "faults-te-unfused" / "faults.jsonl")
    assert len(matrix.units) == 616
    assert matrix.survivors == matrix.idle_checks == matrix.redundant_checks == []
    alive = [name for name, killers in matrix.killed_in("bfloat16").items() if not killers]
    page = (KEPT.parent / "gpus.md").read_text("utf-8")
    assert alive
    assert all(f"`{name}`" in page for name in alive)
