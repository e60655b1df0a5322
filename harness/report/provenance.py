"""What a run is of, and what it was made with: for its journal, and for its evidence."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bridge.console import RichProgress
from harness.report.digests import (
    code_sha256,
    digest_of,
    identity,
    megatron_files,
    sha256_of,
    weight_files,
)
from harness.report.evidence import Provenance, thresholds_as_data, versions
from harness.report.machine import hardware
from harness.thresholds import Thresholds
from harness.torchrun.lead import torchrun_ranks

if TYPE_CHECKING:
    from harness.bench import Bench, Subject
    from harness.suite import Case


def checkpoint_identities(subjects: Mapping[str, Subject]) -> dict[str, dict[str, Any]]:
    """What identifies the user's checkpoints; reading a big one takes time, so it is shown."""
    found = {}
    for name, subject in subjects.items():
        if subject.hf is None:
            continue
        paths = [*weight_files(subject.hf), *megatron_files(subject.megatron)]
        total = sum(path.stat().st_size for path in paths)
        with RichProgress().phase(f"hashing {name}", total) as advance:
            found[name] = identity(subject.hf, subject.megatron, advance=advance)
    return found


def toy_identities(cases: Sequence[Case], bench: Bench) -> dict[str, dict[str, Any]]:
    """What identifies the toys that were written, by name and dtype."""
    toys = {f"{one.model}/{one.dtype}": one for one in cases if one.model not in bench.subjects}
    return {name: identity(bench.checkpoint(case)) for name, case in toys.items()}


def run_identity(
    cases: Sequence[Case],
    subjects: Mapping[str, Subject],
    suite: str | None,
    inputs: Mapping[str, Any],
    thresholds: Thresholds,
) -> dict[str, Any]:
    """What a run must share with the one it resumes. Toys are code."""
    return {
        "suite": suite,
        "cases": sorted(case.id for case in cases),
        "code": code_sha256(),
        "thresholds": digest_of(thresholds_as_data(thresholds)),
        "inputs": inputs,
        "options": {name: _options(subject) for name, subject in subjects.items()},
        "gpus": _gpus(cases),
        # How many threads there are moves the order of sums, not what is judged.
        "versions": {name: one for name, one in versions().items() if name != "num_threads"},
    }


def _gpus(cases: Sequence[Case]) -> list[str]:
    """The kinds of card that cases are run on, if any is."""
    if all(case.device == "cpu" for case in cases):
        return []
    return sorted(set(hardware()["gpus"]))


def _options(subject: Subject) -> dict[str, Any]:
    """How a model is looked at: its fields but for the checkpoints, which have digests."""
    found: dict[str, Any] = {}
    for field in dataclasses.fields(subject):
        value = getattr(subject, field.name)
        if field.name in ("hf", "megatron"):
            continue
        is_file = isinstance(value, Path) and value.is_file()
        found[field.name] = sha256_of(value) if is_file else str(value)
    return found


def provenance(
    *,
    suite: str | None,
    started: str,
    inputs: Mapping[str, Mapping[str, Any]],
    thresholds: Thresholds,
    memory: Mapping[str, int],
    resumed_cases: int,
    products: Mapping[str, float],
) -> Provenance:
    """What this run was made from and on; see `Provenance` for the arguments.

    Args:
        suite: Its name.
        started: When.
        inputs: What it was run on.
        thresholds: In force.
        memory: Peaks.
        resumed_cases: Settled by an earlier part.
        products: Measured errors of float32 products on a GPU, where one is used.
    """
    ranks = torchrun_ranks()
    return Provenance(
        command=["nemotron-bridge", *sys.argv[1:]],  # what can be typed again, wherever it lies
        suite=suite,
        started=started,
        inputs=inputs,
        environment=versions(),
        hardware=hardware()
        | ({"float32_product_ulp": dict(products)} if products else {})
        | ({} if ranks is None else {"ranks_per_host": ranks.per_host}),
        code_sha256=code_sha256(),
        thresholds=thresholds,
        memory=memory,
        resumed_cases=resumed_cases,
    )
