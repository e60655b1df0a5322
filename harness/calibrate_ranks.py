"""The measurement behind the limits of `generation` and `rope` in `suites/thresholds.toml`.

    python -m harness.calibrate_ranks generation --dtype float32 --models 60

draws random models and layouts, as `nemotron-bridge alarms` does, runs the check on each and
reports how far every judged value goes, as JSON. With `--fault NAME` the fault of the catalogue is
put in, on the models that have what it spoils: what a limit must stay under.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np

from harness.bench import Bench, Subject
from harness.compare import Finding
from harness.faults import CATALOGUE, applicable
from harness.hooks import HEALTHY
from harness.replay import MODEL_NAME, write_model
from harness.runner import run_case
from harness.samples import Sample, draw_samples
from harness.suite import Case

_SIDES: Final = ("Megatron", "the reference")


def judged_values(finding: Finding) -> dict[str, float]:
    """What a finding of either check holds to a limit, by name."""
    measured = finding.details.get("rotation_error_ulp", finding.details)
    return {name: value for name, value in measured.items() if name.startswith(_SIDES)}


def measure(sample: Sample, check: str, bench: Bench, *, dtype: str) -> dict[str, float]:
    """Run a check on one random model, under the bench's fault."""
    root = Path(tempfile.mkdtemp(dir=bench.workdir))
    try:
        path = write_model(sample.config, root / "model" / "hf", seed=sample.seed)
        mine = bench.beside(root, {MODEL_NAME: Subject(name=MODEL_NAME, hf=path)})
        case = Case(check=check, model=MODEL_NAME, dtype=dtype, layout=sample.layout)
        result = run_case(case, mine)
    finally:
        shutil.rmtree(root, ignore_errors=True)
    if result.finding is None:
        raise RuntimeError(f"{case.id}: {result.reason}\n{result.traceback}")
    return judged_values(result.finding)


def summarise(measurements: Sequence[dict[str, float]]) -> dict[str, Any]:
    """Least, median and largest of each value, and of each model's larger side.

    A fault is seen if either side goes beyond the limit, so what counts for it is the least of the
    larger ones.
    """
    series: dict[str, list[float]] = {}
    for one in measurements:
        larger: dict[str, float] = {}
        for name, value in one.items():
            series.setdefault(name, []).append(value)
            limit = f"larger side: {name.partition(': ')[2]}"
            larger[limit] = max(value, larger.get(limit, value))
        for limit, value in larger.items():
            series.setdefault(limit, []).append(value)
    return {
        name: {
            "models": len(values),
            "min": float(f"{min(values):.5g}"),
            "median": float(f"{np.median(values):.5g}"),
            "max": float(f"{max(values):.5g}"),
        }
        for name, values in sorted(series.items())
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and write the summary to stdout as JSON."""
    parser = argparse.ArgumentParser(prog="python -m harness.calibrate_ranks", description=__doc__)
    parser.add_argument("check", choices=("generation", "rope"))
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--models", type=int, default=60)
    parser.add_argument("--start", type=int, default=5, help="another number draws other models")
    parser.add_argument("--fault", choices=sorted(CATALOGUE))
    options = parser.parse_args(arguments)
    fault = HEALTHY if options.fault is None else CATALOGUE[options.fault]
    samples = [
        sample
        for sample in draw_samples(options.models, start=options.start)
        if applicable(fault, sample.spec)
    ]
    samples.sort(key=lambda one: one.layout)  # groups are formed once for each
    with tempfile.TemporaryDirectory() as directory, Bench(Path(directory)) as bench:
        faulty = bench.under(fault)
        found = [measure(sample, options.check, faulty, dtype=options.dtype) for sample in samples]
    sys.stdout.write(json.dumps(summarise(found), indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
