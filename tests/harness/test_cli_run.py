"""A run with a report: what it leaves, and how it goes on after it was killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import xml.etree.ElementTree as ET
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import harness.cli  # noqa: F401 - it adds the commands
from bridge.cli import app
from bridge.errors import EnvironmentMissingError, UsageError
from harness.checks import Check
from harness.compare import Finding
from harness.conditions import float32_products
from harness.errors import ResumeError
from harness.runner import RunReport
from harness.suite import Case
from harness.thresholds import load_thresholds

CASES = [Case(check="config", model=model, dtype="float32") for model in ("tied", "nano-4b", "51b")]


def run_cases(report: Path, cases: list[Case] = CASES, **flags: Any) -> RunReport:  # noqa: ANN401 - its own
    """Run cases with a report, in this process."""
    from harness.cli_run import run_and_report

    return run_and_report(cases, {}, timeout=60.0, report_dir=report, suite="some", **flags)


def behave(monkeypatch: pytest.MonkeyPatch, what: Callable[[Case], Finding]) -> list[str]:
    """Replace what every check does; gives the ids of the cases that were run."""
    ran: list[str] = []

    def run(_self: Check, case: Case, _bench: object) -> Finding:
        ran.append(case.id)
        return what(case)

    monkeypatch.setattr(Check, "run", run)
    return ran


def judge(case: Case) -> Finding:
    """nano-4b fails, 51b cannot be carried out."""
    if case.model == "51b":
        raise ValueError("no memory")
    passed = case.model != "nano-4b"
    return Finding(passed=passed, summary=f"{case.model}", value=0.5 if passed else 9.0, limit=1.0)


def test_a_resumed_run_keeps_verdicts_reruns_errors_and_counts_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A failed case stays failed: only what has no verdict is tried again."""
    behave(monkeypatch, judge)
    first = run_cases(tmp_path)
    assert first.count_line == "1 passed, 1 failed, 1 error"
    started = json.loads((tmp_path / "evidence.json").read_text("utf-8"))["started"]

    ran = behave(monkeypatch, lambda _case: Finding(passed=True, summary="now"))
    second = run_cases(tmp_path, resume=True, form="json")
    assert ran == ["config/51b/float32"]
    assert second.count_line == "2 passed, 1 failed"
    assert second.exit_code == 1
    assert second.seconds >= first.seconds
    data = json.loads((tmp_path / "evidence.json").read_text("utf-8"))
    assert (data["resumed_cases"], data["started"]) == (2, started)
    assert [case["id"] for case in data["cases"]] == [case.id for case in CASES]
    assert set(data["inputs"]) == {f"{case.model}/float32" for case in CASES}
    assert data["memory"]["main_bytes"] > 0
    assert capsys.readouterr().out.endswith((tmp_path / "evidence.json").read_text("utf-8"))


def test_a_run_with_other_limits_cases_or_code_is_not_resumed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each alone is enough, and the report is left as it was."""
    from harness import thresholds
    from harness.report import provenance

    behave(monkeypatch, judge)
    run_cases(tmp_path)
    before = (tmp_path / "journal.jsonl").read_bytes()
    with pytest.raises(ResumeError, match="cases"):
        run_cases(tmp_path, CASES[:2], resume=True)
    with monkeypatch.context() as patch:
        patch.setattr(provenance, "code_sha256", lambda: "f" * 64)
        with pytest.raises(ResumeError, match="code"):
            run_cases(tmp_path, resume=True)
    known = load_thresholds()
    fewer = thresholds.Thresholds(by_key=dict(list(known.by_key.items())[1:]))
    with monkeypatch.context() as patch:
        patch.setattr(thresholds, "load_thresholds", lambda: fewer)
        with pytest.raises(ResumeError, match="thresholds"):
            run_cases(tmp_path, resume=True)
    assert (tmp_path / "journal.jsonl").read_bytes() == before


def test_other_weights_under_the_same_name_are_not_resumed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The user's checkpoint is known by its bytes, not by its path."""
    from harness.bench import Subject
    from harness.cli_run import run_and_report
    from harness.toys import toy_named, write_checkpoint

    hf = tmp_path / "model"
    write_checkpoint(toy_named("tied"), hf)
    behave(monkeypatch, lambda _case: Finding(passed=True, summary="fine"))
    cases, report = [Case(check="config", model="model", dtype="float32")], tmp_path / "report"

    def run(*, resume: bool) -> None:
        subjects = {"model": Subject(name="model", hf=hf)}
        run_and_report(cases, subjects, timeout=60.0, report_dir=report, resume=resume)

    run(resume=False)
    run(resume=True)
    shard = max(hf.glob("*.safetensors"))
    weights = bytearray(shard.read_bytes())
    weights[-1] ^= 1
    shard.write_bytes(bytes(weights))
    with pytest.raises(ResumeError, match="inputs"):
        run(resume=True)


