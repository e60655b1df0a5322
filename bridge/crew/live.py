"""The ranks of a live model as a crew: they are there already, and go on living afterwards."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from torch import distributed

from bridge.crew.protocol import Brake, Crew, Value
from bridge.errors import BridgeError, WorkerLostError
from bridge.progress import Advance, Progress

SomeCrew = TypeVar("SomeCrew", bound=Crew)


class LiveCrew:
    """This process among all ranks of torch.distributed, which must be initialised.

    Unlike torchrun's, this crew has no watcher of its own: an error reaches the others when they
    next meet. Rank 0 shows its own progress only.
    """

    def __init__(self) -> None:
        self.rank: int = distributed.get_rank()
        self.size: int = distributed.get_world_size()
        self.brake = Brake()
        self._settled = False

    def gather(self, value: Value) -> list[Value]:
        """See `Crew`."""
        told = self._exchange(value, None)
        for _, error in told:
            if error is not None:
                self._settled = True
                raise error
        return [value for value, _ in told]

    @contextmanager
    def phase(self, progress: Progress, name: str, total: int) -> Iterator[Advance]:
        """See `Crew`."""
        if self.rank:
            yield self.brake.on(lambda _nbytes: None)
            return
        with progress.phase(name, total) as advance:
            yield self.brake.on(advance)

    def settle(self, error: BaseException) -> BaseException:
        """See `Crew`."""
        if self._settled or not isinstance(error, Exception):
            return error
        self._settled = True
        portable = error
        if not isinstance(error, BridgeError):
            portable = RuntimeError(f"rank {self.rank} failed: {type(error).__name__}: {error}")
        try:
            told = self._exchange(None, portable)
        except WorkerLostError:
            return error
        rank, first = next((rank, one) for rank, (_, one) in enumerate(told) if one is not None)
        return error if rank == self.rank else first

    def _exchange(self, value: Any, error: Exception | None) -> list[tuple[Any, Exception | None]]:  # noqa: ANN401 - whatever is gathered
        told: list[Any] = [None] * self.size
        try:
            distributed.all_gather_object(told, (value, error))
        except RuntimeError as broken:
            raise WorkerLostError(
                "a rank of the live model is gone, or took another path",
                where=str(broken).partition("\n")[0],
                hint="every rank must make this call; the first to fail says why in its log",
            ) from broken
        return told


@contextmanager
def together(crew: SomeCrew) -> Iterator[SomeCrew]:
    """Run a block on all ranks; where one fails, all raise its error."""
    try:
        yield crew
    except BaseException as error:
        told = crew.settle(error)
        if told is error:
            raise
        raise told from error
