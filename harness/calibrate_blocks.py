"""The measurement behind the limits `blocks.*` in `suites/thresholds.toml`.

    python -m harness.calibrate_blocks --dtype float32 --models 100

runs Megatron-Core itself, on the toys in several layouts and on random models in random ones
(`harness.samples`), and reports for every block how far the reference and Megatron are from the
truth, given one input and running free, as JSON. `--fault NAME` runs the toys under a fault of the
catalogue instead, and reports the largest excess of each run: what a limit must stay under.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np

from harness.bench import Bench, Subject
from harness.block_states import FORCED_EXCESS, FREE_EXCESS, REFERENCE_ERROR, judge_blocks
from harness.hooks import HEALTHY, Fault
from harness.layouts import fits
from harness.metrics import ulp_of_one
from harness.suite import Case
from harness.toys import TOYS

_LAYOUTS: Final = ("tp1-pp1", "tp2-pp1", "tp2-pp1-sp", "tp2-pp2-vp2")
_PROBES: Final = ("short", "long")
Row = dict[str, Any]


def toy_rows(dtype: str, fault: Fault, timeout: float) -> Iterator[Row]:
    """Every block of every toy."""
    with (
        tempfile.TemporaryDirectory() as root,
        Bench(Path(root), fault=fault, timeout=timeout) as bench,
    ):
        for layout in _LAYOUTS:
            for toy in TOYS:
                case = Case(check="blocks", model=toy, dtype=dtype, layout="tp1-pp1")
                if fits(layout, bench.spec(case)):
                    yield from _rows(bench, toy, layout, dtype)


def sample_rows(dtype: str, models: int, timeout: float) -> Iterator[Row]:
    """Every block of random models, degenerate ones among them."""
    from harness.replay import write_model
    from harness.samples import draw_samples

    with tempfile.TemporaryDirectory() as root, Bench(Path(root), timeout=timeout) as ranks:
        for number, sample in enumerate(draw_samples(models)):
            work = Path(root) / f"sample-{number}"
            stored = {key: dtype for key in ("dtype", "torch_dtype") if key in sample.config}
            config = {**sample.config, **stored}
            hf = write_model(config, work / "hf", seed=sample.seed)
            bench = ranks.beside(work, {work.name: Subject(name=work.name, hf=hf)})
            yield from _rows(bench, work.name, sample.layout, dtype)


def _rows(bench: Bench, model: str, layout: str, dtype: str) -> Iterator[Row]:
    unit = ulp_of_one(dtype)
    for probe in _PROBES:
        case = Case(check="blocks", model=model, dtype=dtype, layout=layout, probe=probe)
        by = bench.witnesses(case)
        judged = judge_blocks(
            bench.block_states(case), by, dtype=dtype, thresholds=bench.thresholds
        )
        for one in judged:
            if one.forced.problems or one.free.problems:
                raise SystemExit(f"{case.id}, {one.name}: {one.forced.problems}")
            yield {
                "case": case.id,
                "layer_idx": one.layer_idx,
                "kind": one.kind,
                "hidden_size": by.model.hidden_size,
                "forced": one.candidate_ulp,
                "reference": one.reference_ulp,
                "free": one.free.candidate_error / one.free.scale / unit,
                "free_reference": one.free.reference_error / one.free.scale / unit,
                "excess": one.forced.value,
                "free_excess": one.free.value,
            }


def summarise(rows: Sequence[Row]) -> dict[str, Any]:
    """Median and largest of what is limited; where the largest are."""
    found: dict[str, Any] = {"blocks": len(rows), "runs": len({row["case"] for row in rows})}
    for name in ("excess", "free_excess", "reference", "forced", "free"):
        values = [row[name] for row in rows]
        worst = rows[int(np.argmax(values))]
        found[name] = {
            "median": round(float(np.median(values)), 4),
            "p99": round(float(np.quantile(values, 0.99)), 4),
            "max": round(max(values), 4),
            "at": f"{worst['case']}, block {worst['layer_idx']}, {worst['kind']}",
        }
    by_run: dict[str, float] = {}
    for row in rows:
        by_run[row["case"]] = max(by_run.get(row["case"], 0.0), row["excess"])
    found["least_of_the_runs_largest_excess"] = round(min(by_run.values()), 4)
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and write the summary to stdout as JSON."""
    parser = argparse.ArgumentParser(prog="python -m harness.calibrate_blocks", description=__doc__)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--models", type=int, default=100, help="random models beside the toys")
    parser.add_argument("--fault", help="of the catalogue; toys only")
    parser.add_argument("--timeout", type=float, default=120.0)
    parser.add_argument("--each", action="store_true", help="every block, not the summary")
    options = parser.parse_args(arguments)
    fault = HEALTHY
    if options.fault is not None:
        from harness.faults import fault_named

        fault = fault_named(options.fault)
    rows = list(toy_rows(options.dtype, fault, options.timeout))
    if fault is HEALTHY and options.models:
        rows += sample_rows(options.dtype, options.models, options.timeout)
    limits = [FORCED_EXCESS, FREE_EXCESS, REFERENCE_ERROR]
    result = {"limits": limits, "unit": f"ulp of {options.dtype}, relative to rms(truth)"}
    sys.stdout.write(
        json.dumps(result | ({"rows": rows} if options.each else summarise(rows)), indent=2) + "\n"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
