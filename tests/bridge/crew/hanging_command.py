"""The program, in the middle of an import that never ends."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

from harness.toys import toy_named, write_checkpoint

if TYPE_CHECKING:
    from tests import leftovers
else:  # a module two folders above: tests are not a package
    sys.path.append(str(Path(__file__).parents[2]))
    import leftovers

ROOT = Path(__file__).parents[3]
COMMAND = f"""
import sys
sys.path[:0] = [{str(ROOT)!r}, {str(Path(__file__).parent)!r}]
import bridge.convert
import crew_functions
bridge.convert.import_checkpoint = crew_functions.import_for_ever
import harness.cli
harness.cli.main()
"""


class Command:
    """`import` by three processes that each hang in the middle of their files.

    Args:
        directory: Where it works.
        session: What it may leave nothing of.
        torchrun: Let torchrun start them; `process` is torchrun then.
    """

    def __init__(
        self, directory: Path, session: leftovers.Session, *, torchrun: bool = False
    ) -> None:
        (directory / "pids").mkdir()
        (directory / "command.py").write_text(COMMAND)
        write_checkpoint(toy_named("nano-4b"), directory / "hf", dtype="bfloat16")
        self.directory = directory
        launcher = ("-m", "torch.distributed.run", "--nproc-per-node", "3") if torchrun else ()
        self.process = subprocess.Popen(  # noqa: S603 - our own interpreter
            [
                *(sys.executable, *launcher, "command.py", "import"),
                *("--hf-model", str(directory / "hf"), "--megatron-path", str(directory / "m")),
                *(() if torchrun else ("--workers", "3")),
            ],
            cwd=directory,
            env=os.environ | session.variables(),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        started = leftovers.until(
            lambda: self.process.poll() is not None or len(self.pids()) == 3, seconds=200
        )
        assert started
        assert self.process.poll() is None, self.process.communicate()

    def pids(self) -> list[int]:
        """Of all its processes that have come so far."""
        return [int(path.name) for path in (self.directory / "pids").iterdir()]

    def workers(self) -> list[psutil.Process]:
        """All but the command itself."""
        return [psutil.Process(pid) for pid in self.pids() if pid != self.process.pid]

    def left(self) -> set[str]:
        """What lies there besides the test's own."""
        return {path.name for path in self.directory.iterdir()} - {"pids", "command.py", "hf"}
