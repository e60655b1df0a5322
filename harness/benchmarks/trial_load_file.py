"""Load a checkpoint's files with the safetensors package, as they are, onto a device.

python -m harness.benchmarks.trial_load_file DIRECTORY DEVICE
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path


def main(hf: Path, device: str) -> None:
    """Print one JSON document: seconds of the loading, without the start of CUDA, and bytes."""
    import torch
    from safetensors.torch import load_file

    torch.zeros(1, device=device)
    held: dict[str, torch.Tensor] = {}
    started = time.perf_counter()
    for path in sorted(hf.glob("*.safetensors")):
        held |= load_file(path, device=device)
    if device != "cpu":
        torch.cuda.synchronize()
    taken = time.perf_counter() - started
    nbytes = sum(one.numel() * one.element_size() for one in held.values())
    sys.stdout.write(json.dumps({"load_file_seconds": taken, "nbytes": nbytes}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
