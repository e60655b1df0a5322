"""Without a Hub id nothing asks the network: each command, its ranks and workers included."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from bridge.convert import import_checkpoint
from harness.toys import toy_named, write_checkpoint

GUARD = """
import socket, sys

LOG = {log!r}

def _refuse(what):
    with open(LOG, "a") as file:
        file.write(f"{{sys.argv}}: {{what}}\\n")
    raise OSError(f"the network is asked for {{what}}")

def _is_here(host):
    return host in (None, "", "localhost", socket.gethostname()) or str(host).startswith(
        ("127.", "::1", "0.0.0.0")
    )

def _guard(event, arguments):
    if event in ("socket.connect", "socket.sendto"):
        address = arguments[1]
        if isinstance(address, tuple) and not _is_here(address[0]):
            _refuse(address)
    elif event in ("socket.getaddrinfo", "socket.gethostbyname"):
        if not _is_here(arguments[0]):
            _refuse(arguments[0])

sys.addaudithook(_guard)
"""
"""Imported by every interpreter that is started: connections and questions for addresses."""


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """In which each process of a command is watched, and nothing tells libraries to be offline."""
    guard = tmp_path / "guard"
    guard.mkdir()
    (guard / "sitecustomize.py").write_text(GUARD.format(log=str(tmp_path / "asked")))
    kept = {
        name: value
        for name, value in os.environ.items()
        if name not in {"HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE"}
    }
    root = str(Path(__file__).parents[2])
    return kept | {
        "PYTHONPATH": os.pathsep.join([str(guard), root]),
        "HF_HOME": str(tmp_path / "no-cache"),
        "OMP_NUM_THREADS": "1",
    }


def run(environment: dict[str, str], *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """One command as a user runs it."""
    return subprocess.run(  # noqa: S603 - our own interpreter and command
        [sys.executable, "-m", "harness", *map(str, arguments)],
        env=environment, capture_output=True, text=True, timeout=400, check=False,
    )  # fmt: skip


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One model in both formats."""
    root = tmp_path_factory.mktemp("models")
    write_checkpoint(toy_named("super-49b-v1"), root / "hf")
    import_checkpoint(root / "hf", root / "megatron")
    return root


def test_the_guard_notices(environment: dict[str, str], tmp_path: Path) -> None:
    """A Hub id is the case in which the network is asked."""
    found = run(environment, "inspect", "some-org/some-model")
    assert found.returncode == 2
    assert "asked" in {path.name for path in tmp_path.iterdir()}


@pytest.mark.parametrize(
    "command",
    [
        "inspect {hf}",
        "plan {hf}",
        "import --hf-model {hf} --megatron-path {out} --workers 2",
        "export --megatron-path {megatron} --hf-path {out}",
        "export --megatron-path {megatron} --hf-path {out} --hf-model {hf} --verify none",
        "verify --hf-model {hf} --layouts tp1-pp1 --checks config,round_trip,logits",
        "verify --hf-model {hf} --megatron-path {megatron} --layouts tp2-pp1 --checks logits",
        "generate --hf-model {hf} --megatron-path {megatron} --prompt hello --max-new-tokens 1",
        "logits --hf-model {hf} --probe short --output {out}.safetensors",
    ],
)
def test_a_command_on_local_paths_asks_nobody(
    environment: dict[str, str], models: Path, tmp_path: Path, command: str
) -> None:
    """It ends as it should, and no process of it has connected or looked up anything."""
    words = command.format(hf=models / "hf", megatron=models / "megatron", out=tmp_path / "out")
    found = run(environment, *words.split())
    asked = tmp_path / "asked"
    assert not asked.exists(), asked.read_text()
    assert found.returncode == 0, found.stderr[-2000:]
