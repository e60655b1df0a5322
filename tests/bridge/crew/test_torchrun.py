"""A crew of torchrun's ranks: the same bytes, one report of a failure, nobody who waits forever."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from bridge.convert import export_checkpoint, import_checkpoint
from harness.toys import toy_named, write_checkpoint
from tests.directories import files_of

if TYPE_CHECKING:
    from tests.bridge.crew.rank_scripts import free_port, ranks
else:  # a module beside this file: tests are not a package
    sys.path.append(str(Path(__file__).parent))
    from rank_scripts import free_port, ranks

pytestmark = pytest.mark.ranks

ROOT = Path(__file__).parents[3]


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A small Super-49B in many shards."""
    toy = toy_named("super-49b-v1")
    write_checkpoint(toy, tmp_path / "hf", dtype="bfloat16", max_shard_size=400_000)
    return tmp_path / "hf"


def test_torchrun_imports_the_bytes_that_one_process_does(checkpoint: Path, tmp_path: Path) -> None:
    """The command as a user gives it; one report, of rank 0."""
    done = subprocess.run(  # noqa: S603 (our own interpreter)
        [
            *(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"),
            *("-m", "harness", "import", "--tp", "2", "--pp", "2"),
            *("--hf-model", str(checkpoint), "--megatron-path", str(tmp_path / "two")),
        ],
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("verified bit by bit") == 1
    assert "summed over 2 workers" in done.stdout
    import_checkpoint(
        checkpoint,
        tmp_path / "one",
        tensor_model_parallel_size=2,
        pipeline_model_parallel_size=2,
    )
    assert files_of(tmp_path / "one") == files_of(tmp_path / "two")


def test_ranks_exchange_values_and_convert_both_ways(checkpoint: Path, tmp_path: Path) -> None:
    """Several runs of one crew: import, then export gives the source directory."""
    found = ranks(
        "print(crew.run(functions.squares));"
        f"crew.run(import_checkpoint, Path({str(checkpoint)!r}), Path('megatron').resolve());"
        "crew.run(export_checkpoint, Path('megatron').resolve(), Path('back').resolve())",
        tmp_path,
        size=3,
    )
    assert found == [(0, "[0, 1, 4]\n", "")] * 3
    assert files_of(checkpoint) == files_of(tmp_path / "back")
    export_checkpoint(tmp_path / "megatron", tmp_path / "again")


def test_signals_are_the_callers_again_afterwards(tmp_path: Path) -> None:
    """A script that goes on after the conversion ends at SIGTERM as it did before."""
    found = ranks(
        "during = signal.getsignal(signal.SIGTERM)\n"
        "    print(during is signal.SIG_DFL, signal.getsignal(signal.SIGTERM) is signal.SIG_DFL)",
        tmp_path,
    )
    assert found == [(0, "False True\n", ""), (0, "True True\n", "")]


def test_an_error_of_any_rank_is_reported_by_rank_0_alone(tmp_path: Path) -> None:
    """As it is; all ranks exit with its status."""
    first, second = ranks("crew.run(functions.fail, 1)", tmp_path)
    assert first == (2, "BR100 it is wrong\n  --> rank 1\nhelp: mend it\n", "")
    assert second == (2, "", "")


def test_workers_and_torchrun_are_one_error(tmp_path: Path) -> None:
    """Both say how many there are: bad usage, reported once."""
    first, second = ranks("pass", tmp_path, workers=2)
    assert first[0] == second[0] == 2
    assert first[1].startswith("BR001 workers and torchrun")
    assert second[1] == first[2] == second[2] == ""


def test_a_bug_on_a_rank_ends_all_with_its_traceback(tmp_path: Path) -> None:
    """Where it happened."""
    first, second = ranks("crew.run(functions.crash)", tmp_path)
    assert first[0] != 0
    assert second[0] != 0
    assert "rank 1 failed: ZeroDivisionError: a bug of ours" in first[2]
    assert "in crash" in second[2]


def test_a_busy_rank_stops_when_another_has_died(tmp_path: Path) -> None:
    """And names it; nobody but the ranks themselves looks."""
    first, second = ranks("crew.run(functions.work_on, Path('.'))", tmp_path)
    assert second[0] == -9
    assert first[0] == 3
    assert first[1].startswith("BR501 1 of 2 ranks died; the target was not created\n  --> rank 1:")
    assert not (tmp_path / "finished").exists()


@pytest.mark.parametrize("doomed", [0, 1])
def test_a_killed_rank_leaves_no_target(checkpoint: Path, tmp_path: Path, doomed: int) -> None:
    """The survivor says who died; the next attempt finds its way clear."""
    found = ranks(
        f"crew.run(functions.import_and_die, Path({str(checkpoint)!r}), "
        f"Path('megatron').resolve(), doomed={doomed})",
        tmp_path,
    )
    assert found[doomed][0] == -9
    assert found[1 - doomed][0] == 3
    assert f"rank {doomed}: process" in found[1 - doomed][1]
    assert not (tmp_path / "megatron").exists()
    if doomed == 1:
        left = {path.name for path in tmp_path.iterdir()}
        assert left <= {"hf", "script.py", ".megatron.partial"}  # to go on with
    import_checkpoint(checkpoint, tmp_path / "megatron")
    assert {path.name for path in tmp_path.iterdir()} == {"hf", "megatron", "script.py"}


def test_ranks_do_not_share_a_memory(tmp_path: Path) -> None:
    """Each has a `memory://` of its own: one of them says so, and nobody begins."""
    found = ranks("Path('begun').touch()", tmp_path, places=("memory://bucket/m", "hf"))
    assert [(code, err) for code, _, err in found] == [(2, ""), (2, "")], found
    assert "BR001 2 processes do not share one memory" in found[0][1]
    assert "memory://bucket/m" in found[0][1]
    assert found[1][1] == ""
    assert not (tmp_path / "begun").exists()


def test_ranks_that_do_not_come_are_an_error_that_says_so(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A WORLD_SIZE left over in the environment is no reason to hang or to crash."""
    del tmp_path

    from bridge.crew import bounds
    from bridge.crew.launch import crew_of
    from bridge.errors import WorkerLostError

    port = free_port()
    monkeypatch.setattr(bounds, "JOIN", 1.0)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(port))
    with pytest.raises(WorkerLostError, match="do not come together"), crew_of(None):
        pass