def test_resume_without_a_report_is_bad_usage() -> None:
    """One error with what to do, before anything is run."""
    found = CliRunner().invoke(app, ["parity", "--select", "config/tied", "--resume"])
    assert isinstance(found.exception, UsageError)
    assert "--report" in str(found.exception)
    assert found.output == ""


KILLED = """
import os, signal
from harness.checks import Check
from harness.cli import main

real = Check.run

def run(check, case, bench):
    if case.model == "tied":  # the suite's last
        os.kill(os.getpid(), signal.SIGKILL)
    return real(check, case, bench)

Check.run = run
main()
"""
"""The command, but that something kills it in the middle of its third case."""


def test_a_run_killed_half_way_goes_on_where_it_was(tmp_path: Path) -> None:
    """The cases before the SIGKILL are not run again, and all are counted."""
    report = tmp_path / "report"
    command = ["parity", "--report", str(report)]
    for case in CASES:
        command += ["--select", case.id]
    killed = subprocess.run(  # noqa: S603 - our own command
        [sys.executable, "-c", KILLED, *command],
        capture_output=True,
        check=False,
        timeout=120,
        env={**os.environ, "TMPDIR": str(tmp_path)},
    )
    assert killed.returncode == -signal.SIGKILL
    assert not (report / "evidence.json").exists()
    settled = (report / "journal.jsonl").read_bytes()
    assert settled.count(b"\n") == 1 + 2

    done = CliRunner().invoke(app, [*command, "--resume", "--format", "junit"])
    assert done.exit_code == 0, done.output
    journal = (report / "journal.jsonl").read_bytes()
    assert journal.startswith(settled)
    assert journal.count(b"\n") == 1 + 3
    data = json.loads((report / "evidence.json").read_text("utf-8"))
    assert data["counts"] == "3 passed, 0 failed"
    assert data["resumed_cases"] == 2
    assert done.stdout == (report / "junit.xml").read_text("utf-8")
    assert len(list(ET.fromstring(done.stdout).iter("testcase"))) == 3  # noqa: S314 - our own
    assert (report / "report.html").is_file()


def test_transformer_engine_that_does_not_load_is_an_error_for_its_own_cases_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Local layers have no need of it; nobody gets a traceback."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("bridge.platform.forbid_tf32", lambda: None)
    monkeypatch.setattr("bridge.platform.float32_product_error", lambda: {"torch": 1.5})
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    monkeypatch.setitem(sys.modules, "transformer_engine", None)
    local = Case(check="rope", model="tied", dtype="float32", layout="tp1-pp1", device="cuda")
    assert float32_products([local]) == {"torch": 1.5}
    assert float32_products([replace(local, device="cpu")]) == {}
    with pytest.raises(EnvironmentMissingError, match="does not load"):
        float32_products([local, replace(local, layers="te")])
    monkeypatch.setattr("bridge.platform.float32_product_error", lambda: {"torch": 2467.9})
    with pytest.raises(EnvironmentMissingError, match="TF32") as caught:
        float32_products([local])
    assert caught.value.where == ("torch: 2468 ulp",)
