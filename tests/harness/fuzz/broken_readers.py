"""Run by a test: readers that are broken in every way that a run has to notice.

    python broken_readers.py DIRECTORY

Prints, as JSON, what was found in each kind.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from bridge.errors import CheckpointError
from harness.fuzz.kinds import Kind
from harness.fuzz.mutation import TEXT
from harness.fuzz.pickles import CANARY
from harness.fuzz.run import run_fuzz

ORIGINAL: Final = b"some text\nof two lines\n" * 9
INPUTS: Final = 12  # of each kind
MEMORY: Final = 64 << 20


def _throw() -> None:
    raise KeyError("a bare one")


def _leave() -> None:
    sys.exit(0)


def _vanish() -> None:
    os._exit(0)


def _be_killed() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _crash() -> None:
    ctypes.string_at(0)


def _hang() -> None:
    time.sleep(600)


def _loop() -> None:
    while True:
        pass


def _grow() -> None:
    bytearray(b"x") * (MEMORY + (8 << 20))


def _meet_the_bound() -> None:
    try:
        bytearray(1 << 40)
    except MemoryError as error:
        raise CheckpointError("refused, once there was no more") from error


def _run_a_payload() -> None:
    Path(CANARY).touch()


def _refuse() -> None:
    raise CheckpointError("as it should be")


BROKEN: Final[dict[str, Callable[[], None]]] = {
    "throws": _throw, "leaves": _leave, "vanishes": _vanish, "killed": _be_killed,
    "crashes": _crash, "hangs": _hang, "grows": _grow, "bounded": _meet_the_bound,
    "loops": _loop, "runs": _run_a_payload, "refuses": _refuse,
}  # fmt: skip


def _kind(name: str, fail: Callable[[], None]) -> Kind:
    def read(root: Path) -> None:
        data = (root / name).read_bytes()
        if data != ORIGINAL and len(data) % 3 == 0:  # others are read well
            fail()

    return Kind(name=name, path=name, form=TEXT, read=read)


def _never(root: Path) -> None:
    raise CheckpointError("refused before any mutation", where=str(root))


def main(directory: Path) -> dict[str, Any]:
    """What is found."""
    world = directory / "world"
    world.mkdir()
    kinds = [_kind(name, fail) for name, fail in BROKEN.items()]
    kinds.append(Kind(name="never", path="never", form=TEXT, read=_never))
    for kind in kinds:
        (world / kind.name).write_bytes(ORIGINAL)
    report = run_fuzz(
        world, kinds=kinds, inputs=INPUTS * len(kinds), workers=2, timeout=1.0, memory=MEMORY
    )
    return {
        "kinds": {
            name: {
                "inputs": tally.inputs, "accepted": tally.accepted, "refused": tally.refused,
                "findings": tally.findings,
                "problems": sorted({
                    one.outcome.problem for one in report.findings if one.kind == name
                }),
            }
            for name, tally in report.by_kind.items()
        },
        "hang": [one.outcome.details for one in report.findings if one.kind == "hangs"][:1],
        "left": sorted(path.name for path in directory.iterdir()),
    }  # fmt: skip


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]))))  # noqa: T201 - for the test
