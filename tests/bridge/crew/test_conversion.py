"""A conversion by several processes: the same bytes, or nothing at all."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import psutil
import pytest

from bridge.conversion import ConversionOptions, ConversionReport
from bridge.convert import export_checkpoint, import_checkpoint
from bridge.crew.launch import crew_of
from bridge.errors import (
    BridgeError,
    CheckpointError,
    CorruptFileError,
    TargetExistsError,
    WorkerLostError,
)
from bridge.record import RECORD_NAME
from bridge.storage.synthetic import synthesize
from bridge.transfer import TransferLimits
from harness.toys import toy_named, write_checkpoint
from tests.directories import files_of

if TYPE_CHECKING:
    from tests.bridge.crew import crew_functions as functions
else:  # a module beside this file: tests are not a package
    sys.path.append(str(Path(__file__).parent))
    import crew_functions as functions

WORKERS = [1, 2, 3]
ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Super-49B in many shards, with every side file."""
    directory = tmp_path_factory.mktemp("source") / "hf"
    toy = toy_named("super-49b-v1")
    write_checkpoint(toy, directory, dtype="bfloat16", max_shard_size=400_000)
    assert len(list(directory.glob("*.safetensors"))) > max(WORKERS)
    return directory


@pytest.fixture(scope="module")
def report_of_one(checkpoint: Path) -> ConversionReport:
    """Of importing it by one process, cut into four files."""
    return import_checkpoint(
        checkpoint,
        checkpoint.parent / "megatron",
        tensor_model_parallel_size=2,
        pipeline_model_parallel_size=2,
    )


@pytest.fixture(scope="module")
def imported(report_of_one: ConversionReport) -> Path:
    """The checkpoint which that has made."""
    target = Path(report_of_one.target)
    assert len(list(target.rglob("*.distcp"))) == 4
    return target


def facts(report: ConversionReport) -> dict[str, object]:
    """What a report says of the model, not of the time or the place."""
    own = {"source", "target", "convert_seconds", "verify_seconds", "peak_rss", "workers"}
    return {name: value for name, value in report.to_dict().items() if name not in own}


@pytest.mark.parametrize("workers", [*WORKERS, 6])
def test_workers_import_the_bytes_that_one_process_does(
    checkpoint: Path,
    imported: Path,
    report_of_one: ConversionReport,
    tmp_path: Path,
    workers: int,
) -> None:
    """Every file, the record with its hashes included; more workers than files as well."""
    with crew_of(workers) as crew:
        report = crew.run(
            import_checkpoint,
            checkpoint,
            tmp_path / "megatron",
            tensor_model_parallel_size=2,
            pipeline_model_parallel_size=2,
        )
    assert files_of(imported) == files_of(tmp_path / "megatron")
    assert RECORD_NAME in files_of(imported)
    assert report.workers == workers
    assert report.verified
    assert facts(report_of_one) == facts(report)
    assert list(report_of_one.tensor_sha256) == list(report.tensor_sha256)


@pytest.mark.parametrize("workers", WORKERS)
def test_workers_export_the_source_directory(
    checkpoint: Path, imported: Path, tmp_path: Path, workers: int
) -> None:
    """Its own shards back, byte for byte; and new ones where another directory gives the rest."""
    with crew_of(workers) as crew:
        report = crew.run(export_checkpoint, imported, tmp_path / "back")
    assert files_of(checkpoint) == files_of(tmp_path / "back")
    assert any("have the hashes of the imported" in note for note in report.notes)
    with crew_of(workers) as crew:
        crew.run(
            export_checkpoint,
            imported,
            tmp_path / "cut",
            hf_model=checkpoint / "config.json",
            max_shard_size=300_000,
        )
    export_checkpoint(
        imported, tmp_path / "one", hf_model=checkpoint / "config.json", max_shard_size=300_000
    )
    assert files_of(tmp_path / "one") == files_of(tmp_path / "cut")


