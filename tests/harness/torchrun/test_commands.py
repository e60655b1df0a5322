"""`parity` and `verify` under torchrun: the numbers of one host, one report, silence elsewhere."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from harness.toys import toy_named, write_checkpoint

if TYPE_CHECKING:
    from tests.harness.torchrun.conftest import Started

pytestmark = pytest.mark.ranks
Make = Callable[[int, int], "Started"]
ROOT = Path(__file__).parents[3]
HARNESS = ("-m", "harness")
SELECTED = (
    "config/nano-4b/*",
    "logits/nano-4b/tp2-pp1/float32/short",
    "gradients/nano-4b/tp1-pp2/float32/short",
    "resharding/nano-4b/tp2-pp1/bfloat16",
)
FOUR_RANKS = "logits/nano-4b/tp4-pp1/float32/short"


def parity(report: Path, *selected: str) -> list[str]:
    """The command, with a report."""
    options = [word for one in selected for word in ("--select", one)]
    return [*HARNESS, "parity", "--report", str(report), *options]


def cases_of(report: Path) -> dict[str, Any]:
    """Every case of a report but for the time it took, by id."""
    data = json.loads((report / "evidence.json").read_text("utf-8"))
    return {
        one["id"]: {key: value for key, value in one.items() if key != "seconds"}
        for one in data["cases"]
    }


@pytest.mark.cluster
def test_two_processes_give_the_verdicts_and_numbers_of_one_host(
    started: Make, tmp_path: Path
) -> None:
    """To the last digit; a layout of four ranks is counted as not run; one process alone speaks."""
    run = started(2, 2)
    command = parity(tmp_path / "torchrun", *SELECTED, FOUR_RANKS)
    command += ["--allow-not-run", "ranks", "--workdir", str(tmp_path / "work")]
    for rank in range(2):
        run.start(rank, *command)
    found = run.outputs(timeout=280)
    assert found[0][0] == 0, found[0]
    assert "0 failed, 1 not run (ranks)" in found[0][1]
    assert found[1] == (0, "", "")
    assert list((tmp_path / "work").iterdir()) == []
    subprocess.run(  # noqa: S603 - our own
        [sys.executable, *parity(tmp_path / "alone", *SELECTED)],
        check=True, capture_output=True, timeout=280, cwd=ROOT,
    )  # fmt: skip
    ours, theirs = cases_of(tmp_path / "torchrun"), cases_of(tmp_path / "alone")
    left_out = ours.pop(FOUR_RANKS)
    assert left_out["status"] == "not run"
    assert ours == theirs
    assert {one["status"] for one in ours.values()} == {"passed"}
    logs = sorted(path.name for path in (tmp_path / "torchrun" / "ranks").iterdir())
    assert logs == ["rank0.log", "rank1.log"]
    evidence = json.loads((tmp_path / "torchrun" / "evidence.json").read_text("utf-8"))
    assert evidence["hardware"]["ranks_per_host"] == [2]


def test_torchrun_itself_verifies_a_checkpoint(tmp_path: Path) -> None:
    """The command as a user gives it."""
    write_checkpoint(toy_named("nano-4b"), tmp_path / "hf", dtype="bfloat16")
    done = subprocess.run(  # noqa: S603 - our own
        [
            *(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"),
            *(*HARNESS, "verify", "--hf-model", str(tmp_path / "hf")),
            *("--checks", "placement", "--layouts", "tp2-pp1,tp1-pp2"),
        ],
        capture_output=True, text=True, timeout=280, check=False, cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("2 passed, 0 failed") == 1


def test_a_mistake_is_reported_once(started: Make) -> None:
    """By the first process, with the exit code it always has; the other has nothing to say."""
    run = started(2, 2)
    for rank in range(2):
        run.start(rank, *HARNESS, "parity", "--suite", "nonsense")
    found = run.outputs()
    assert found[0][:2] == (2, "")
    assert found[0][2].startswith("HN101 no suite 'nonsense'")
    assert found[1] == (0, "", "")


def test_other_commands_are_not_led(started: Make) -> None:
    """Whoever runs something else under torchrun runs it in every process, as ever."""
    run = started(2, 2)
    process = run.start(1, *HARNESS, "toy", "--names", "--json")
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert "nano-4b" in out


def test_a_run_that_torchrun_ends_says_so_and_clears_up(started: Make, tmp_path: Path) -> None:
    """Torchrun sends SIGTERM when another process has ended; gigabytes must not stay behind."""
    run = started(2, 2)
    work = tmp_path / "work"
    command = (*HARNESS, "parity", "--select", "nano-4b", "--workdir", str(work))
    first, _ = (run.start(rank, *command) for rank in range(2))
    deadline = time.monotonic() + 100
    while not list(work.glob("*/*")) and time.monotonic() < deadline:
        time.sleep(0.1)
    first.send_signal(signal.SIGTERM)
    found = run.outputs()
    assert found[0][0] == 3
    assert "HN202 torchrun ends this run" in found[0][2]
    assert "Traceback" not in found[0][2]
    assert found[1] == (0, "", "")
    assert list(work.iterdir()) == []
