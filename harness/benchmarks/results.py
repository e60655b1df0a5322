"""What was measured, as data: the one form that tables, figures and JSON are made from."""

from __future__ import annotations

import functools
import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final, Literal

from harness.benchmarks.arithmetic import Line, fit, spread

SCHEMA_VERSION: Final = 1
NOISY: Final = 0.3
"""A copy that varies by more than this share of its median tells of a busy machine."""
_PLAIN: Final = ("cp", "read")
"""How copies begin, which nothing of ours has a part in."""

_SCHEMA: Final = Path(__file__).with_name("bench.schema.json")

Status = Literal["measured", "failed", "not run"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Limit:
    """What a value may be at most.

    Args:
        name: A key of the measurement's `values`.
        value: What was measured.
        limit: What it may be.
    """

    name: str
    value: float
    limit: float

    @property
    def met(self) -> bool:
        """Whether it is kept."""
        return self.value <= self.limit


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    """One thing that was measured, or could not be.

    Args:
        group: What `--only` calls it.
        name: What ran, such as `import --verify none`.
        conditions: What it ran under: `size_bytes`, `cache`, `memory_budget_bytes`, `workers`,
            `batch`, `sequence`, `dtype`.
        status: `not run` is no failure, and has its reason.
        reason: Why there is no figure.
        samples: Seconds of each run.
        values: Everything else, each with its unit in its name; medians over the runs, of memory
            the largest.
        limits: Which of the values have one.
    """

    group: str
    name: str
    conditions: Mapping[str, str | int | float] = field(default_factory=dict)
    status: Status = "measured"
    reason: str = ""
    samples: Sequence[float] = ()
    values: Mapping[str, float] = field(default_factory=dict)
    limits: Sequence[Limit] = ()

    @property
    def median_seconds(self) -> float | None:
        """None without a sample."""
        return statistics.median(self.samples) if self.samples else None

    def to_dict(self) -> dict[str, Any]:
        """As the schema has it."""
        return {
            "group": self.group,
            "name": self.name,
            "conditions": dict(self.conditions),
            "status": self.status,
            "reason": self.reason,
            "samples": list(self.samples),
            "median_seconds": self.median_seconds,
            "spread": spread(self.samples) if self.samples else None,
            "values": dict(self.values),
            "limits": [asdict(one) | {"met": one.met} for one in self.limits],
        }


def not_run(group: str, name: str, reason: str) -> list[Measurement]:
    """A group that cannot be measured here, and why."""
    return [Measurement(group=group, name=name, status="not run", reason=reason)]


def fits(measurements: Sequence[Measurement]) -> dict[str, Line]:
    """Time over size of everything that the group `sizes` measured, by name."""
    points: dict[str, list[tuple[float, float]]] = {}
    for one in measurements:
        if one.group == "sizes" and one.median_seconds is not None:
            size = float(one.conditions["size_bytes"]) / 1e9
            points.setdefault(one.name, []).append((size, one.median_seconds))
    lines = {name: fit(*zip(*found, strict=True)) for name, found in points.items()}
    return {name: line for name, line in lines.items() if line is not None}


def notes(measurements: Sequence[Measurement]) -> list[str]:
    """What a reader must know before believing a ratio."""
    worst: dict[tuple[str, str], float] = {}
    for one in measurements:
        for name in _PLAIN:
            if one.name.startswith(name) and one.samples:
                key = name, str(one.conditions.get("cache", "warm"))
                worst[key] = max(worst.get(key, 0.0), spread(one.samples))
    return [
        f"noisy machine: {name} itself varied by up to {share:.0%} with a {cache} cache"
        for (name, cache), share in worst.items()
        if share > NOISY
    ]


def results(
    measurements: Sequence[Measurement],
    *,
    started: str,
    seconds: float,
    command: Sequence[str],
    profile: Mapping[str, Any],
    machine: Mapping[str, Any],
    environment: Mapping[str, Any],
    code_sha256: str,
) -> dict[str, Any]:
    """Everything that one run found; valid by the published schema.

    Args:
        measurements: In the order of the tables.
        started: ISO 8601 with a zone.
        seconds: Of the whole run.
        command: As it was typed.
        profile: See `harness.benchmarks.profile.Profile`.
        machine: See `harness.benchmarks.machine.describe`.
        environment: Versions, see `harness.report.evidence.versions`.
        code_sha256: See `harness.report.digests.code_sha256`.
    """
    limits = [limit for one in measurements for limit in one.limits]
    data = {
        "schema_version": SCHEMA_VERSION,
        "started": started,
        "seconds": round(seconds, 3),
        "command": list(command),
        "profile": dict(profile),
        "machine": dict(machine),
        "environment": dict(environment),
        "code_sha256": code_sha256,
        "counts": {
            "measured": sum(one.status == "measured" for one in measurements),
            "failed": sum(one.status == "failed" for one in measurements),
            "not_run": sum(one.status == "not run" for one in measurements),
            "limits_met": sum(limit.met for limit in limits),
            "limits_not_met": sum(not limit.met for limit in limits),
        },
        "notes": notes(measurements),
        "fits": {name: asdict(line) for name, line in fits(measurements).items()},
        "measurements": [one.to_dict() for one in measurements],
    }
    _validator().validate(data)
    return data


@functools.cache
def _validator() -> Any:  # noqa: ANN401 - jsonschema's validators are made at run time
    from jsonschema import Draft202012Validator

    return Draft202012Validator(json.loads(_SCHEMA.read_text("utf-8")))