def test_workers_synthesize_the_bytes_that_one_process_does(
    checkpoint: Path, tmp_path: Path
) -> None:
    """Pseudo-random weights come from a tensor's name, not from who makes them."""
    for workers in (1, 2):
        with crew_of(workers) as crew:
            crew.run(
                synthesize,
                checkpoint / "config.json",
                tmp_path / f"{workers}",
                seed=1,
                max_shard_size=300_000,
                limits=TransferLimits(),
            )
    assert files_of(tmp_path / "1") == files_of(tmp_path / "2")


@pytest.mark.parametrize("doomed", [1, 2])
def test_a_killed_worker_leaves_no_target(checkpoint: Path, tmp_path: Path, doomed: int) -> None:
    """Nor anything that looks like one; the error names the worker."""
    with (
        pytest.raises(WorkerLostError, match=f"worker {doomed} of 3 was killed by SIGKILL"),
        crew_of(3) as crew,
    ):
        crew.run(functions.import_and_die, checkpoint, tmp_path / "megatron", doomed=doomed)
    assert left(tmp_path) <= {".megatron.partial"}  # with what was complete, to go on with
    import_checkpoint(
        checkpoint,
        tmp_path / "megatron",
        tensor_model_parallel_size=2,
        pipeline_model_parallel_size=2,
        options=ConversionOptions(resume=True),
    )
    assert left(tmp_path) == {"megatron"}


@pytest.mark.parametrize("full", [0, 1])
def test_a_full_disk_is_the_same_error_whoever_meets_it(
    checkpoint: Path, tmp_path: Path, full: int
) -> None:
    """Of any worker: BR300 with the file, and nothing is left."""
    with (
        pytest.raises(CheckpointError, match=r"cannot write the (file|target)") as caught,
        crew_of(2) as crew,
    ):
        crew.run(functions.import_on_a_full_disk, checkpoint, tmp_path / "megatron", full=full)
    assert type(caught.value) is CheckpointError
    # The first file that grows too large on rank 0 is the one that says what is being built.
    assert caught.value.where[0].endswith(".distcp" if full else "/megatron")
    assert list(tmp_path.iterdir()) == []


def _shard_ends_early(root: Path) -> None:
    shard = sorted(root.rglob("*.distcp"))[1]
    shard.write_bytes(shard.read_bytes()[:-1000])


def _side_file_changes(root: Path) -> None:
    path = root / "hf_source" / "tokenizer.json"
    path.write_bytes(path.read_bytes() + b" ")


def _weight_changes(root: Path) -> None:
    shard = sorted(root.rglob("*.distcp"))[1]
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)


