"""Run one command; write down how long it took and how large it grew.

A script of the standard library alone, run by its path. On Linux a child's peak of memory begins
with that of the process that started it, so a large one would be seen in every figure: this
process is a small one in between.

    python -I -S timed.py REPORT STDOUT STDERR COMMAND...
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path


def main() -> None:
    """Start the command, wait for it, write the report."""
    report, out, err, *command = sys.argv[1:]
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
    actions = [
        (os.POSIX_SPAWN_OPEN, 1, out, flags, 0o600),
        (os.POSIX_SPAWN_OPEN, 2, err, flags, 0o600),
    ]
    started = time.perf_counter()
    try:
        pid = os.posix_spawnp(command[0], command, os.environ, file_actions=actions)
    except OSError as error:
        Path(err).write_text(f"cannot start {command[0]}: {error.strerror}\n", "utf-8")
        found = {"seconds": 0.0, "exit_code": 127, "peak_rss": 0}
    else:
        _, status, usage = os.wait4(pid, 0)
        found = {
            "seconds": time.perf_counter() - started,
            "exit_code": os.waitstatus_to_exitcode(status),
            # Of the command and of every process it waited for, whichever was largest.
            "peak_rss": usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024),
        }
    Path(report).write_text(json.dumps(found), "utf-8")


if __name__ == "__main__":
    main()
