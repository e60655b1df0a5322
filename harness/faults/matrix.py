"""The kill matrix: every fault against every check, on several toys.

A unit is one fault on one toy in one dtype. Its cases are those of `MATRIX_CASES` whose check can
see one of the fault's seams (`Check.sees`); what it cannot see it cannot kill, which a test holds
the checks to. On the first toy that a fault applies to every check looks; on the others it is
enough that two have killed it, since neither survival nor the need for a check can hang on a third.
Units run in a few processes, each with rank processes of its own. A fault that no check kills on a
toy that it applies to, in any of the dtypes, survives; a check that kills nothing is no check.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from bridge.errors import UsageError
from harness.bench import Bench
from harness.checks import CHECKS
from harness.faults import CATALOGUE, applicable, fault_named
from harness.hooks import Fault, seams_of
from harness.layouts import fits
from harness.runner import Result, in_running_order, run_case
from harness.suite import ON_CPU, Case, Compute
from harness.workers import over_benches

DEFAULT_TOYS: Final = ("51b", "super-49b-v1_5", "tied")
ENOUGH: Final = 2
"""Killers after which a unit may end."""
_MAIN: Final = "tp2-pp2-vp2"
MATRIX_CASES: Final[Sequence[tuple[str, str | None, str | None]]] = (
    ("config", None, None),
    ("round_trip", "tp1-pp1", None),
    ("placement", "tp1-pp1", None),
    ("placement", _MAIN, None),
    ("resharding", "tp2-pp1", None),
    ("rope", _MAIN, None),
    ("logits", "tp1-pp1", "long"),
    ("logits", _MAIN, "short"),
    ("logits", _MAIN, "long"),
    ("layouts", _MAIN, "long"),
    ("layouts", "tp2-pp1", "short"),
    ("blocks", "tp1-pp1", "long"),
    ("blocks", _MAIN, "short"),
    ("gradients", _MAIN, None),
    ("gradients", "tp2-pp1-sp", None),
    ("generation", "tp2-pp1", None),
    ("golden", None, None),
)
"""(check, layout, probe): TP, PP and VPP at once, one rank alone, and sequence parallelism."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Unit:
    """One fault on one toy in one dtype, and what became of its cases."""

    fault: str
    toy: str
    killed_by: tuple[str, ...]
    """Checks that failed or refused."""
    first: str
    """What the first of them said."""
    checks: tuple[str, ...]
    """Checks that looked."""
    seconds: float
    seconds_by_check: Mapping[str, float] = field(default_factory=dict)
    dtype: str = "float32"


