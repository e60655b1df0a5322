"""What a device and its host can do at best: copies, and matrix products by dtype.

python -m harness.benchmarks.trial_card DEVICE BYTES SIZE HOST_SIZE REPEATS
"""

from __future__ import annotations

import json
import sys
from typing import Any, Final

import numpy as np
import torch

from bridge.platform import float32_product_error, forbid_tf32
from harness.benchmarks.stopwatch import in_turns, seconds

_WARM_UP: Final = 3


def main(device: str, nbytes: int, size: int, host_size: int, repeats: int) -> None:
    """Print one JSON document: samples in seconds, and what one sample moves or computes.

    Args:
        device: "cpu" or "cuda".
        nbytes: Of each buffer that is copied.
        size: Rows and columns of the matrices on the device.
        host_size: The same of those on the host, which are float64.
        repeats: Samples of each.
    """
    forbid_tf32()
    host = torch.empty(nbytes, dtype=torch.uint8, pin_memory=device != "cpu")
    host.fill_(1)  # or its pages would not be there yet
    here, there = (torch.empty(nbytes, dtype=torch.uint8, device=device) for _ in range(2))
    works = {
        "from_host": lambda: there.copy_(host, non_blocking=True),
        "copy": lambda: there.copy_(here),
    }
    for dtype in (torch.float32, torch.bfloat16):
        works[str(dtype).removeprefix("torch.")] = _product(device, dtype, size)
    samples = in_turns(works, repeats=repeats, warm_up=_WARM_UP, device=device)
    matrix = np.random.default_rng(0).standard_normal((host_size, host_size))
    samples["host_float64"] = [seconds(lambda: matrix @ matrix) for _ in range(repeats)]
    found: dict[str, Any] = {
        "samples": samples,
        "nbytes": nbytes,
        "flops": 2 * size**3,
        "host_flops": 2 * host_size**3,
    }
    if device != "cpu":
        found["float32_product_ulp"] = float32_product_error()["torch"]
    sys.stdout.write(json.dumps(found))


def _product(device: str, dtype: torch.dtype, size: int) -> Any:  # noqa: ANN401 - a closure
    # Random: a GPU draws less power on zeros, and is faster.
    left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    made = torch.empty_like(left)
    return lambda: torch.mm(left, right, out=made)


if __name__ == "__main__":
    main(sys.argv[1], *(int(one) for one in sys.argv[2:6]))
