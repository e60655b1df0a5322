"""Megatron-Core's own loader and saver, against the bridge's.

Our checkpoint goes into a live GPTModel through `dist_checkpointing.load`, strict, and must equal
what the bridge loads; a checkpoint that `dist_checkpointing.save` wrote is exported by the bridge
and must give the source's tensors again.
"""

from __future__ import annotations

from bridge.errors import CheckpointError
from harness import live
from harness.bench import Bench
from harness.checks.round_trip import plan_of
from harness.compare import Finding, exact, read_safetensors, tensor_differences
from harness.stored import in_megatron
from harness.suite import Case


def run(case: Case, bench: Bench) -> Finding:
    """Load ours, save theirs, export it, compare all of it bit by bit."""
    request = bench.request(case)
    hf, ours = bench.checkpoint(case), bench.converted(case)
    iteration = next(ours.glob("iter_*"))
    ranks = bench.run(case, request.layout, live.load_by_megatron, request, iteration)
    problems, compared = live.summed(ranks)
    theirs = bench.fresh(f"{case.model}-saved-by-megatron")
    bench.run(case, request.layout, live.save_by_megatron, request, theirs)
    try:
        back = bench.exported(case, theirs, hf_model=hf)
    except CheckpointError as error:
        problems += [f"export of Megatron-Core's own: {error.message}", *error.where]
        return exact(problems, compared=compared, what="elements")
    found, elements, count = tensor_differences(
        read_safetensors(back),
        read_safetensors(hf),
        names=("the export of Megatron-Core's own", "the source"),
    )
    if elements:
        plan = plan_of(bench, case, bench.spec(case))
        found += [in_megatron(plan, name, index) for name, index in elements]
    problems += found
    if (back / "config.json").read_bytes() != (hf / "config.json").read_bytes():
        problems.append("config.json: not the source's")
    return exact(problems, compared=compared + count, what="elements, loaded and saved by Megatron")
