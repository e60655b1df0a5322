"""Time the oracle on one block with random weights, and NumPy's own float64 matmul beside it.

python -m harness.benchmarks.trial_oracle CONFIG TOKENS REPEATS
"""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path
from typing import Final

import numpy as np

from harness.benchmarks.stopwatch import in_turns
from harness.oracle import Mlp, block, read_config, rotary_angles
from harness.toys import hf_tensors

_BLOCK: Final = "model.layers.0."


def matmul_flops(parameters: int, tokens: int, attention_width: int) -> int:
    """Of one block: two per parameter and token, and the full squares of scores and of mixing."""
    return 2 * parameters * tokens + 4 * tokens * tokens * attention_width


def main(config_path: Path, tokens: int, repeats: int) -> None:
    """Print one JSON document."""
    config = json.loads(config_path.read_text("utf-8"))
    config["num_hidden_layers"] = 1
    model, rng = read_config(config), np.random.default_rng(0)
    weights = {
        name: rng.standard_normal(shape, np.float32) / np.float32(shape[-1] ** 0.5)
        for name, shape in hf_tensors(model).items()
        if name.startswith(_BLOCK)
    }
    hidden = rng.standard_normal((1, tokens, model.hidden_size))
    angles = rotary_angles(model, np.arange(tokens)[None])
    ffn = model.blocks[0][1]
    if not isinstance(ffn, Mlp):
        raise TypeError("the configuration's first block has no MLP")
    matrix = rng.standard_normal((ffn.ffn_hidden_size, model.hidden_size))
    samples = in_turns(
        {
            "ours": lambda: block(hidden, angles, weights.__getitem__, model, 0),
            "matmul": lambda: hidden[0] @ matrix.T,
        },
        repeats=repeats,
        warm_up=0,
    )
    parameters = sum(array.size for array in weights.values())
    flops = matmul_flops(parameters, tokens, model.num_attention_heads * model.kv_channels)
    seconds, matmul = (statistics.median(samples[name]) for name in ("ours", "matmul"))
    sys.stdout.write(
        json.dumps(
            {
                "samples": samples["ours"],
                "tokens": tokens,
                "parameters": parameters,
                "token_parameters_per_second": tokens * parameters / seconds,
                "gflop_per_second": flops / seconds / 1e9,
                "matmul_gflop_per_second": 2 * tokens * matrix.size / matmul / 1e9,
            }
        )
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
