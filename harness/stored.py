"""A Megatron checkpoint against the Hugging Face one: every element, bit by bit."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Final

from bridge.agreement import spec_differences, spec_of_args
from bridge.comparison import compare
from bridge.errors import BridgeError, ConfigError
from bridge.padding import nonzero_padding
from bridge.plan import Plan, account_for
from bridge.record import read_record
from bridge.spec import ModelSpec
from bridge.storage.megatron import MegatronSource
from bridge.storage.safetensors import SafetensorsSource
from bridge.transfer import TransferLimits
from harness.bench import Bench
from harness.compare import Finding, exact
from harness.recorded import changed_since_import, record_differences
from harness.suite import Case

_PARTS: Final = {
    "q_proj": "queries",
    "k_proj": "key",
    "v_proj": "value",
    "gate_proj": "gate",
    "up_proj": "up",
}


def against_source(case: Case, bench: Bench, megatron: Path) -> Finding:
    """Compare a Megatron checkpoint of the case's model with the Hugging Face one."""
    hf, spec = bench.checkpoint(case), bench.spec(case)
    with MegatronSource(megatron) as actual, SafetensorsSource(hf) as expected:
        with bench.fault.changed_code():
            plan = Plan.of_checkpoint(spec, actual.tensors)
            record = read_record(actual.root)
            values = [*record_differences(case, bench, actual, record), *_values(actual, spec)]
            files = changed_since_import(actual, record)
            try:
                account_for(plan.hf_shapes, expected.tensors, where=str(hf))
                account_for(plan.mcore_shapes, actual.tensors, where=str(megatron))
            except BridgeError as error:
                return exact(
                    [*values, *files, error.message, *error.where], compared=0, what="elements"
                )
            digests = compare(
                expected,
                actual,
                plan.mcore_to_hf,
                limits=TransferLimits(),
                advance=lambda _nbytes: None,
            )
            padding = nonzero_padding(plan, actual)
        # What training has made of rows that no token has is its own business; an import wrote
        # zeros there. In Megatron they take part in the softmax of a training step.
        imported = record is not None and record.iteration == actual.iteration
        tensors = [
            f"{digest.name}{list(digest.first_difference)}: {digest.num_different} elements "
            f"differ, this one first; {in_megatron(plan, digest.name, digest.first_difference)}"
            for digest in digests
            if digest.first_difference is not None
        ]
        elements = sum(digest.num_different for digest in digests)
    compared = sum(math.prod(shape) for shape in plan.hf_shapes.values())
    wrong_padding = padding if imported else []
    found = exact(
        [*values, *files, *tensors, *wrong_padding],
        compared=compared,
        what="elements, bit for bit",
        details={"nonzero_padding": padding},
    )
    if found.passed:
        return found
    # Each kind of difference in its own unit: a tensor is no element.
    counts = [
        f"{number} {one if number == 1 else many}"
        for number, one, many in (
            (len(values), "value of the model differs", "values of the model differ"),
            (
                len(files),
                "kept file is not the imported one",
                "kept files are not the imported ones",
            ),
            (len(tensors), "tensor differs", "tensors differ"),
            (len(wrong_padding), "padded tensor is not zero", "padded tensors are not zero"),
        )
        if number
    ]
    counts.append(f"{elements:,} of {compared:,} elements differ (limit 0)")
    return dataclasses.replace(found, summary=f"{', '.join(counts)}: {found.places[0]}")


def _values(source: MegatronSource, spec: ModelSpec) -> list[str]:
    """How the checkpoint's own account of its model differs, where it gives one."""
    try:
        said = spec_of_args(source, spec)
    except ConfigError as error:
        return [f"{error.message}: {place}" for place in error.where] or [error.message]
    if said is None:
        return []
    differences = spec_differences(spec, said, names=("config.json", "the checkpoint's args"))
    return [f"{source.args_where}: {difference}" for difference in differences]


def in_megatron(plan: Plan, name: str, index: tuple[int, ...]) -> str:
    """Where an HF element is in Megatron's tensors: the element, and the rows it belongs to."""
    tiles = plan.mcore_to_hf[name].tiles
    for number, tile in enumerate(tiles):
        inside = all(
            a <= i < b
            for a, i, b in zip(tile.target_box.starts, index, tile.target_box.stops, strict=True)
        )
        if inside:
            target, at = plan.mcore_to_hf[name].locate(index)
            first, last = tile.source_box.starts[0], tile.source_box.stops[0] - 1
            part = _PARTS.get(name.rpartition(".weight")[0].rpartition(".")[2], "")
            if part and target is not None and target.endswith("linear_qkv.weight"):
                part = f" = query group {number}'s {part}"
            elif part:
                part = f" = {part}"
            return f"in {target}{list(at)}, rows {first}-{last}{part}"
    return f"nowhere in Megatron's tensors: {name}{list(index)}"
