"""What multiprocessing starts beside a crew goes with it, though somebody has stopped it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tests import leftovers

SCRIPT = """
import crew_functions as functions
from bridge.crew.attendants import attendant
from bridge.crew.local import led

if __name__ == "__main__":
    with led(2, functions.squares, (), {}) as lead:
        functions.squares(lead)
        attendant("resource_tracker").suspend()
    print(attendant("resource_tracker").status())
"""


def test_a_stopped_resource_tracker_ends_with_the_command(session: leftovers.Session) -> None:
    """It would keep stderr open, for whoever reads that to its end."""
    here = Path(__file__)
    done = subprocess.run(  # noqa: S603 - our own
        [sys.executable, "-c", SCRIPT],
        env=os.environ
        | session.variables()
        | {"PYTHONPATH": os.pathsep.join([str(here.parents[3]), str(here.parent)])},
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (0, "stopped\n", "")
    assert session.leftovers(seconds=5) == []
