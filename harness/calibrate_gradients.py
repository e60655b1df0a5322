"""The measurement behind the limits for gradients: how far healthy models are from the truth.

    python -m harness.calibrate_gradients --dtype float32 --models 100

draws random models in random layouts, degenerate ones among them, and runs each forward and back
through transformers and through Megatron-Core on ranks of this host. It reports, as JSON, what
`harness.checks.gradients` holds to limits. Models that transformers refuses are left out.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from harness.bench import Bench, Subject
from harness.checks import gradients
from harness.replay import MODEL_NAME, write_model
from harness.samples import Sample, draw_samples
from harness.suite import Case


def loadable(sample: Sample) -> bool:
    """Whether transformers takes it: its Llama wants hidden_size to be a multiple of the heads."""
    spec = sample.spec
    return spec.heterogeneous_block_specs or spec.hidden_size % spec.num_attention_heads == 0


def measure(
    samples: Sequence[Sample], *, dtype: str, bench: Bench, root: Path
) -> list[dict[str, Any]]:
    """Run each sample through the check, and keep its numbers.

    Args:
        samples: Models and layouts.
        dtype: What they compute in.
        bench: Whose ranks are used.
        root: Where models are written; each is deleted after use.
    """
    found = []
    # By layout, so that groups are formed rarely.
    for sample in sorted(samples, key=lambda one: (one.parallel_layout.world_size, one.layout)):
        directory = Path(tempfile.mkdtemp(dir=root))
        try:
            path = write_model(sample.config, directory / "model" / "hf", seed=sample.seed)
            mine = bench.beside(directory, {MODEL_NAME: Subject(name=MODEL_NAME, hf=path)})
            case = Case(check="gradients", model=MODEL_NAME, dtype=dtype, layout=sample.layout)
            finding = gradients.run(case, mine)
        finally:
            shutil.rmtree(directory)
        if finding.details["problems"]:
            raise RuntimeError(f"{sample.describe()}: {finding.details['problems'][0]}")
        found.append(
            {
                "sample": sample.describe(),
                "excess": finding.value,
                "loss_excess": finding.details["loss_nats_per_token"]["excess"],
                "reference_error_ulp": finding.details["reference_error_ulp"],
            }
        )
    return found


def summarise(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Median and largest of each number, and the model that has the largest."""
    found = {}
    for name in ("excess", "loss_excess", "reference_error_ulp"):
        ordered = sorted(rows, key=lambda row: float(row[name]))
        found[name] = {
            "samples": len(ordered),
            "median": round(ordered[len(ordered) // 2][name], 4),
            "max": round(ordered[-1][name], 4),
            "max_at": ordered[-1]["sample"],
        }
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and write the summary to stdout as JSON."""
    parser = argparse.ArgumentParser(
        prog="python -m harness.calibrate_gradients", description=__doc__
    )
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--models", type=int, default=100, help="how many to draw")
    parser.add_argument("--start", type=int, default=0, help="another number draws other models")
    parser.add_argument("--max-hidden-size", type=int, help="degenerate models only")
    options = parser.parse_args(arguments)
    samples = [
        sample
        for sample in draw_samples(options.models, start=options.start)
        if loadable(sample)
        and (options.max_hidden_size is None or sample.spec.hidden_size <= options.max_hidden_size)
    ]
    with contextlib.ExitStack() as stack:
        root = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        bench = stack.enter_context(Bench(root))
        rows = measure(samples, dtype=options.dtype, bench=bench, root=root)
    sys.stdout.write(json.dumps(summarise(rows), indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
