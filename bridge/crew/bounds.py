"""How long anything may take that goes wrong with the processes of a crew: all in seconds.

Every wait for another process has one of these as its end. Time is counted while the one who waits
runs itself, so that a command that was suspended, with all its processes, goes on afterwards.
"""

from __future__ import annotations

import time
from typing import Final

HUNG: Final = 1800.0
"""Without progress: no byte done, no value given, and not waiting for others. `--timeout`."""
FROZEN: Final = 120.0
"""Without a sign of life, which a thread of its own gives: stopped, or swapped out, or gone."""
BEAT: Final = 1.0
"""Between two signs of life."""
ACCORD: Final = 3.0
"""For the other hung processes to say so too: one that waits for another is not the first cause."""
DEATH: Final = 5.0
"""For a process whose pipe is closed, or that was killed, to be no more."""
JOIN: Final = 300.0
"""For the ranks of torchrun to come together."""
LEAVE: Final = 15.0
"""For a rank that is told to stop to do so: then it is ended in whatever it does."""


class Patience:
    """Counts the time since the last sign, while this process runs.

    Args:
        limit: Seconds.
    """

    def __init__(self, limit: float) -> None:
        self.limit = limit
        self._spent = 0.0
        self._looked = time.monotonic()

    def renew(self) -> None:
        """There was a sign. From any thread."""
        self._spent = 0.0

    def is_over(self, *, by: float = 0.0) -> bool:
        """Whether there was none for so long, and `by` more. To be asked at least every `BEAT`.

        A longer pause between two questions is this process's own, and counts as one.
        """
        now = time.monotonic()
        self._spent += min(now - self._looked, 2 * BEAT)
        self._looked = now
        return self._spent > self.limit + by
