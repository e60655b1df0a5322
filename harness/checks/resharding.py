"""Resharding: what is cut for one layout loads at another, by the bridge and by Megatron-Core.

At the case's layout, on real ranks:

1. The bridge's files cut for each of several layouts load, by the bridge, to exactly what the
   Hugging Face checkpoint loads to, with zeros where the vocabulary is padded.
2. They load in Megatron-Core's own `dist_checkpointing.load`, strict, to the same: the ones cut
   for this TP, and ones whose vocabulary is padded otherwise.
3. What Megatron-Core itself has saved at one rank loads here by the bridge.
4. What Megatron-Core itself saves here is exported by the bridge to the source's files.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Final

from bridge.errors import CheckpointError
from bridge.spec import ParallelLayout
from harness import live, live_resharding
from harness.bench import BASE_LAYOUT, Bench
from harness.checks.round_trip import plan_of
from harness.compare import Finding, exact, read_safetensors, tensor_differences
from harness.layouts import fits
from harness.stored import in_megatron
from harness.suite import Case

SOURCES: Final = (BASE_LAYOUT, "tp2-pp1", "tp1-pp2", "tp2-pp2", "tp4-pp1")
"""Layouts that files are cut for, as far as the model can be cut so."""


def run(case: Case, bench: Bench) -> Finding:
    """Load ours, load theirs, export theirs; compare all of it bit by bit."""
    given = bench.subject(case.model).megatron is not None
    spec = bench.spec(case)
    # Bits are compared, so nothing may be rounded on the way: the dtype is the file's.
    request = replace(
        bench.request(case), kind="hf", path=bench.checkpoint(case), params_dtype=spec.params_dtype
    )
    ours = {
        f"files cut for {name}": bench.converted(case, layout=name)
        for name in SOURCES
        if fits(name, spec)
    }
    saved = {}
    # A user's own checkpoint is held against the source by `round_trip`, and may not equal it.
    if request.layout.name != BASE_LAYOUT and not given:
        saved = {
            f"Megatron-Core's own of {BASE_LAYOUT}": bench.saved_by_megatron(case, BASE_LAYOUT)
        }
    bridge = bench.run(
        case, request.layout, live_resharding.load_by_bridge, request, {**ours, **saved}
    )
    problems, compared = live.summed(bridge)
    if not problems:  # Megatron-Core does not say what is wrong with a file: it throws
        strict = {name: next(path.glob("iter_*")) for name, path in _strict(ours, request.layout)}
        megatron = bench.run(
            case, request.layout, live_resharding.load_by_megatron, request, strict
        )
        found, count = live.summed(megatron)
        problems, compared = problems + found, compared + count
    found, count = _exported(case, bench, bench.saved_by_megatron(case))
    return exact(
        [*problems, *found],
        compared=compared + count,
        what="elements, loaded and saved by the bridge and by Megatron-Core",
        details={"loaded_from": [*ours, *saved], "ranks": request.layout.world_size},
    )


def _strict(ours: Mapping[str, Path], layout: ParallelLayout) -> list[tuple[str, Path]]:
    """The sources for Megatron-Core: one cut for this TP, and the first that is cut otherwise."""
    tp = f"tp{layout.tensor_model_parallel_size}-"
    same = [item for item in ours.items() if tp in item[0]]
    pp = f"-pp{layout.pipeline_model_parallel_size}"
    best = [item for item in same if item[0].endswith(pp)] or same
    others = [item for item in ours.items() if tp not in item[0]]
    return best[:1] + others[:1]


def _exported(case: Case, bench: Bench, theirs: Path) -> tuple[list[str], int]:
    """Export what Megatron-Core saved, and compare with the source: tensors and configuration."""
    hf = bench.checkpoint(case)
    try:
        back = bench.exported(case, theirs, hf_model=hf)
    except CheckpointError as error:
        return [f"export of Megatron-Core's own: {error.message}", *error.where], 0
    problems, elements, compared = tensor_differences(
        read_safetensors(back),
        read_safetensors(hf),
        names=("the export of Megatron-Core's own", "the source"),
    )
    if elements:
        plan = plan_of(bench, case, bench.spec(case))
        problems += [in_megatron(plan, name, index) for name, index in elements]
    if (back / "config.json").read_bytes() != (hf / "config.json").read_bytes():
        problems.append("config.json: not the source's")
    return problems, compared
