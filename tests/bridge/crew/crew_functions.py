"""What the processes of a crew run in tests; a module, so that other processes can import it."""

from __future__ import annotations

import os
import resource
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

from bridge.conversion import ConversionOptions
from bridge.convert import export_checkpoint, import_checkpoint
from bridge.crew.protocol import Crew
from bridge.errors import ConfigError, CorruptFileError
from bridge.manifest import Files
from bridge.progress import Silent
from bridge.read_side import SourceWatch
from bridge.storage import new_checkpoint
from bridge.storage.megatron import MegatronSource
from bridge.storage.safetensors import SafetensorsSource
from bridge.transfer import write_files


def squares(crew: Crew) -> list[int]:
    """Everybody's rank squared, twice gathered."""
    crew.gather("a round that must not be mixed up with the next")
    return crew.gather(crew.rank**2)


def pids(crew: Crew) -> list[int]:
    """Of all processes."""
    return crew.gather(os.getpid())


def fail(rank: int, *, crew: Crew) -> None:
    """One rank raises an error that users see; the others are busy."""
    if crew.rank == rank:
        raise ConfigError("it is wrong", where=f"rank {rank}", hint="mend it")
    _be_busy(crew)
    crew.gather(None)


def _be_busy(crew: Crew) -> None:
    """Half a minute of work."""
    with crew.phase(Silent(), "work", 3000) as advance:
        for _ in range(3000):
            time.sleep(0.01)
            advance(1)


def crash(crew: Crew) -> None:
    """Rank 1 has a bug."""
    if crew.rank == 1:
        raise ZeroDivisionError("a bug of ours")
    crew.gather(None)


def leave(how: int, *, crew: Crew) -> None:
    """Rank 1 ends without a word: by a signal, or with an exit code when `how` is negative."""
    if crew.rank == 1:
        if how < 0:
            os._exit(-how)
        os.kill(os.getpid(), how)
    crew.gather(None)


def count(each: int, *, progress: Silent, crew: Crew) -> None:
    """Every rank does three steps of `each` bytes."""
    with crew.phase(progress, "count", 3 * each * crew.size) as advance:
        for _ in range(3):
            advance(each)
        crew.gather(None)


def work_on(where: Path, *, crew: Crew) -> None:
    """Rank 1 dies while rank 0, who would wait for nobody, is busy."""
    if crew.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    _be_busy(crew)
    (where / "finished").touch()


Writer = Callable[..., Files]


def _import(hf: Path, megatron: Path, crew: Crew, write: Callable[[Writer], Writer]) -> None:
    """Convert at a cut that has four files, with another writer of files."""
    with patch.object(new_checkpoint, "write_files", write(write_files)):
        import_checkpoint(
            hf, megatron, tensor_model_parallel_size=2, pipeline_model_parallel_size=2, crew=crew
        )


def convert_slowly(source: Path, target: Path, *, options: ConversionOptions, crew: Crew) -> None:
    """All but rank 0 take their time to open what was written."""
    megatron, hf = MegatronSource.__init__, SafetensorsSource.__init__

    def slowly(self: Any, directory: Path, **how: Any) -> None:  # noqa: ANN401
        if crew.rank and ".partial" in str(directory):
            time.sleep(1)
        (megatron if isinstance(self, MegatronSource) else hf)(self, directory, **how)

    convert = import_checkpoint if (source / "config.json").exists() else export_checkpoint
    with (
        patch.object(MegatronSource, "__init__", slowly),
        patch.object(SafetensorsSource, "__init__", slowly),
    ):
        convert(source, target, options=options, crew=crew)


def convert_a_source_that_changes(hf: Path, megatron: Path, *, crew: Crew) -> None:
    """One rank notices at its last look, later than all others."""
    refuse_changes = SourceWatch.refuse_changes

    def late(watch: SourceWatch) -> None:
        if crew.rank == 1:
            time.sleep(1)
            raise CorruptFileError("the source was changed while it was converted")
        refuse_changes(watch)

    with patch.object(SourceWatch, "refuse_changes", late):
        import_checkpoint(hf, megatron, crew=crew)


