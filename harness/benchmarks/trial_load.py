"""Fill a GPTModel straight from a Hugging Face checkpoint, and say how long each step took.

python -m harness.benchmarks.trial_load DIRECTORY DTYPE DEVICE
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Literal


def main(hf: Path, dtype: str, device: Literal["cpu", "cuda"]) -> None:
    """Print one JSON document: seconds by step, bytes of the parameters."""
    marks = [time.perf_counter()]
    import torch

    from bridge.convert import read_spec
    from bridge.live_parameters import load_hf
    from bridge.model import build_model
    from bridge.platform import finalize, initialize
    from bridge.spec import ParallelLayout
    from bridge.storage.safetensors import SafetensorsSource

    spec = read_spec(hf)
    layout = ParallelLayout(num_layers_per_stage=(len(spec.blocks),))
    with tempfile.TemporaryDirectory() as meeting, SafetensorsSource(hf) as source:
        initialize(0, 1, layout, init_method=f"file://{meeting}/ranks", device=device)
        import megatron.core.models.gpt.gpt_layer_specs  # noqa: F401 - seconds, and no building

        marks.append(time.perf_counter())
        parts = build_model(spec, layout, params_dtype=dtype, device=device)
        marks.append(time.perf_counter())
        load_hf(parts, spec, layout, source)
        if device == "cuda":
            torch.cuda.synchronize()
        marks.append(time.perf_counter())
        finalize()
    start, build, load = (after - before for before, after in pairwise(marks))
    nbytes = sum(one.numel() * one.element_size() for part in parts for one in part.parameters())
    sys.stdout.write(
        json.dumps(
            {
                "start_seconds": start,
                "build_seconds": build,
                "load_seconds": load,
                "model_bytes": nbytes,
            }
        )
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], "cuda" if sys.argv[3] == "cuda" else "cpu")
