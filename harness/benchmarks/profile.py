"""How much is measured: minutes, or the whole of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal

MIB: Final = 1 << 20
GIB: Final = 1 << 30

# The limits. A missed one fails the command with --strict only.
MAX_WALL_OF_CP: Final = 1.5
MAX_VERIFY_OF_CP: Final = 1.5
RATIOS_FROM_BYTES: Final = 8_000_000_000
"""Below this `cp` returns with everything in memory and nothing on the disk: no standard."""
RSS_ABOVE_BUDGET: Final = GIB // 2
MAX_HELP_SECONDS: Final = 0.5
MAX_START_SECONDS: Final = 2.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Profile:
    """What one run measures.

    Args:
        name: `quick` or `full`.
        sizes: Bytes of the checkpoints, ascending; the last one is that of everything else.
        budgets: Bytes for `--memory-budget`.
        workers: For `--workers`.
        repeats: Runs of each conversion, in turns with `cp`.
        start_repeats: Runs of what is over at once.
        parity_select: Cases of the parity suite; none selects all.
        oracle_tokens: Tokens that go through one block of the oracle.
        device: Where models are loaded, run and proved.
        forward_shapes: Batch and sequence of each forward pass.
        forward_repeats: Passes of each model by shape.
        timeout: Seconds that any one command may take.
    """

    name: Literal["quick", "full"]
    sizes: Sequence[int]
    budgets: Sequence[int]
    workers: Sequence[int] = (1, 2)
    repeats: int = 3
    start_repeats: int = 5
    parity_select: Sequence[str] = ()
    oracle_tokens: int = 128
    device: Literal["cpu", "cuda"] = "cpu"
    forward_shapes: Sequence[tuple[int, int]] = ((1, 2048), (8, 2048))
    forward_repeats: int = 20
    timeout: float = 900.0

    @property
    def main_size(self) -> int:
        """Bytes of the checkpoint that most is measured with."""
        return self.sizes[-1]

    @property
    def disk_bytes(self) -> int:
        """What may lie on the disk at once: both forms of the largest, a target, one to spare."""
        return 4 * self.main_size


QUICK: Final = Profile(
    name="quick",
    sizes=(500_000_000, 1_000_000_000, 2_000_000_000),
    budgets=(128 * MIB, GIB),
    parity_select=("*/nano-4b/*",),
    oracle_tokens=64,
)
FULL: Final = Profile(
    name="full",
    sizes=(500_000_000, 2_000_000_000, 8_000_000_000),
    budgets=(128 * MIB, 256 * MIB, 512 * MIB, GIB, 2 * GIB, 4 * GIB),
)