@dataclass(frozen=True, slots=True, kw_only=True)
class Matrix:
    """All units of a run."""

    units: Sequence[Unit]
    checks: Sequence[str]
    seconds: float
    faults: Sequence[str] = field(default_factory=tuple)

    @property
    def dtypes(self) -> list[str]:
        """What faults were tried in."""
        return list(dict.fromkeys(unit.dtype for unit in self.units))

    @property
    def killed_by(self) -> dict[str, list[str]]:
        """Per fault the checks that killed it on some toy, in the order of the registry."""
        return self.killed_in(None)

    def killed_in(self, dtype: str | None) -> dict[str, list[str]]:
        """The same in one dtype; None for any of them."""
        found: dict[str, set[str]] = {name: set() for name in self.faults}
        for unit in self.units:
            if dtype in (None, unit.dtype):
                found[unit.fault].update(unit.killed_by)
        return {
            name: [check for check in self.checks if check in killers]
            for name, killers in found.items()
        }

    @property
    def survivors(self) -> list[str]:
        """Faults that some toy let through in every dtype, and those that no toy was there for."""
        killers = self._killers
        alive = {fault for (fault, _), found in killers.items() if not found}
        tried = {fault for fault, _ in killers}
        return [name for name in self.faults if name in alive or name not in tried]

    @property
    def idle_checks(self) -> list[str]:
        """Checks that killed nothing."""
        busy = {check for killers in self.killed_by.values() for check in killers}
        return [check for check in self.checks if check not in busy]

    @property
    def indispensable(self) -> dict[str, list[str]]:
        """Per check the faults that would survive somewhere without it."""
        found: dict[str, list[str]] = {check: [] for check in self.checks}
        for (fault, _), killers in self._killers.items():
            if len(killers) == 1:
                (check,) = killers
                if fault not in found[check]:
                    found[check].append(fault)
        return found

    @property
    def _killers(self) -> dict[tuple[str, str], set[str]]:
        """What killed a fault on a toy, in whichever dtype."""
        found: dict[tuple[str, str], set[str]] = {}
        for unit in self.units:
            found.setdefault((unit.fault, unit.toy), set()).update(unit.killed_by)
        return found

    @property
    def redundant_checks(self) -> list[str]:
        """Checks without which nothing would survive."""
        return [check for check, faults in self.indispensable.items() if not faults]

    def to_dict(self) -> dict[str, Any]:
        """Plain data, as `nemotron-bridge faults --json` prints it."""
        return {
            "faults": list(self.faults),
            "checks": list(self.checks),
            "killed_by": self.killed_by,
            "killed_by_dtype": {dtype: self.killed_in(dtype) for dtype in self.dtypes},
            "survivors": self.survivors,
            "idle_checks": self.idle_checks,
            "redundant_checks": self.redundant_checks,
            "only_killed_by": self.indispensable,
            "toys": sorted({unit.toy for unit in self.units}),
            "families": {name: CATALOGUE[name].family for name in self.faults},
            "stands_for": {name: CATALOGUE[name].stands_for for name in self.faults},
            "seconds_by_check": {
                check: round(sum(unit.seconds_by_check.get(check, 0.0) for unit in self.units), 1)
                for check in self.checks
            },
            "units": [
                {
                    "fault": unit.fault,
                    "toy": unit.toy,
                    "dtype": unit.dtype,
                    "killed_by": list(unit.killed_by),
                    "looked": list(unit.checks),
                    "first": unit.first,
                    "seconds": round(unit.seconds, 3),
                }
                for unit in self.units
            ],
            "seconds": round(self.seconds, 1),
        }


def cases_for(
    toy: str, bench: Bench, checks: Sequence[str], *, compute: Compute = ON_CPU
) -> list[Case]:
    """The matrix's cases that a toy can be cut into."""
    found = [
        compute.case(check, toy, layout=layout, probe=probe)
        for check, layout, probe in MATRIX_CASES
        if check in checks
    ]
    return [case for case in found if case.layout is None or fits(case.layout, bench.spec(case))]


def results_under(
    cases: Sequence[Case], bench: Bench, fault: Fault, *, enough: int | None = None
) -> Iterator[Result]:
    """Run what can see a fault; every result, passes included. Spoilt files are not kept.

    A check that has killed the fault in one case need not do so in its others, and after `enough`
    killers nobody need.
    """
    seams = seams_of(fault)
    scratch = Path(tempfile.mkdtemp(prefix="unit-", dir=bench.workdir))
    faulty = bench.under(fault, scratch)
    faulty.localises = False  # the matrix asks whether, not where: see tests/harness/test_localize
    killers: set[str] = set()
    try:
        for case in in_running_order(cases):
            if enough is not None and len(killers) >= enough:
                break
            if case.check in killers or not CHECKS[case.check].sees & seams:
                continue
            result = run_case(case, faulty)
            if result.status in ("failed", "error"):
                killers.add(case.check)
            yield result
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def run_unit(
    bench: Bench,
    name: str,
    toy: str,
    checks: Sequence[str],
    compute: Compute,
    enough: int | None = None,
) -> Unit:
    """Run one fault on one toy.

    Args:
        bench: A healthy one.
        name: Of the fault.
        toy: On which.
        checks: Which checks look.
        compute: In what, where, and by which layers.
        enough: Killers after which the others need not look; None lets all look.
    """
    started = time.monotonic()
    cases = cases_for(toy, bench, checks, compute=compute)
    results = list(results_under(cases, bench, fault_named(name), enough=enough))
    kills = [result for result in results if result.status in ("failed", "error")]
    return Unit(
        fault=name,
        toy=toy,
        killed_by=tuple(dict.fromkeys(result.case.check for result in kills)),
        first=f"{kills[0].case.id}: {kills[0].summary}" if kills else "",
        checks=tuple(dict.fromkeys(result.case.check for result in results)),
        seconds=time.monotonic() - started,
        seconds_by_check=_by_check(results),
        dtype=compute.dtype,
    )


