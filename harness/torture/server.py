"""The server of `harness.torture.warm`: `python -m harness.torture.server [MODULE...]`."""

from __future__ import annotations

import json
import os
import signal
import sys
import tempfile
import threading
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from harness.torture.calls import Layer
from harness.torture.faults import parse_fault
from harness.torture.warm import load_all

_NEEDED: Final = (
    "torch", "fsspec.implementations.local", "rich.progress", "harness.cli", "bridge.convert",
    "bridge.crew.launch", "bridge.crew.local", "bridge.hub", "bridge.render",
    "harness.torture.store",
)  # fmt: skip
"""What the commands of the trials import on their way."""


def main() -> None:
    """Serve until stdin ends."""
    load_all((*_NEEDED, *sys.argv[1:]))
    if threading.active_count() > 1:
        raise AssertionError(f"a fork loses these threads: {threading.enumerate()}")
    _say({"ready": True})
    for line in sys.stdin.buffer:
        job = json.loads(line)
        pid = os.fork()
        if not pid:
            _be(job)
        _say({"pid": pid})
        _, status = os.waitpid(pid, 0)
        _say({"code": os.waitstatus_to_exitcode(status)})


def _say(message: dict[str, Any]) -> None:
    os.write(1, json.dumps(message).encode() + b"\n")


def _be(job: dict[str, Any]) -> None:
    """Be the command: the rest of this process's life."""
    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    devnull = os.open(os.devnull, os.O_RDONLY)
    os.dup2(devnull, 0)
    for suffix, descriptor in ((".out", 1), (".err", 2)):
        log = os.open(job["log"] + suffix, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        os.dup2(log, descriptor)
        os.close(log)
    temporary = str(Path(job["directory"]) / "tmp")
    os.environ["TMPDIR"] = tempfile.tempdir = temporary
    sys.argv = ["nemotron-bridge", *job["arguments"]]
    seen = Path(job["log"] + ".json")
    seen.unlink(missing_ok=True)
    seen_by = os.open(seen, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    write = os.write

    def tell(unsynced: Sequence[str] = ()) -> None:
        found = {"counts": layer.counts, "events": layer.events, "struck": layer.struck}
        data = json.dumps(found | {"unsynced": unsynced}).encode()
        while data:
            data = data[write(seen_by, data) :]

    fault = parse_fault(job["fault"]) if job["fault"] else None
    layer = Layer(job["directory"], job["sources"], fault, tell)
    code = 3
    try:
        layer.install()
        code = _command()
        layer.rest()
        tell(layer.unsynced.left(Path(job["directory"]) / "place"))
    except BaseException:  # noqa: BLE001 - nothing may return into the server's loop
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _command() -> int:
    from harness.cli import main as command

    try:
        command()
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    return 0


if __name__ == "__main__":
    main()
