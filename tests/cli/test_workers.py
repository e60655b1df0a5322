"""`--workers` as a user gives it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from bridge.cli_options import transfer_limits
from bridge.errors import UsageError
from harness.toys import toy_named, write_checkpoint
from tests.directories import files_of

if TYPE_CHECKING:
    from tests.cli.conftest import Run

ROOT = Path(__file__).parents[2]


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A small 51B with linear replacements."""
    write_checkpoint(toy_named("51b"), tmp_path / "hf", dtype="bfloat16")
    return tmp_path / "hf"


def test_import_and_export_by_workers_give_the_directory_back(
    run: Run, checkpoint: Path, tmp_path: Path
) -> None:
    """The report counts the workers, and says what its peak memory is."""
    megatron, back = tmp_path / "megatron", tmp_path / "back"
    found = run("import", "--hf-model", checkpoint, "--megatron-path", megatron, "--workers", "2")
    assert (found.code, found.err) == (0, "")
    assert "summed over 2 workers" in found.out
    found = run("export", "--megatron-path", megatron, "--hf-path", back, "--workers", "3")
    assert found.code == 0
    assert files_of(checkpoint) == files_of(back)


def test_the_report_of_workers_is_that_of_one(run: Run, checkpoint: Path, tmp_path: Path) -> None:
    """Hashes and counts do not depend on who did the work; `workers` says how many."""
    reports = []
    for workers in ("1", "2"):
        target = tmp_path / workers
        found = run(
            "import", "--hf-model", checkpoint, "--megatron-path", target,
            "--workers", workers, "--json",
        )  # fmt: skip
        reports.append(json.loads(found.out))
    assert [report.pop("workers") for report in reports] == [1, 2]
    for report in reports:
        for own in ("target", "convert_seconds", "verify_seconds", "peak_rss"):
            del report[own]
    assert reports[0] == reports[1]
    assert reports[0]["verified"]


def test_synthesize_by_workers(run: Run, checkpoint: Path, tmp_path: Path) -> None:
    """It takes the option too."""
    found = run(
        "synthesize", "--config", checkpoint / "config.json", "--hf-path", tmp_path / "made",
        "--workers", "2", "--json",
    )  # fmt: skip
    assert found.code == 0
    sizes = [path.stat().st_size for path in (tmp_path / "made").glob("*.safetensors")]
    assert 0 < json.loads(found.out)["nbytes"] < sum(sizes)


@pytest.mark.parametrize("workers", ["0", "-1", "two"])
def test_a_number_that_is_none_is_bad_usage(
    run: Run, checkpoint: Path, tmp_path: Path, workers: str
) -> None:
    """Said before any work."""
    found = run(
        "import", "--hf-model", checkpoint, "--megatron-path", tmp_path / "m", "--workers", workers
    )
    assert found.code == 2
    assert "--workers" in found.err
    assert not (tmp_path / "m").exists()


def test_the_budget_and_the_cores_are_divided(monkeypatch: pytest.MonkeyPatch) -> None:
    """What four workers may use together is what one may; each gets a quarter."""
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    assert transfer_limits("1GiB", 4).memory_budget == 256 << 20
    assert transfer_limits("1GiB", 4).threads == 1
    assert transfer_limits("1GiB", 64).threads == 1
    assert transfer_limits("1GiB", None) == transfer_limits("1GiB", 1)
    with pytest.raises(UsageError, match="1MiB") as caught:
        transfer_limits("1MiB", 64)
    assert caught.value.hint is not None
    assert "each of 64 workers" in caught.value.hint


def test_under_torchrun_the_budget_is_each_ranks_and_the_cores_are_the_machines(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Four of the eight ranks are here."""
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert transfer_limits("1GiB").memory_budget == 1 << 30
    assert transfer_limits("1GiB").threads == 1


@pytest.fixture
def run_without_torch(tmp_path: Path) -> Callable[..., None]:
    """Run a command line that may import nothing that takes seconds, and succeeds."""
    # Workers get the path and the environment, so that nobody finds these packages to import.
    for heavy in ("torch", "transformers", "megatron", "hypothesis"):
        (tmp_path / "barred" / heavy).mkdir(parents=True)
        text = f"raise AssertionError('{heavy} was imported')"
        (tmp_path / "barred" / heavy / "__init__.py").write_text(text)

    def run(*arguments: str) -> None:
        done = subprocess.run(  # noqa: S603 (our own interpreter)
            [sys.executable, "-m", "harness", *arguments],
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
            cwd=tmp_path,
            env=os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path / "barred"), str(ROOT)])},
        )
        assert (done.returncode, done.stderr) == (0, "")

    return run


@pytest.mark.parametrize("arguments", [["--help"], ["import", "--help"], ["export", "--help"]])
def test_no_help_imports_torch(
    run_without_torch: Callable[..., None], arguments: list[str]
) -> None:
    """It is there at once."""
    run_without_torch(*arguments)


@pytest.mark.parametrize("verify", ["bits", "none"])
@pytest.mark.parametrize("workers", ["1", "2"])
def test_no_conversion_without_computation_imports_torch(
    run_without_torch: Callable[..., None], checkpoint: Path, workers: str, verify: str
) -> None:
    """Not in the command, and not in its workers; `--verify auto` and `full` compute with it."""
    options = ("--megatron-path", "m", "--workers", workers, "--verify", verify)
    run_without_torch("import", "--hf-model", str(checkpoint), *options)
    run_without_torch("export", "--hf-path", "back", *options)
