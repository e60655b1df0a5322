"""What the device and the host can do at best: what figures on a GPU are held against."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Self

from harness.benchmarks.process import program
from harness.benchmarks.results import Measurement
from harness.benchmarks.workspace import SetUpError, Workspace

"""Where the trials are."""
NO_GPU: Final = "no GPU"
"""Why something is left out where torch finds none."""
_NBYTES: Final = 1 << 30
_SIZE: Final = 8192
_HOST_SIZE: Final = 4096
_REPEATS: Final = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class Card:
    """Samples of `trial_card`.

    Args:
        samples: Seconds: `from_host` and `copy` of `nbytes`; matrix products by dtype,
            `host_float64` among them.
        nbytes: Of each copy.
        flops: Of a product on the device.
        host_flops: Of one on the host.
        float32_product_ulp: How far a float32 product is off, see
            `bridge.platform.float32_product_error`; None on a CPU.
    """

    samples: Mapping[str, Sequence[float]]
    nbytes: int
    flops: int
    host_flops: int
    float32_product_ulp: float | None = None

    @classmethod
    def of(cls, work: Workspace) -> Self:
        """That of a workspace's device, measured when first asked for.

        Raises:
            SetUpError: It cannot be.
        """
        if "card" not in work.found:
            work.say("measuring the card")
            sizes = (_NBYTES, _SIZE, _HOST_SIZE, _REPEATS)
            command = program("trial_card", work.profile.device)
            run = work.run([*command, *map(str, sizes)])
            found = run.json()
            if run.failure or found is None:
                raise SetUpError(f"cannot measure the card: {run.failure or 'no JSON'}")
            work.found["card"] = cls(**found)
        card: Self = work.found["card"]
        return card

    @property
    def from_host(self) -> float:
        """Bytes per second from page-locked memory of the host."""
        return self.nbytes / statistics.median(self.samples["from_host"])

    @property
    def copy(self) -> float:
        """Bytes per second within the device, those read and those written."""
        return 2 * self.nbytes / statistics.median(self.samples["copy"])

    def products(self, kind: str) -> float:
        """Operations per second: `float32`, `bfloat16`, or `host_float64`."""
        flops = self.host_flops if kind == "host_float64" else self.flops
        return flops / statistics.median(self.samples[kind])

    def copy_row(self, group: str, name: str, kind: str) -> Measurement:
        """A copy, `from_host` or `copy`, as one row of a group."""
        rate = self.from_host if kind == "from_host" else self.copy
        return Measurement(
            group=group, name=name, conditions={"size_bytes": self.nbytes},
            samples=self.samples[kind], values={"gb_per_second": rate / 1e9},
        )  # fmt: skip

    def products_row(self, group: str, kind: str) -> Measurement:
        """The products of a kind as one row of a group."""
        host = kind == "host_float64"
        values = {"gflop_per_second": self.products(kind) / 1e9}
        if kind == "float32" and self.float32_product_ulp is not None:
            values["float32_product_ulp"] = self.float32_product_ulp
        return Measurement(
            group=group,
            name="matmul on the host" if host else "matmul",
            conditions={"dtype": kind.removeprefix("host_")},
            samples=self.samples[kind],
            values=values,
        )


def has_gpu() -> bool:
    """Whether torch finds one; CUDA is not started in this process."""
    import torch

    return torch.cuda.is_available()
