"""Commands on URLs: what is printed, what is written, and the errors a user can make."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeAlias

import pytest
from fsspec.implementations.memory import MemoryFileSystem
from fsspec.registry import known_implementations

from bridge.storage.target import MANIFEST_NAME
from harness.toys import toy_named, write_checkpoint
from tests.commands import Run
from tests.directories import files_of

Memory: TypeAlias = Any
"""fsspec has no types."""


@pytest.fixture
def memory() -> Iterator[MemoryFileSystem]:
    """What `memory://` holds: nothing, before and after."""

    def clear() -> None:
        MemoryFileSystem.store.clear()
        MemoryFileSystem.pseudo_dirs[:] = [""]

    clear()
    yield MemoryFileSystem()
    clear()


@pytest.fixture
def hf(memory: Memory, tmp_path: Path) -> Path:
    """A checkpoint, here and at `memory://bucket/hf`."""
    write_checkpoint(toy_named("nano-4b"), tmp_path / "hf", dtype="bfloat16")
    for path in (tmp_path / "hf").iterdir():
        memory.pipe_file(f"/bucket/hf/{path.name}", path.read_bytes())
    return tmp_path / "hf"


def stored(memory: Memory, prefix: str) -> dict[str, bytes]:
    """Every object below a prefix, with its bytes; but for a manifest, as in `files_of`."""
    names = [name for name in memory.find(prefix) if not name.endswith(MANIFEST_NAME)]
    return {name.removeprefix(prefix + "/"): memory.cat_file(name) for name in names}


@pytest.mark.parametrize("command", ["inspect", "plan"])
def test_a_model_behind_a_url_is_shown_as_one_here(run: Run, hf: Path, command: str) -> None:
    """Its weights are accounted for too, by their heads."""
    here = run(command, hf, "--json")
    there = run(command, "memory://bucket/hf", "--json")
    assert here.code == there.code == 0
    assert json.loads(here.out) == json.loads(there.out)


def test_a_bare_configuration_may_be_behind_a_url(run: Run, hf: Path) -> None:
    """As it may be a file."""
    here, there = (
        run("inspect", hf / "config.json"),
        run("inspect", "memory://bucket/hf/config.json"),
    )
    assert (here.code, there.code) == (0, 0)
    assert here.out.splitlines()[1:] == there.out.splitlines()[1:]


def test_there_and_back_through_urls(run: Run, hf: Path, memory: Memory, tmp_path: Path) -> None:
    """The same Megatron checkpoint as here, and the source again, file by file."""
    local = run("import", "--hf-model", hf, "--megatron-path", tmp_path / "megatron", "--tp", "2")
    done = run(
        *("import", "--hf-model", "memory://bucket/hf", "--megatron-path", "memory://bucket/m"),
        *("--tp", "2", "--staging", tmp_path, "--json"),
    )
    assert (local.code, done.code) == (0, 0), done.err
    assert json.loads(done.out)["target"] == "memory:///bucket/m"
    assert json.loads(done.out)["verified"]
    assert files_of(tmp_path / "megatron") == stored(memory, "/bucket/m")
    back = run("export", "--megatron-path", "memory://bucket/m", "--hf-path", "memory://bucket/b")
    assert back.code == 0, back.err
    assert files_of(hf) == stored(memory, "/bucket/b")


def test_a_file_url_is_a_directory_here(run: Run, hf: Path, tmp_path: Path) -> None:
    """Replaced in one step, which no object store can do."""
    for _ in range(2):
        done = run(
            *("import", "--hf-model", f"file://{hf}", "--overwrite"),
            *("--megatron-path", f"file://{tmp_path}/megatron"),
        )
        assert done.code == 0, done.err
    assert (tmp_path / "megatron" / "latest_checkpointed_iteration.txt").is_file()


def test_synthetic_weights_go_to_a_url(run: Run, hf: Path, memory: Memory, tmp_path: Path) -> None:
    """From a configuration behind one."""
    for target in (tmp_path / "synthetic", "memory://bucket/synthetic"):
        done = run("synthesize", "--config", "memory://bucket/hf", "--hf-path", target)
        assert done.code == 0, done.err
    assert files_of(tmp_path / "synthetic") == stored(memory, "/bucket/synthetic")
    del hf


def test_a_source_behind_a_url_can_be_proved(run: Run, hf: Path) -> None:
    """Downloaded first."""
    done = run("verify", "--hf-model", "memory://bucket/hf", "--checks", "config")
    assert done.code == 0, done.out + done.err
    del hf


def test_a_whole_proof_after_an_import_to_a_url_is_of_copies(
    run: Run, hf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of both sides, as the ranks need files."""
    seen: list[dict[str, bytes]] = []

    def prove(ours: Path, theirs: Path, **_: object) -> None:
        seen.extend([files_of(ours), files_of(theirs)])

    monkeypatch.setattr("bridge.cli_verification.full_verification", prove)
    done = run(
        *("import", "--hf-model", "memory://bucket/hf", "--megatron-path", "memory://bucket/m"),
        *("--verify", "full"),
    )
    assert done.code == 0, done.err
    assert seen == [files_of(hf), stored(MemoryFileSystem(), "/bucket/m")]


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (("inspect", "nobodys://bucket/hf"), 2, "BR001 unknown protocol 'nobodys'"),
        (("inspect", "memory://bucket/nothing"), 2, "BR300 no such file or directory"),
        (("inspect", "nosuch://bucket/hf"), 3, "BR500 nosuch:// needs a package"),
        (("inspect", "memory://bucket/hf", "--revision", "main"), 2, "hf://ORG/NAME@REVISION"),
        (
            ("import", "--hf-model", "memory://bucket/hf", "--megatron-path", "memory://bucket/hf"),
            2,
            "BR001 source and target must not be one inside the other",
        ),
        (
            ("import", "--hf-model", "memory://bucket/hf", "--megatron-path", "memory://bucket"),
            2,
            "memory:///bucket",
        ),
        (
            ("export", "--megatron-path", "memory://bucket/hf", "--hf-path", "memory://bucket/x"),
            2,
            "no Megatron checkpoint",
        ),
        (
            ("synthesize", "--config", "memory://bucket/hf", "--hf-path", "x", "--staging", "y"),
            2,
            "leave --staging away",
        ),
    ],
)
def test_mistakes_are_told_in_one_message(
    run: Run,
    hf: Path,
    memory: Memory,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    arguments: tuple[str, ...],
    code: int,
    said: str,
) -> None:
    """With their code and exit status; nothing is written."""
    monkeypatch.chdir(tmp_path)
    entry = {"class": "nosuchfs.NoSuchFileSystem", "err": "Install nosuchfs to access it"}
    monkeypatch.setitem(known_implementations, "nosuch", entry)
    before = stored(memory, "/bucket")
    done = run(*arguments)
    assert (code, "") == (done.code, done.out)
    assert said in done.err
    assert "Traceback" not in done.err
    assert before == stored(memory, "/bucket")
    assert [hf] == list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "arguments",
    [
        "import --hf-model hf --megatron-path memory://a/b",
        "import --hf-model memory://bucket/hf --megatron-path m",
        "export --megatron-path memory://bucket/m --hf-path back",
        "export --megatron-path m --hf-path memory://a/b",
        "export --megatron-path m --hf-path back --hf-model memory://bucket/hf",
        "synthesize --config memory://bucket/hf --hf-path back",
        "synthesize --config memory://bucket/hf --hf-path memory://a/b",
    ],
)
def test_workers_do_not_share_a_memory(
    run: Run,
    hf: Path,
    memory: Memory,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    arguments: str,
) -> None:
    """Each has one of its own: refused by name before any of them starts."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("bridge.crew.local.led", lambda *_: pytest.fail("workers are started"))
    before = stored(memory, "/bucket")
    done = run(*arguments.split(), "--workers", "2")
    places = [word for word in arguments.split() if word.startswith("memory://")]
    assert (done.code, done.out) == (2, "")
    assert "BR001 2 processes do not share one memory" in done.err
    assert all(place in done.err for place in places)
    assert before == stored(memory, "/bucket")
    assert not memory.exists("/a")
    assert [hf] == list(tmp_path.iterdir())


def test_one_worker_has_its_own_memory(run: Run, hf: Path, memory: Memory) -> None:
    """Said or not, it is this process."""
    done = run(
        *("import", "--hf-model", hf, "--megatron-path", "memory://bucket/m", "--workers", "1")
    )
    assert done.code == 0, done.err
    assert memory.exists("/bucket/m/latest_checkpointed_iteration.txt")


def test_an_existing_target_behind_a_url_stays(run: Run, hf: Path, memory: Memory) -> None:
    """With --overwrite the error says why it cannot be."""
    memory.pipe_file("/bucket/m/theirs", b"theirs")
    done = run(*("import", "--hf-model", hf, "--megatron-path", "memory://bucket/m", "--overwrite"))
    assert done.code == 2
    assert "BR304 the target already exists, and --overwrite cannot replace" in done.err
    assert stored(memory, "/bucket/m") == {"theirs": b"theirs"}


def test_no_command_imports_fsspec_before_there_is_a_url() -> None:
    """It costs a tenth of a second and more."""
    code = (
        "import sys, harness.cli, bridge.convert, bridge.hub\n"
        "sys.exit(any(name.partition('.')[0] == 'fsspec' for name in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0  # noqa: S603
