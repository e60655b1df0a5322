"""Scripts that tests run as ranks, without torchrun, who would end the others when one fails."""

from __future__ import annotations

import os
import random
import socket
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).parents[3]
PATIENCE: Final = 240.0
"""Seconds for all ranks of a test to end, on a busy machine."""
SCRIPT: Final = f"""
import signal
import sys
from pathlib import Path
sys.path[:0] = [{str(ROOT)!r}, {str(Path(__file__).parent)!r}]
import crew_functions as functions
from bridge.convert import export_checkpoint, import_checkpoint
from bridge.crew.launch import crew_of
from bridge.errors import BridgeError
try:
    with crew_of(WORKERS, PLACES, timeout=TIMEOUT) as crew:
        BODY
except BridgeError as error:
    print(error)
    sys.exit(error.exit_code)
"""


def free_port() -> int:
    """A port for the ranks to meet at, until they do.

    Not one that the system gives out: between this look and theirs it could go to any connection
    of another test, or to a rank's own that asks there before rank 0 listens.
    """
    while True:
        port = random.randrange(20000, 32000)  # noqa: S311 - not for secrets
        with socket.socket() as free, suppress(OSError):
            free.bind(("127.0.0.1", port))
            return port


def start(
    script: str, directory: Path, *, size: int, variables: Mapping[str, str] | None = None
) -> list[subprocess.Popen[str]]:
    """Start a script as ranks.

    Args:
        script: Python.
        directory: Where it is put, and runs.
        size: How many ranks.
        variables: More of the environment.
    """
    (directory / "script.py").write_text(script)
    port = free_port()
    return [
        subprocess.Popen(
            [sys.executable, "script.py"],
            cwd=directory,
            env=os.environ
            | {
                "RANK": str(rank),
                "WORLD_SIZE": str(size),
                "LOCAL_WORLD_SIZE": str(size),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
            }
            | dict(variables or {}),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(size)
    ]


def outputs(processes: list[subprocess.Popen[str]]) -> list[tuple[int, str, str]]:
    """Exit status, stdout and stderr of each, once all have ended by themselves."""
    try:
        found = [process.communicate(timeout=PATIENCE) for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.communicate()
    return [
        (process.returncode, out, err) for process, (out, err) in zip(processes, found, strict=True)
    ]


def ranks(
    body: str,
    directory: Path,
    *,
    size: int = 2,
    workers: int | None = None,
    places: tuple[str, ...] = (),
    timeout: float = 1800.0,
    variables: Mapping[str, str] | None = None,
) -> list[tuple[int, str, str]]:
    """Run statements inside `crew_of`, with `crew`, on every rank; see `outputs`."""
    words = {
        "BODY": body,
        "WORKERS": str(workers),
        "PLACES": repr(places),
        "TIMEOUT": str(timeout),
    }
    script = SCRIPT
    for name, word in words.items():
        script = script.replace(name, word)
    return outputs(start(script, directory, size=size, variables=variables))
