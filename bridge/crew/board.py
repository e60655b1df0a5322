"""What torchrun's ranks tell one another, by way of its store."""

from __future__ import annotations

import itertools
import pickle
from collections.abc import Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Final

from torch.distributed.rendezvous import rendezvous

from bridge.crew import bounds

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

_numbers = itertools.count()
STOP: Final = "stop"
"""`(rank, error)` of who has stopped the work; the error is None where the rank will tell it."""
REPORTED: Final = "reported"
"""Rank 0 has nothing more to say."""
LEFT: Final = b"left"
"""Said in place of a sign of life: the rank is done."""


class Board:
    """Named values that every rank of a crew sees; each crew of a process has names of its own.

    No method waits for another rank. Each raises RuntimeError when the store has gone.
    """

    def __init__(self, rank: int, size: int) -> None:
        limit = timedelta(seconds=bounds.JOIN)
        self.rank = rank
        self.size = size
        self.store: Store = next(rendezvous("env://", rank, size, timeout=limit))[0]
        self._prefix = f"nemotron_bridge/{next(_numbers)}"

    def join(self, introduction: object) -> list[Any]:
        """Wait until all ranks are here; what each says of itself, by rank."""
        names = [f"here/{rank}" for rank in range(self.size)]
        self.beat(b"0")
        self.put(names[self.rank], introduction)
        self.store.wait([self._key(one) for one in names], timedelta(seconds=bounds.JOIN))
        return [self.get(one) for one in names]

    def put(self, name: str, value: object) -> None:
        """Write something that can be pickled."""
        data = pickle.dumps(value, protocol=pickle.HIGHEST_PROTOCOL)
        self.store.set(self._key(name), data)  # type: ignore[arg-type]  # bytes will do

    def has(self, *names: str) -> bool:
        """Whether all of these have been written."""
        return bool(self.store.check([self._key(one) for one in names]))

    def get(self, name: str) -> Any:  # noqa: ANN401 - as many kinds as names
        """What was written."""
        return pickle.loads(self.store.get(self._key(name)))  # noqa: S301 - by our own ranks

    def add(self, name: str, number: int) -> int:
        """Count; the sum so far."""
        return int(self.store.add(self._key(name), number))

    def stop(self, error: Exception | None) -> None:
        """Have all ranks stop; the first who says so is heard."""
        if self.add("stops", 1) == 1:
            self.put(STOP, (self.rank, error))

    def beat(self, sign: bytes) -> None:
        """Give a sign of life, other than the last."""
        self.store.set(self._key(f"beat/{self.rank}"), sign)  # type: ignore[arg-type]  # as above

    def beats(self, ranks: Sequence[int]) -> list[bytes]:
        """The last sign of each."""
        return list(self.store.multi_get([self._key(f"beat/{rank}") for rank in ranks]))

    def _key(self, name: str) -> str:
        return f"{self._prefix}/{name}"
