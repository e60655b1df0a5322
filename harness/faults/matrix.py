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
from pathlib import Path
from typing import Any, Final

from bridge.errors import UsageError
from bridge.spec import ModelSpec, ParallelLayout
from harness.bench import BASE_LAYOUT, Bench, Subject
from harness.checks import CHECKS
from harness.errors import WorkerFailedError
from harness.faults import CATALOGUE, applicable, fault_named
from harness.faults.units import Matrix, Unit
from harness.hooks import Dimension, Fault, seams_of
from harness.layouts import fits, resolve_layout
from harness.runner import Result, in_running_order, run_case
from harness.suite import ON_CPU, Case, Compute
from harness.workers import over_benches

DEFAULT_TOYS: Final = ("51b", "super-49b-v1_5", "tied")
ENOUGH: Final = 2
"""Killers after which a unit may end."""
_MAIN: Final = "tp2-pp2-vp2"
_STAND_INS: Final[Mapping[str, Sequence[str]]] = {
    _MAIN: ("tp2-pp2", "tp1-pp2-vp2", "tp2-pp1", "tp1-pp2", "tp1-pp1"),
    "tp2-pp1": ("tp1-pp2", "tp1-pp1"),
}
"""What a check looks in where a model cannot be cut as it is to be; best first."""
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


def cases_for(
    toy: str, bench: Bench, checks: Sequence[str], *, compute: Compute = ON_CPU
) -> list[Case]:
    """The matrix's cases that a toy can be cut into; see `cases_of`."""
    spec = bench.spec(compute.case("config", toy))
    return [
        compute.case(check, toy, layout=layout, probe=probe)
        for check, layout, probe in cases_of(spec)
        if check in checks
    ]


def cases_of(spec: ModelSpec) -> list[tuple[str, str | None, str | None]]:
    """`MATRIX_CASES` for a model: a smaller layout stands in for one that it cannot be cut into.

    A model of three layers, or of an odd number of heads, has no part in some dimension of it.
    """
    found = []
    for check, layout, probe in MATRIX_CASES:
        for name in (layout, *_STAND_INS.get(layout or "", ())):
            if (check, name) == ("layouts", BASE_LAYOUT):
                continue  # against itself
            if name is None or fits(name, spec):
                found.append((check, name, probe))
                break
    return list(dict.fromkeys(found))


def shows(fault: Fault, spec: ModelSpec) -> bool:
    """Whether a fault has something to spoil on a model, in a layout that a check sees it in."""
    if not applicable(fault, spec):
        return False
    seams = seams_of(fault)
    return not fault.needs or any(
        dimensions_of(resolve_layout(layout, spec)) & set(fault.needs)
        for check, layout, _ in cases_of(spec)
        if layout is not None and CHECKS[check].sees & seams
    )


def dimensions_of(layout: ParallelLayout) -> set[Dimension]:
    """What a layout has of what a fault can need."""
    found: dict[Dimension, bool] = {
        "tp": layout.tensor_model_parallel_size > 1,
        "pp": layout.pipeline_model_parallel_size > 1,
        "sp": layout.sequence_parallel,
    }
    return {name for name, is_there in found.items() if is_there}


def results_under(
    cases: Sequence[Case], bench: Bench, fault: Fault, *, enough: int | None = None
) -> Iterator[Result]:
    """Run what can see a fault; every result, passes included. Spoilt files are not kept.

    A check that has killed the fault in one case need not do so in its others, and after `enough`
    killers nobody need.

    Raises:
        WorkerFailedError: HN202, this machine had no room or memory for it: no check has noticed
            anything then, and the fault is not to count as killed.
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
            result = _carried_out(run_case(case, faulty), fault.name)
            if result.status in ("failed", "error"):
                killers.add(case.check)
            yield result
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _carried_out(result: Result, what: str) -> Result:
    if result.machine_lacked:
        raise WorkerFailedError(
            f"{what} could not be tried: {result.reason}",
            where=result.case.id,
            hint="make room under TMPDIR, or use fewer --workers, and run it again; "
            "`qualify --resume` goes on with the faults that are left",
        )
    return result


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
    results = [_carried_out(run_case(case, bench), "the healthy model") for case in cases]
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
    enough_on_first: int | None = None,
    subjects: Mapping[str, Subject] | None = None,
    earlier: Sequence[Unit] = (),
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
        enough_on_first: Killers after which the others need not look on a fault's first toy either;
            whether a check is needed then does not show.
        subjects: Models besides the toys that `toys` may name.
        earlier: Units that have been run before; theirs is not run again.
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
    applying = [(name, toy) for name in names for toy in toys if applies(name, toy, subjects or {})]
    wanted = [
        (name, toy, compute)
        for compute in computes
        for name, toy in applying
        if compute.layers == "local" or not CATALOGUE[name].local_only
    ]
    arguments: list[tuple[Any, ...]] = [
        (None, toy, looking, compute, None) for compute in computes for toy in toys
    ]
    done = {(one.fault, one.toy, one.dtype): one for one in earlier}
    units = [one for name, toy, compute in wanted if (one := done.get((name, toy, compute.dtype)))]
    seen: set[tuple[str, Compute]] = set()
    for name, toy, compute in wanted:
        if (name, toy, compute.dtype) in done:
            continue
        enough = ENOUGH if (name, compute) in seen else enough_on_first
        arguments.append((name, toy, looking, compute, enough))
        if not full:
            seen.add((name, compute))
    alarms: list[str] = []
    for _, found in over_benches(
        _unit, arguments, workers=workers, timeout=timeout, subjects=subjects
    ):
        if isinstance(found, Unit):
            units.append(found)
            on_unit(found, len(wanted))
        else:
            alarms += found
    order = {(name, toy, compute.dtype): place for place, (name, toy, compute) in enumerate(wanted)}
    matrix = Matrix(
        units=sorted(units, key=lambda one: order[one.fault, one.toy, one.dtype]),
        checks=looking,
        faults=names,
        seconds=time.monotonic() - started,
    )
    return matrix, alarms


def applies(name: str, toy: str, subjects: Mapping[str, Subject] | None = None) -> bool:
    """Whether a fault shows (see `shows`) on a toy, or on a model that is given."""
    from bridge.convert import read_spec
    from bridge.hf_config import spec_from_hf_config
    from harness.toys import toy_named

    given = (subjects or {}).get(toy)
    if given is not None and given.hf is not None:
        return shows(fault_named(name), read_spec(given.hf))
    return shows(fault_named(name), spec_from_hf_config(toy_named(toy).config))
