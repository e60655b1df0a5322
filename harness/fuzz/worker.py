"""One process that reads a range of inputs of one kind, and says what became of each."""

from __future__ import annotations

import contextlib
import faulthandler
import os
import resource
import signal
import struct
import sys
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass, replace
from mmap import mmap
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Final

from bridge.errors import BridgeError
from harness.fuzz.kinds import Kind
from harness.fuzz.mutation import mutate
from harness.fuzz.pickles import CANARY

ACCEPTED: Final = "accepted"
PAYLOAD_RAN: Final = "payload ran"
MEMORY: Final = "memory"
_STAMP: Final = struct.Struct("<qdd")
_FUZZ: Final = str(Path(__file__).parent)
_OURS: Final = str(Path(__file__).parents[2])
_FRAMES: Final = 12  # of a traceback that is kept
_MOST_SAID: Final = 1 << 20  # characters of an error; a screenful is some thousand
STACK_SIGNAL: Final = signal.SIGUSR1
"""Upon which a process writes where it is."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Range:
    """Inputs of one kind."""

    kind: Kind
    seed: int
    start: int
    stop: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What became of one input.

    Args:
        index: Of the input; -1 for the original, as it was before any mutation.
        code: `accepted`, or the code of the error that it was refused with; "" with a problem.
        seconds: Wall time.
        peak_bytes: The most memory that the process has had more than when it began.
        has_payload: Whether there was something to run in it.
        problem: What should not be: `RecursionError`, `memory`, `exit 3`, `signal 9`, `hang`.
        place: Where, as far as is known; problems of one place are counted as one.
        details: A traceback.
    """

    index: int
    code: str = ""
    seconds: float = 0.0
    peak_bytes: int = 0
    has_payload: bool = False
    problem: str = ""
    place: str = ""
    details: str = ""


def stamp(shared: mmap, index: int, started: float) -> None:
    """Note which input is being read, and since when; 0.0 for none."""
    _STAMP.pack_into(shared, 0, index, started, time.process_time())


def stamped(shared: mmap) -> tuple[int, float, float]:
    """What was noted, and how long the process had computed by then."""
    index, started, computed = _STAMP.unpack_from(shared, 0)
    return index, started, computed


def write_input(path: Path, data: bytes) -> None:
    """Put bytes there, in a file of its own: an earlier one may still be mapped by somebody."""
    path.unlink(missing_ok=True)
    path.write_bytes(data)


def work(
    batch: Range, root: Path, results: Connection, shared: mmap, log: int, *, memory: int
) -> None:
    """Read a range of inputs; the whole life of a process.

    Args:
        batch: Which inputs.
        root: A world of this process's own.
        results: Where an `Outcome` goes for each.
        shared: Noted in it is the input that is being read.
        log: Descriptor for stacks, where the process is asked for them or dies.
        memory: Bytes that one process may take beyond what it begins with.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent tells
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    faulthandler.enable(log)
    faulthandler.register(STACK_SIGNAL, log, all_threads=True)
    os.chdir(root)
    path, originals = batch.kind.file(root), batch.kind.originals(root)
    with _silent():
        first = _read(batch.kind, root, -1, 0)  # imports what the reader needs, too
        if not first.problem and (first.code == ACCEPTED) == batch.kind.original_refused:
            first = replace(first, problem=f"the original is not to be {first.code}", code="")
        if first.problem:
            results.send(first)
        _bound_memory(2 * memory)
        before = _peak()
        for index in range(batch.start, batch.stop):
            made = mutate(batch.kind.name, batch.kind.form, originals, seed=batch.seed, index=index)
            write_input(path, made.data)
            stamp(shared, index, time.monotonic())
            found = _read(batch.kind, root, index, before, has_payload=made.has_payload)
            stamp(shared, index, 0.0)
            if found.peak_bytes > memory and not found.problem:
                found = replace(found, code="", problem=MEMORY, place="the reader returned")
            results.send(found)
            if found.problem == MEMORY:
                return  # the next process begins with little again
    results.close()


def _read(kind: Kind, root: Path, index: int, before: int, *, has_payload: bool = False) -> Outcome:
    started = time.perf_counter()
    code, problem, place, details = ACCEPTED, "", "", ""
    try:
        kind.read(root)
    except BridgeError as error:
        code = error.code
        if _ran_out(error):
            problem, place, details = MEMORY, _place(error), _trace(error)
        elif len(str(error)) > _MOST_SAID:
            problem, place = "endless message", _place(error)
    except BaseException as error:  # noqa: BLE001 - whatever it is, it is what we look for
        problem, place, details = type(error).__name__, _place(error), _trace(error)
    seconds = time.perf_counter() - started
    if Path(CANARY).exists():
        Path(CANARY).unlink()
        problem, place = PAYLOAD_RAN, place or "the reader returned"
    return Outcome(
        index=index, code="" if problem else code, seconds=seconds, peak_bytes=_peak() - before,
        has_payload=has_payload, problem=problem, place=place, details=details,
    )  # fmt: skip


def _ran_out(error: BaseException | None) -> bool:
    """Whether a reader met the bound of memory, and refused the file for that.

    Where nothing bounds the memory it would have taken it.
    """
    while error is not None:
        if isinstance(error, MemoryError):
            return True
        error = error.__cause__ or error.__context__
    return False


def _place(error: BaseException) -> str:
    """The last lines of ours that it passed."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [one for one in frames if _OURS in one.filename and _FUZZ not in one.filename]
    return ", ".join(f"{Path(one.filename).name}:{one.lineno}" for one in (ours or frames)[-2:])


def _trace(error: BaseException) -> str:
    try:
        return "".join(traceback.format_exception(error, limit=-_FRAMES))[-4000:]
    except BaseException as another:  # noqa: BLE001 - an error that cannot be printed is one more
        return f"{type(error).__name__}, which cannot be printed: {type(another).__name__}"


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _bound_memory(more: int) -> None:
    """Let no mistake take down the machine."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    mapped = int(Path("/proc/self/statm").read_text("ascii").split()[0]) * resource.getpagesize()
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    bound = mapped + more
    if hard != resource.RLIM_INFINITY:
        bound = min(bound, hard)
    resource.setrlimit(resource.RLIMIT_AS, (bound, hard))


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """What libraries print about broken files helps nobody."""
    with Path(os.devnull).open("w", encoding="utf-8") as nothing:
        os.dup2(nothing.fileno(), 1)
        os.dup2(nothing.fileno(), 2)
        with contextlib.redirect_stdout(nothing), contextlib.redirect_stderr(nothing):
            yield
    sys.stdout = sys.stderr = None  # the process ends here