def _by_check(results: Sequence[Result]) -> dict[str, float]:
    found: dict[str, float] = {}
    for result in results:
        found[result.case.check] = found.get(result.case.check, 0.0) + result.seconds
    return found


def run_healthy(bench: Bench, toy: str, checks: Sequence[str], compute: Compute) -> list[str]:
    """What fails on the toy without a fault: nothing, or the matrix means nothing."""
    cases = in_running_order(cases_for(toy, bench, checks, compute=compute))
    results = [run_case(case, bench) for case in cases]
    return [
        f"{result.case.id}: {result.summary}" for result in results if result.status != "passed"
    ]


def _unit(
    bench: Bench,
    name: str | None,
    toy: str,
    checks: Sequence[str],
    compute: Compute,
    enough: int | None,
) -> Unit | list[str]:
    if name is None:
        return run_healthy(bench, toy, checks, compute)
    return run_unit(bench, name, toy, checks, compute, enough)


def run_matrix(
    *,
    faults: Sequence[str] = (),
    toys: Sequence[str] = DEFAULT_TOYS,
    checks: Sequence[str] = (),
    computes: Sequence[Compute] = (ON_CPU,),
    workers: int | None = None,
    timeout: float = 120.0,
    full: bool = False,
    on_unit: Callable[[Unit, int], None] = lambda _unit, _total: None,
) -> tuple[Matrix, list[str]]:
    """Run faults against checks; those of local layers only where there are some.

    Args:
        faults: Names; none for all.
        toys: On which.
        checks: Which checks look; none for all.
        computes: In what, where, and by which layers; these only count where a model is live.
        workers: Processes; see `over_benches`.
        timeout: Seconds a case may take.
        full: Every check looks on every toy.
        on_unit: Called with each unit as it ends, and with how many there are.

    Returns:
        The matrix, and what failed without any fault.
    """
    started = time.monotonic()
    names = tuple(
        name
        for name in faults or CATALOGUE
        if not CATALOGUE[name].local_only or any(one.layers == "local" for one in computes)
    )
    looking = tuple(checks) or tuple(CHECKS)
    if not names:
        raise UsageError(
            f"{', '.join(faults)} comes in at local layers only",
            hint="give --layers local",
        )
    applying = [(name, toy) for name in names for toy in toys if applies(name, toy)]
    wanted = [
        (name, toy, compute)
        for compute in computes
        for name, toy in applying
        if compute.layers == "local" or not CATALOGUE[name].local_only
    ]
    arguments: list[tuple[Any, ...]] = [
        (None, toy, looking, compute, None) for compute in computes for toy in toys
    ]
    seen: set[tuple[str, Compute]] = set()
    for name, toy, compute in wanted:
        enough = ENOUGH if (name, compute) in seen else None
        arguments.append((name, toy, looking, compute, enough))
        if not full:
            seen.add((name, compute))
    units: dict[int, Unit] = {}
    alarms: list[str] = []
    for number, found in over_benches(_unit, arguments, workers=workers, timeout=timeout):
        if isinstance(found, Unit):
            units[number] = found
            on_unit(found, len(wanted))
        else:
            alarms += found
    matrix = Matrix(
        units=[units[number] for number in sorted(units)],
        checks=looking,
        faults=names,
        seconds=time.monotonic() - started,
    )
    return matrix, alarms


def applies(name: str, toy: str) -> bool:
    """Whether a fault has something to spoil on a toy."""
    from bridge.hf_config import spec_from_hf_config
    from harness.toys import toy_named

    return applicable(fault_named(name), spec_from_hf_config(toy_named(toy).config))
