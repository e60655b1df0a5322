"""Hugging Face to torch_dist and back: the same bits in the middle, the same files at the end.

A user's own Megatron checkpoint is held against the source bit by bit, and not exported: what an
export of it gives is the user's business.
"""

from __future__ import annotations

import json
from pathlib import Path

from bridge.errors import CheckpointError
from bridge.plan import Plan
from bridge.spec import ModelSpec
from bridge.storage.target import MANIFEST_NAME
from harness.bench import BASE_LAYOUT, Bench
from harness.compare import Finding, exact, read_safetensors, tensor_differences
from harness.stored import against_source, in_megatron
from harness.suite import Case


def run(case: Case, bench: Bench) -> Finding:
    """Import for the case's layout, compare, export, compare directories."""
    source, given = bench.checkpoint(case), bench.subject(case.model).megatron
    megatron = given or bench.converted(case, layout=case.layout or BASE_LAYOUT)
    middle = against_source(case, bench, megatron)
    if given is not None or not middle.passed:
        return middle
    spec = bench.spec(case)
    plan = plan_of(bench, case, spec)
    try:
        back = bench.exported(case, megatron)
    except CheckpointError as error:
        return _refused(case, bench, megatron, plan, error)
    return directories(source, back, spec, plan)


def _refused(
    case: Case, bench: Bench, megatron: Path, plan: Plan, error: CheckpointError
) -> Finding:
    """The bridge noticed by itself that it cannot give the source back; say where it differs."""
    refusal = [f"export refused: {error.message}", *error.where]
    source = bench.checkpoint(case)
    try:
        back = bench.exported(case, megatron, hf_model=source)  # as it is, damage and all
    except CheckpointError:
        return exact(refusal, compared=0, what="tensors")
    problems, compared = _tensor_problems(back, source, plan)
    details = {"export refused": refusal}
    return exact(problems or refusal, compared=compared, what="elements", details=details)


def plan_of(bench: Bench, case: Case, spec: ModelSpec) -> Plan:
    """The conversion's plan, to say where in Megatron's tensors an element lies."""
    layout = bench.layout(case)
    with bench.fault.changed_code():
        return Plan(
            spec,
            spec.padded_vocab_size(
                layout.tensor_model_parallel_size,
                make_vocab_size_divisible_by=layout.make_vocab_size_divisible_by,
            ),
        )


def directories(source: Path, back: Path, spec: ModelSpec, plan: Plan) -> Finding:
    """Compare two checkpoint directories file by file, tensor by tensor where a weight differs."""
    theirs, ours = _files(source), _files(back)
    problems = [
        *(f"{name}: lost" for name in sorted(theirs.keys() - ours.keys())),
        *(f"{name}: not in the source" for name in sorted(ours.keys() - theirs.keys())),
    ]
    differing = [
        name
        for name in sorted(theirs.keys() & ours.keys())
        if not _equal_bytes(theirs[name], ours[name])
    ]
    if any(name.endswith(".safetensors") for name in differing):
        problems += _tensor_problems(back, source, plan)[0]
    problems += [f"{name}: {_how(theirs[name], ours[name])}" for name in differing]
    size = sum(path.stat().st_size for path in theirs.values())
    return exact(
        problems,
        compared=len(theirs),
        what=f"files of {spec.num_layers} layers, byte for byte",
        details={"files": len(theirs), "nbytes": size},
    )


def _tensor_problems(back: Path, source: Path, plan: Plan) -> tuple[list[str], int]:
    """Every tensor that differs, with its place on both sides, and how many elements were held."""
    found, elements, compared = tensor_differences(
        read_safetensors(back), read_safetensors(source), names=("the export", "the source")
    )
    located = dict(elements)
    problems = []
    for problem in found:
        name = problem.partition("[")[0]
        tile = f"; {in_megatron(plan, name, located[name])}" if name in located else ""
        problems.append(problem + tile)
    return problems, compared


def _files(directory: Path) -> dict[str, Path]:
    """Of the model: a manifest is each conversion's own, of files that are compared here."""
    return {
        str(path.relative_to(directory)): path
        for path in directory.rglob("*")
        if path.is_file() and path.name != MANIFEST_NAME
    }


def _equal_bytes(a: Path, b: Path) -> bool:
    if a.stat().st_size != b.stat().st_size:
        return False
    with a.open("rb") as first, b.open("rb") as second:
        while True:
            left, right = first.read(1 << 22), second.read(1 << 22)
            if left != right:
                return False
            if not left:
                return True


def _how(source: Path, back: Path) -> str:
    if source.suffix != ".json":
        return "bytes differ"
    try:
        same = json.loads(source.read_bytes()) == json.loads(back.read_bytes())
    except ValueError:
        return "bytes differ"
    return "bytes differ, the JSON is equal" if same else "the JSON differs"
