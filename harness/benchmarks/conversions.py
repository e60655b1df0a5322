"""Import and export against `cp -r` of the same bytes: by cache, size, budget and workers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final, Literal

from bridge.reading import DEFAULT_MEMORY_BUDGET
from harness.benchmarks import profile
from harness.benchmarks.process import OURS, Run
from harness.benchmarks.profile import (
    MAX_VERIFY_OF_CP,
    MAX_WALL_OF_CP,
    MIB,
    RSS_ABOVE_BUDGET,
)
from harness.benchmarks.results import Measurement
from harness.benchmarks.trials import Cache, Trial, in_turns, measurement
from harness.benchmarks.workspace import Workspace, size_of

Direction = Literal["import", "export"]

DIRECTIONS: Final[tuple[Direction, ...]] = ("import", "export")
_CP: Final = "cp -r"
_CP_TO_DISK: Final = "cp -r, on disk"
_COPY_AND_SYNC: Final = 'cp -r "$0" "$1" && find "$1" -type f -exec sync {} +'


def measure_import(work: Workspace) -> list[Measurement]:
    """Hugging Face to Megatron at the main size, warm and cold."""
    return _by_cache(work, "import")


def measure_export(work: Workspace) -> list[Measurement]:
    """Megatron to Hugging Face at the main size, warm and cold."""
    return _by_cache(work, "export")


def _by_cache(work: Workspace, direction: Direction) -> list[Measurement]:
    size = work.profile.main_size
    verified = _conversion(work, direction, size, verify="bits")
    plain = _conversion(work, direction, size)
    copies = [_copy(work, direction, size), _copy(work, direction, size, on_disk=True)]
    return [
        *_measure(work, direction, [copies[0], plain, copies[1], verified], size=size),
        *_measure(work, direction, [copies[0], plain], size=size, cache="cold"),
    ]


def measure_sizes(work: Workspace) -> list[Measurement]:
    """Both directions by size of the checkpoint."""
    found = []
    for size in work.profile.sizes:
        trials = [_copy(work, "import", size)]
        trials += [_conversion(work, direction, size) for direction in DIRECTIONS]
        found += _measure(work, "sizes", trials, size=size)
        work.release(size)
    return found


def measure_budgets(work: Workspace) -> list[Measurement]:
    """Both directions by `--memory-budget`, verification included, which has buffers of its own."""
    size, found = work.profile.main_size, []
    for budget in work.profile.budgets:
        trials = [
            _conversion(work, direction, size, verify="bits", budget=budget)
            for direction in DIRECTIONS
        ]
        found += _measure(work, "budgets", trials, size=size, budget=budget)
    return found


def measure_workers(work: Workspace) -> list[Measurement]:
    """Both directions by `--workers`; their memory is that of all of them together."""
    size, found = work.profile.main_size, []
    for workers in work.profile.workers:
        trials = [_copy(work, "import", size)]
        trials += [_conversion(work, direction, size, workers=workers) for direction in DIRECTIONS]
        found += _measure(work, "workers", trials, size=size, workers=workers)
    return found


def _copy(work: Workspace, direction: Direction, size: int, *, on_disk: bool = False) -> Trial:
    """`cp -r` of what the direction reads; `on_disk`, until it would survive a power cut.

    A conversion returns only when its bytes are safe; plain `cp` leaves them in memory.
    """
    source = work.hf(size) if direction == "import" else work.megatron(size)
    target = work.directory / "copy"
    command: Sequence[str | Path] = ("cp", "-r", source, target)
    if on_disk:
        command = ("sh", "-c", _COPY_AND_SYNC, source, target)
    return Trial(
        name=_CP_TO_DISK if on_disk else _CP, command=command, source=source, target=target
    )


def _conversion(
    work: Workspace,
    direction: Direction,
    size: int,
    *,
    verify: Literal["bits", "none"] = "none",
    budget: int = DEFAULT_MEMORY_BUDGET,
    workers: int | None = None,
) -> Trial:
    hf, megatron, target = work.hf(size), work.megatron(size), work.directory / "target"
    paths: list[str | Path] = ["--hf-model", hf, "--megatron-path", target]
    if direction == "export":
        paths = ["--megatron-path", megatron, "--hf-path", target]
    more = ["--verify", verify, "--memory-budget", f"{budget // MIB}MiB", "--json"]
    if workers is not None:
        more += ["--workers", str(workers)]
    return Trial(
        name=f"{direction} --verify {verify}",
        command=[*OURS, direction, *paths, *more],
        source=hf if direction == "import" else megatron,
        target=target,
        tree=workers is not None,
        details=_reported,
    )


def _reported(run: Run) -> Mapping[str, float]:
    """The command's own account of where its time went."""
    report = run.json() or {}
    found = {"convert_seconds": float(report.get("convert_seconds", 0.0))}
    if report.get("verified"):
        found["verify_seconds"] = float(report["verify_seconds"])
    return found


def _measure(
    work: Workspace,
    group: str,
    trials: Sequence[Trial],
    *,
    size: int,
    cache: Cache = "warm",
    budget: int = DEFAULT_MEMORY_BUDGET,
    workers: int | None = None,
) -> list[Measurement]:
    outcomes = in_turns(work, trials, repeats=work.profile.repeats, cache=cache)
    nbytes = size_of(work.hf(size))
    conditions: dict[str, str | int | float] = {"size_bytes": nbytes, "cache": cache}
    if group == "budgets":
        conditions["memory_budget_bytes"] = budget
    if workers is not None:
        conditions["workers"] = workers

    return [
        measurement(
            group, trial, outcomes[trial.name], conditions=conditions, size=nbytes,
            references={}
            if trial.name.startswith(_CP)
            else {"cp": outcomes.get(_CP), "cp_on_disk": outcomes.get(_CP_TO_DISK)},
            plain=outcomes.get(trial.name.replace(" bits", " none"))
            if trial.name.endswith(" bits")
            else None,
            limits=_limits(trial.name, cache, budget, size),
        )
        for trial in trials
    ]  # fmt: skip


def _limits(name: str, cache: Cache, budget: int, size: int) -> Mapping[str, float]:
    if name.startswith(_CP):
        return {}
    bounds = {"peak_rss_bytes": float(budget + RSS_ABOVE_BUDGET)}
    if cache == "warm" and size >= profile.RATIOS_FROM_BYTES:
        bounds["added_ratio_to_cp"] = MAX_VERIFY_OF_CP
        if name.endswith("none"):
            bounds["ratio_to_cp"] = MAX_WALL_OF_CP
    return bounds
