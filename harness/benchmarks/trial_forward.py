"""Time forward passes of a converted model, in turns with the Hugging Face model's.

python -m harness.benchmarks.trial_forward DIRECTORY DTYPE DEVICE REPEATS BATCHxSEQUENCE...
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, Literal

import torch

from bridge.decilm import load_reference
from bridge.platform import finalize, forbid_tf32, initialize
from harness.benchmarks.stopwatch import in_turns

_WARM_UP: Final = 3
_ATTENTION: Final = "sdpa"
"""Not `eager`, which proofs use and no user would: it stores every score."""

Shape = tuple[int, int]


def main(
    hf: Path, dtype: str, device: Literal["cpu", "cuda"], repeats: int, shapes: Sequence[Shape]
) -> None:
    """Print one JSON document: which layers, which reference, and samples by shape.

    Args:
        hf: A checkpoint.
        dtype: torch's name of what both compute in.
        device: Where.
        repeats: Samples of each.
        shapes: Batch and sequence.
    """
    forbid_tf32()
    with tempfile.TemporaryDirectory() as meeting:
        found = _measure(hf, dtype, device, repeats, shapes, f"file://{meeting}/ranks")
    finalize()
    sys.stdout.write(json.dumps(found))


def _measure(
    hf: Path,
    dtype: str,
    device: Literal["cpu", "cuda"],
    repeats: int,
    shapes: Sequence[Shape],
    meeting: str,
) -> dict[str, Any]:
    from bridge.convert import read_spec
    from bridge.forward import forward
    from bridge.live_parameters import load_hf
    from bridge.megatron_config import choose_layers
    from bridge.model import build_model
    from bridge.spec import ParallelLayout
    from bridge.storage.safetensors import SafetensorsSource

    spec = read_spec(hf)
    layout = ParallelLayout(num_layers_per_stage=(spec.num_layers,))
    where = initialize(0, 1, layout, init_method=meeting, device=device)
    layers = choose_layers("auto", device)
    parts = build_model(spec, layout, params_dtype=dtype, layers=layers, device=device)
    with SafetensorsSource(hf) as source:
        load_hf(parts, spec, layout, source)
    reference: Any = load_reference(
        hf, dtype=getattr(torch, dtype), attn_implementation=_ATTENTION
    ).to(where)
    generator = torch.Generator().manual_seed(0)
    rows = []
    for batch, sequence in shapes:
        ids = torch.randint(spec.vocab_size, (batch, sequence), generator=generator).to(where)

        def ours(ids: torch.Tensor = ids) -> torch.Tensor:
            return forward(parts, spec, layout, ids)

        def theirs(ids: torch.Tensor = ids) -> torch.Tensor:
            logits: torch.Tensor = reference(input_ids=ids, use_cache=False).logits
            return logits

        with torch.no_grad():
            works = {"ours": ours, "theirs": theirs}
            samples = in_turns(works, repeats=repeats, warm_up=_WARM_UP, device=device)
            difference = relative_difference(ours(), theirs())
        rows.append(
            {"batch": batch, "sequence": sequence, "difference": difference, "samples": samples}
        )
    return {"layers": layers, "reference": f"transformers, {_ATTENTION}", "shapes": rows}


def relative_difference(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """Root mean square of the difference over that of `theirs`; (batch, sequence, vocab_size)."""
    between = total = 0.0
    for one, other in zip(ours, theirs, strict=True):  # a sequence at a time: they are large
        wide = other.float()
        between += float((one.float() - wide).square().sum(dtype=torch.float64))
        total += float(wide.square().sum(dtype=torch.float64))
    return float((between / total) ** 0.5)


def shape_named(name: str) -> Shape:
    """The inverse of `BATCHxSEQUENCE`."""
    batch, sequence = name.split("x")
    return int(batch), int(sequence)


if __name__ == "__main__":
    main(
        Path(sys.argv[1]),
        sys.argv[2],
        "cuda" if sys.argv[3] == "cuda" else "cpu",
        int(sys.argv[4]),
        [shape_named(one) for one in sys.argv[5:]],
    )
