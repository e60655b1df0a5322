"""`bench` as a user runs it: exit codes, files, and what it refuses."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

import psutil
import pytest

from harness.benchmarks import groups
from harness.benchmarks.results import Limit, Measurement
from harness.benchmarks.workspace import Workspace

if TYPE_CHECKING:
    from tests.cli.conftest import Run


def row(status: str) -> Measurement:
    """A measurement that went like this."""
    if status == "failed":
        return Measurement(group="startup", name="it", status="failed", reason="exit code 1: no")
    if status == "not run":
        return Measurement(group="startup", name="it", status="not run", reason="not installed")
    limit = Limit(name="median_seconds", value=2.0, limit=1.0 if status == "slow" else 3.0)
    return Measurement(group="startup", name="it", samples=(2.0,), limits=(limit,))


@pytest.fixture
def canned(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Have `startup` find these instead of measuring."""

    def replace(*statuses: str) -> None:
        def fake(_work: Workspace) -> list[Measurement]:
            return [row(status) for status in statuses]

        monkeypatch.setattr(groups, "GROUPS", MappingProxyType({"startup": fake, "oracle": fake}))

    return replace


@pytest.mark.parametrize(
    ("statuses", "flags", "code"),
    [
        (["measured", "not run"], [], 0),
        (["measured", "slow"], [], 0),
        (["measured", "slow"], ["--strict"], 1),
        (["measured"], ["--strict"], 0),
        (["failed", "measured"], [], 3),
        (["failed", "slow"], ["--strict"], 3),
    ],
)
def test_the_exit_code(
    run: Run,
    canned: Callable[..., None],
    tmp_path: Path,
    statuses: list[str],
    flags: list[str],
    code: int,
) -> None:
    """A missed limit fails with --strict only, a failed measurement always, an omission never."""
    canned(*statuses)
    found = run("bench", "--only", "startup", "--workdir", tmp_path / "work", *flags)
    assert found.code == code, found.err
    assert f"{statuses.count('failed')} failed" in found.out
    assert "== startup" in found.err
    assert list((tmp_path / "work").iterdir()) == []


def test_the_report_and_stdout_are_the_same_document(
    run: Run, canned: Callable[..., None], tmp_path: Path
) -> None:
    """`--json` on stdout, the progress on stderr, the table in Markdown."""
    canned("measured", "slow")
    report = tmp_path / "report"
    found = run("bench", "--only", "startup", "--workdir", tmp_path, "--report", report, "--json")
    data = json.loads(found.out)
    assert data == json.loads((report / "bench.json").read_text())
    assert data["counts"]["limits_not_met"] == 1
    assert data["profile"]["name"] == "quick"
    assert "| startup | it |" in (report / "bench.md").read_text()
    figures = {path.name for path in report.glob("*.svg")}
    assert {path.name for path in report.iterdir()} - figures == {"bench.json", "bench.md"}


def test_only_takes_known_names_in_the_order_of_the_tables(
    run: Run, canned: Callable[..., None], tmp_path: Path
) -> None:
    """And refuses others, none at all included."""
    canned("measured")
    found = run("bench", "--only", "oracle, startup", "--workdir", tmp_path)
    lines = [line for line in found.err.splitlines() if "==" in line]
    assert [line.split()[-1] for line in lines] == ["startup", "oracle"]
    for wrong in ("speed", ","):
        refused = run("bench", "--only", wrong, "--workdir", tmp_path)
        assert refused.code == 2
        assert "known: startup, oracle" in refused.err


def test_a_disk_without_room_and_a_place_that_is_none_are_refused(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before any work."""
    file = tmp_path / "file"
    file.write_text("")
    assert run("bench", "--only", "startup", "--workdir", file).code == 2
    usage = type("Usage", (), {"free": 10**9})
    monkeypatch.setattr("shutil.disk_usage", lambda _path: usage)
    refused = run("bench", "--only", "import", "--workdir", tmp_path)
    assert refused.code == 2
    assert "8 GB are needed and 1 GB are free" in refused.err


def test_a_run_that_is_ended_leaves_nothing_behind(tmp_path: Path) -> None:
    """No checkpoint, and no command still at work: it had only just begun."""
    command = [sys.executable, "-m", "harness", "bench", "--only", "startup"]
    with subprocess.Popen(  # noqa: S603 - our own command
        [*command, "--workdir", tmp_path], stderr=subprocess.PIPE, text=True
    ) as started:
        assert started.stderr is not None
        while "making toy" not in started.stderr.readline():
            assert started.poll() is None
        (directory,) = tmp_path.iterdir()
        for _ in range(200):
            children = psutil.Process(started.pid).children(recursive=True)
            if len(children) == 2:  # the one in between, and `toy`
                break
            time.sleep(0.05)
        started.terminate()
        assert started.wait(60) == 143
    assert list(tmp_path.iterdir()) == []
    assert directory.name.startswith("bench-")
    assert len(children) == 2
    assert psutil.wait_procs(children, timeout=10)[1] == []


def test_a_peer_that_is_not_installed_is_left_out(run: Run, tmp_path: Path) -> None:
    """The real group: no failure, and the reason in the table."""
    found = run("bench", "--only", "peer", "--workdir", tmp_path)
    assert found.code == 0
    assert "not installed" in found.out


def test_without_a_gpu_its_figures_are_left_out(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The real groups: no failure, no checkpoint made, and the reason in the table."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    names = ["parity", "load", "forward", "stream"]
    found = run(
        "bench", "--only", ",".join(names), "--device", "cuda", "--workdir", tmp_path, "--json"
    )
    assert found.code == 0, found.err
    data = json.loads(found.out)
    assert {one["group"]: one["reason"] for one in data["measurements"]} == dict.fromkeys(
        names, "no GPU"
    )
    assert data["machine"]["gpu_driver"] is None
    assert "making" not in found.err
