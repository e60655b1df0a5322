"""A workspace whose checkpoints are toys, and canned results."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from harness.benchmarks.profile import QUICK
from harness.benchmarks.results import Limit, Measurement, results
from harness.benchmarks.workspace import Workspace
from harness.toys import toy_named, write_checkpoint

SIZE = 1_000_000


@pytest.fixture
def work(tmp_path: Path) -> Workspace:
    """Whatever is measured, it is one run of each at one size, of which nothing is made yet."""
    profile = replace(QUICK, sizes=(SIZE,), budgets=(128 << 20,), repeats=1, start_repeats=1)
    lines: list[str] = []
    return Workspace(directory=tmp_path, profile=profile, say=lines.append)


@pytest.fixture(scope="session")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A toy's checkpoint, which nobody changes."""
    path = tmp_path_factory.mktemp("benchmarks") / "toy"
    write_checkpoint(toy_named("nano-4b"), path, dtype="bfloat16")
    return path


@pytest.fixture
def toys(work: Workspace, toy: Path) -> Workspace:
    """A workspace whose checkpoint of the main size is a toy."""
    shutil.copytree(toy, work.directory / f"hf-{SIZE}")
    work._made.add(work.directory / f"hf-{SIZE}")
    return work


@pytest.fixture
def measurements() -> list[Measurement]:
    """`cp` and import at three sizes, one budget too small, a failure, and something left out."""
    found = []
    for size, copy, import_ in ((500, 0.25, 1.0), (2000, 1.0, 1.75), (8000, 4.0, 4.75)):
        conditions: dict[str, str | int | float] = {"size_bytes": size * 10**6, "cache": "warm"}
        found += [
            Measurement(
                group="sizes", name="cp -r", conditions=conditions,
                samples=(copy, copy * 0.9, copy * 1.5), values={"gb_per_second": 2.0},
            ),
            Measurement(
                group="sizes", name="import --verify none", conditions=conditions,
                samples=(import_,) * 3,
                values={
                    "ratio_to_cp": import_ / copy, "peak_rss_bytes": float(1 << 30),
                    "gb_per_second": size / import_ / 1000,
                },
                limits=(Limit(name="ratio_to_cp", value=import_ / copy, limit=1.5),),
            ),
        ]  # fmt: skip
    found += [
        Measurement(
            group="budgets", name="import --verify bits",
            conditions={
                "size_bytes": 8 * 10**9, "cache": "warm", "memory_budget_bytes": 128 << 20
            },
            samples=(6.0,), values={"peak_rss_bytes": float(700 << 20), "gb_per_second": 1.33},
            limits=(
                Limit(name="peak_rss_bytes", value=float(700 << 20), limit=float(640 << 20)),
            ),
        ),
        Measurement(group="load", name="load", status="failed", reason="exit code 1: a | b"),
        Measurement(group="peer", name="Megatron-Bridge", status="not run", reason="not installed"),
    ]  # fmt: skip
    return found


@pytest.fixture
def data(measurements: list[Measurement]) -> dict[str, Any]:
    """The results of such a run."""
    return results(
        measurements,
        started="2026-01-02T03:04:05+00:00",
        seconds=61.0,
        command=["nemotron-bridge", "bench"],
        profile={"name": "quick", "sizes": [1], "budgets": [1], "workers": [1], "repeats": 3},
        machine={
            "cpu": "A CPU",
            "cores": 2,
            "memory_bytes": 1 << 34,
            "gpus": [],
            "system": "Linux",
            "filesystem": "ext4",
            "load_average": [0.5, 0.25, 0.125],
            "omp_num_threads": None,
        },
        environment={
            "nemotron-bridge": "0.1.0",
            "python": "3.11.7",
            "versions": {"torch": "2.13.0", "transformer-engine": None},
        },
        code_sha256="0123456789abcdef" * 4,
    )