@pytest.mark.parametrize("damage", [_shard_ends_early, _side_file_changes, _weight_changes])
def test_a_damaged_source_is_the_error_that_one_process_raises(
    imported: Path, tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    """Class, places and help; met by all workers, by rank 0 alone, or after comparing."""
    source = tmp_path / "damaged"
    subprocess.run(["cp", "-r", imported, source], check=True)  # noqa: S603, S607 (our own files)
    damage(source)
    found = []
    for workers in (1, 3):
        with pytest.raises(BridgeError) as caught, crew_of(workers) as crew:
            crew.run(export_checkpoint, source, tmp_path / "back")
        found.append((type(caught.value), str(caught.value), caught.value.exit_code))
    assert found[0] == found[1]
    assert [path.name for path in tmp_path.iterdir()] == ["damaged"]


@pytest.mark.parametrize("verify", ["auto", "none"])
@pytest.mark.parametrize("direction", ["import", "export"])
def test_the_target_appears_when_nobody_looks_at_it_any_more(
    checkpoint: Path,
    imported: Path,
    tmp_path: Path,
    direction: str,
    verify: Literal["auto", "none"],
) -> None:
    """Rank 0 would move it away beneath the others."""
    source = checkpoint if direction == "import" else imported
    with crew_of(2) as crew:
        crew.run(
            functions.convert_slowly, source, tmp_path / "target",
            options=ConversionOptions(verify=verify),
        )  # fmt: skip
    assert (tmp_path / "target").is_dir()


def test_what_any_rank_finds_at_its_last_look_is_in_time(checkpoint: Path, tmp_path: Path) -> None:
    """The target does not appear, as the error says."""
    with pytest.raises(CorruptFileError, match="changed while"), crew_of(2) as crew:
        crew.run(functions.convert_a_source_that_changes, checkpoint, tmp_path / "target")
    assert list(tmp_path.iterdir()) == []


def test_an_existing_target_is_kept(checkpoint: Path, tmp_path: Path) -> None:
    """Only rank 0 finds out; the others end with it."""
    (tmp_path / "megatron").mkdir()
    (tmp_path / "megatron" / "precious").touch()
    with pytest.raises(TargetExistsError), crew_of(3) as crew:
        crew.run(import_checkpoint, checkpoint, tmp_path / "megatron")
    assert [path.name for path in (tmp_path / "megatron").iterdir()] == ["precious"]


def until(condition: Callable[[], object]) -> None:
    """Wait for it, with patience for a busy machine."""
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.fixture
def hanging(checkpoint: Path, tmp_path: Path) -> Iterator[tuple[subprocess.Popen[str], list[int]]]:
    """A command of three workers, each in the middle of its files, and their process ids."""
    (tmp_path / "pids").mkdir()
    code = f"""
import sys
from pathlib import Path
sys.path[:0] = [{str(ROOT)!r}, {str(Path(__file__).parent)!r}]
import crew_functions
from bridge.crew.launch import crew_of
# No __main__ guard: workers must not run this again.
try:
    with crew_of(3) as crew:
        crew.run(
            crew_functions.import_and_hang, Path({str(checkpoint)!r}), Path("megatron").resolve(),
            pids=Path("pids").resolve(),
        )
except KeyboardInterrupt:
    print("interrupted")
"""
    (tmp_path / "script.py").write_text(code)
    process = subprocess.Popen(
        [sys.executable, "script.py"],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        until(lambda: process.poll() is not None or len(list((tmp_path / "pids").iterdir())) == 3)
        assert process.poll() is None, process.communicate()
        yield process, [int(path.name) for path in (tmp_path / "pids").iterdir()]
    finally:
        process.kill()
        for path in (tmp_path / "pids").iterdir():
            with suppress(ProcessLookupError):
                os.kill(int(path.name), signal.SIGKILL)
        process.communicate()


def left(directory: Path) -> set[str]:
    """What lies there besides the test's own."""
    return {path.name for path in directory.iterdir()} - {"pids", "script.py"}


def test_workers_end_when_their_command_is_killed(
    hanging: tuple[subprocess.Popen[str], list[int]], checkpoint: Path, tmp_path: Path
) -> None:
    """No target, no process; the next attempt sweeps what they had built."""
    process, pids = hanging
    process.kill()
    process.wait(timeout=60)
    until(lambda: not any(psutil.pid_exists(pid) for pid in pids))
    assert left(tmp_path) == {".megatron.partial"}
    import_checkpoint(checkpoint, tmp_path / "megatron")
    assert left(tmp_path) == {"megatron"}


def test_ctrl_c_ends_everything_quietly(
    hanging: tuple[subprocess.Popen[str], list[int]], tmp_path: Path
) -> None:
    """A terminal interrupts all processes at once; only the command says so."""
    process, pids = hanging
    for pid in set(pids) - {process.pid}:
        (held,) = re.findall(r"SigBlk:\s*(\w+)", Path(f"/proc/{pid}/status").read_text())
        assert int(held, 16) >> (signal.SIGINT - 1) & 1
    os.killpg(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=60)
    site = tmp_path / ".megatron.partial"
    kept = f"--resume goes on with what is complete; to give it up, remove {site}\n"
    assert (out, err) == ("interrupted\n", kept if site.exists() else "")
    assert not any(psutil.pid_exists(pid) for pid in pids)
    assert left(tmp_path) <= {site.name}
