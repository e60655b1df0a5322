"""False alarms: healthy random models through every check. Any failure is the harness's own.

A check that cries wolf is switched off within a week, and then kills nothing. So random models of
every kind, in random layouts, must pass all checks, and what does not is written down to be run
again.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from harness.bench import Bench, Subject
from harness.checks import CHECKS
from harness.replay import MODEL_NAME, Replay, save_replay, write_model
from harness.runner import in_running_order, run_case
from harness.samples import Sample, draw_samples
from harness.suite import ON_CPU, Case, Compute
from harness.workers import over_benches

CHECKED: Final = tuple(name for name in CHECKS if name != "golden")
"""Random models have nothing on record."""
_PROBES: Final = {"layouts": ("long",)}
"""Elsewhere both probes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Alarm:
    """A healthy model that failed a check."""

    number: int
    replay: Replay
    config: dict[str, Any]
    summary: str


@dataclass(frozen=True, slots=True, kw_only=True)
class AlarmsReport:
    """What became of the models of a run."""

    models: int
    cases: int
    features: dict[str, int]
    """How many of the models had each feature of `harness.features`."""
    alarms: Sequence[Alarm]
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Plain data for `--json`."""
        return {
            "models": self.models,
            "cases": self.cases,
            "alarms": [
                {
                    "model": alarm.number,
                    "case": alarm.replay.case.id,
                    "summary": alarm.summary,
                }
                for alarm in self.alarms
            ],
            "features": self.features,
            "seconds": round(self.seconds, 1),
        }


def run_alarms(
    count: int,
    *,
    start: int = 0,
    checks: Sequence[str] = (),
    compute: Compute = ON_CPU,
    workers: int | None = None,
    timeout: float = 120.0,
    on_model: Callable[[int, Sequence[Alarm]], None] = lambda _done, _alarms: None,
) -> AlarmsReport:
    """Run random healthy models through the checks.

    Args:
        count: How many models.
        start: Another number draws other models.
        checks: Names; none for all that need nothing on record.
        compute: In what, where, and by which layers.
        workers: Processes; see `over_benches`.
        timeout: Seconds a case may take.
        on_model: Called as each model ends, with how many have and its alarms.
    """
    started = time.monotonic()
    models = draw_samples(count, start=start)
    looking = tuple(checks) or CHECKED
    features: dict[str, int] = {}
    for model in models:
        for feature in sorted(model.features):
            features[feature] = features.get(feature, 0) + 1
    arguments = [(number, model, looking, compute) for number, model in enumerate(models)]
    alarms: list[Alarm] = []
    cases = 0
    ended = over_benches(run_model, arguments, workers=workers, timeout=timeout)
    for done, (_, (ran, found)) in enumerate(ended, start=1):
        cases += ran
        alarms += found
        on_model(done, found)
    return AlarmsReport(
        models=len(models),
        cases=cases,
        features=features,
        alarms=sorted(alarms, key=lambda alarm: alarm.number),
        seconds=time.monotonic() - started,
    )


def run_model(
    bench: Bench, number: int, sample: Sample, checks: Sequence[str], compute: Compute
) -> tuple[int, list[Alarm]]:
    """Run one model through the checks; how many cases, and its alarms."""
    root = Path(tempfile.mkdtemp(prefix="alarm-", dir=bench.workdir))
    alarms = []
    try:
        path = write_model(sample.config, root / "model" / "hf", seed=sample.seed)
        mine = bench.beside(root, {MODEL_NAME: Subject(name=MODEL_NAME, hf=path)})
        cases = in_running_order(_cases(sample, checks, compute))
        for case in cases:
            result = run_case(case, mine)
            if result.status != "passed":
                alarms.append(
                    Alarm(
                        number=number,
                        replay=Replay(
                            check=case.check, layout=case.layout, probe=case.probe,
                            dtype=case.dtype, seed=sample.seed, device=case.device,
                            layers=case.layers,
                        ),
                        config=dict(sample.config),
                        summary=f"{result.status}: {result.summary}\n{result.traceback}".rstrip(),
                    )
                )  # fmt: skip
    finally:
        shutil.rmtree(root, ignore_errors=True)
    return len(cases), alarms


def _cases(sample: Sample, checks: Sequence[str], compute: Compute) -> list[Case]:
    return [
        compute.case(
            name,
            MODEL_NAME,
            layout=sample.layout if "layout" in CHECKS[name].axes else None,
            probe=probe,
        )
        for name in checks
        for probe in (
            _PROBES.get(name, ("short", "long")) if "probe" in CHECKS[name].axes else (None,)
        )
    ]


def write_down(alarm: Alarm, directory: Path) -> str:
    """Keep an alarm; the command that runs it again."""
    name = f"alarm-{alarm.number:04d}-{alarm.replay.check}"
    return save_replay(directory / name, alarm.config, alarm.replay, summary=alarm.summary)