def import_and_die(hf: Path, megatron: Path, *, doomed: int, crew: Crew) -> None:
    """One rank is killed once it has written its files."""

    def dying(write: Writer) -> Writer:
        def written(*args: Any, **kwargs: Any) -> Files:  # noqa: ANN401 - a wrapper
            found = write(*args, **kwargs)
            if crew.rank == doomed:
                os.kill(os.getpid(), signal.SIGKILL)
            return found

        return written

    _import(hf, megatron, crew, dying)


def import_and_hang(hf: Path, megatron: Path, *, pids: Path, crew: Crew) -> None:
    """Every rank says its process id and waits in the middle of its files."""

    def hanging(write: Writer) -> Writer:
        def written(layouts: Any, *args: Any, **kwargs: Any) -> Files:  # noqa: ANN401 - a wrapper
            found = write(layouts[:1], *args, **kwargs)
            (pids / f"{os.getpid()}").touch()
            time.sleep(300)
            return found

        return written

    _import(hf, megatron, crew, hanging)


def import_on_a_full_disk(hf: Path, megatron: Path, *, full: int, crew: Crew) -> None:
    """The system refuses one rank to write more than 1000 bytes into a file."""
    if crew.rank == full:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
    try:
        _import(hf, megatron, crew, lambda write: write)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)


def stop(rank: int, *, crew: Crew) -> None:
    """One rank is stopped, as by a debugger, while the others wait for it."""
    crew.gather(None)
    if crew.rank == rank:
        os.kill(os.getpid(), signal.SIGSTOP)
    crew.gather(None)


def stop_while_another_hangs(*, crew: Crew) -> None:
    """Rank 2 gets no further, as if it waited for rank 1, which is stopped a little later."""
    crew.gather(None)
    with crew.phase(Silent(), "work", 1):
        if crew.rank == 1:
            time.sleep(2)
            os.kill(os.getpid(), signal.SIGSTOP)
        if crew.rank == 2:
            time.sleep(600)
        crew.gather(None)


def stop_lead(where: str, *, crew: Crew) -> None:
    """Rank 0 is stopped once it knows that another is there."""
    if crew.rank:
        Path(where, f"worker-{os.getpid()}").touch()
    crew.gather(None)
    if crew.rank == 0:
        os.kill(os.getpid(), signal.SIGSTOP)
    crew.gather(None)  # which the other has sent before it left
    crew.gather(None)


def hang(rank: int, *, crew: Crew) -> None:
    """One rank lives and gets no further with its work."""
    crew.gather(None)
    with crew.phase(Silent(), "work", 1):
        if crew.rank == rank:
            time.sleep(600)
        crew.gather(None)


def leave_by_exit(rank: int, *, crew: Crew) -> None:
    """One rank calls sys.exit, as a library may."""
    if crew.rank == rank:
        sys.exit(7)
    crew.gather(None)


def work_slowly(seconds: float, *, crew: Crew) -> int:
    """Rank 1 takes its time, in small steps, and the others wait; then rank 0 takes its own."""
    with crew.phase(Silent(), "work", 100) as advance:
        until = time.monotonic() + seconds
        while crew.rank == 1 and time.monotonic() < until:
            time.sleep(0.1)
            advance(1)
        crew.gather(None)
    if crew.rank == 0:
        time.sleep(seconds)
    return len(crew.gather(None))


def interrupt(rank: int, number: int, *, crew: Crew) -> None:
    """One rank gets a signal that its launcher, or a user, sends to it alone."""
    crew.gather(None)
    if crew.rank == rank:
        os.kill(os.getpid(), number)
        time.sleep(600)
    crew.gather(None)


def throw(rank: int, when: str, *, crew: Crew) -> None:
    """One rank has a bug: at the start, in the middle of its work, or at the end of it."""
    if when == "start" and crew.rank == rank:
        raise ZeroDivisionError(when)
    with crew.phase(Silent(), "work", 3000) as advance:
        for step in range(30):
            time.sleep(0.01)
            advance(1)
            if when == "middle" and crew.rank == rank and step == 15:
                raise ZeroDivisionError(when)
        crew.gather(None)
    if when == "end" and crew.rank == rank:
        raise ZeroDivisionError(when)
    crew.gather(None)


def import_for_ever(hf: Path, megatron: Path, *, crew: Crew, **_: object) -> None:
    """In place of `import_checkpoint`: every process says its id and hangs among its files."""
    pids = megatron.parent / "pids"
    import_and_hang(hf, megatron, pids=pids, crew=crew)
