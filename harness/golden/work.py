"""Check all goldens, or record them: what `nemotron-bridge golden` does."""

from __future__ import annotations

import fnmatch
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from bridge import __version__
from bridge.errors import BridgeError
from bridge.hf_config import load_hf_config, spec_from_hf_config
from bridge.outputs import write_atomically
from bridge.parameters import num_parameters
from bridge.plan import Plan
from bridge.platform import describe
from harness.bench import Bench
from harness.checks import CHECKS
from harness.errors import GoldenRecordError, SuiteError
from harness.golden.cases import PREFIX, golden_models
from harness.golden.compare import differences
from harness.golden.observe import entry_name, fields, header
from harness.golden.store import (
    INDEX,
    PLANS,
    Index,
    file_of,
    index_text,
    load_index,
    record_text,
    sha256_of,
)
from harness.locations import suites_dir
from harness.suite import DTYPES, Case
from harness.toys import TOYS

Json = Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """One entry and what is wrong with it; nothing where it holds."""

    name: str
    problems: tuple[str, ...]

    @property
    def passed(self) -> bool:
        """Whether it holds."""
        return not self.problems


@dataclass(frozen=True, slots=True, kw_only=True)
class Recording:
    """What a recording did: entries written, entries left as they were, entries removed."""

    written: tuple[str, ...]
    unchanged: tuple[str, ...]
    removed: tuple[str, ...]


def entries() -> dict[str, Case | None]:
    """Everything that is to be on record: the covering set, the toys, the published plans."""
    cases = [
        *(
            Case(check="golden", model=f"{PREFIX}{name}", dtype=model.dtype)
            for name, model in golden_models().items()
        ),
        *(Case(check="golden", model=name, dtype=dtype) for name in TOYS for dtype in DTYPES),
    ]
    return {entry_name(case.model, case.dtype): case for case in cases} | {PLANS: None}


def select_entries(patterns: Sequence[str]) -> list[str]:
    """The names that match any pattern, a glob or a part of the name; all without a pattern.

    Raises:
        SuiteError: HN101, none does.
    """
    known = list(entries())
    found = [name for name in known if not patterns or any(_matches(name, p) for p in patterns)]
    if not found:
        raise SuiteError(
            f"none of {len(known)} goldens is selected by {', '.join(patterns)}",
            hint=f"names look like {', '.join(known[:3])}",
        )
    return found


def _matches(name: str, pattern: str) -> bool:
    return pattern in name or fnmatch.fnmatchcase(name, pattern)


def check(root: Path, bench: Bench, patterns: Sequence[str] = ()) -> list[Outcome]:
    """Hold the selected entries to their records, and, without a selection, the folder to the set.

    Args:
        root: The folder of goldens, as `harness.locations.golden_dir` gives it.
        bench: Makes the models.
        patterns: As for `select_entries`.

    Raises:
        GoldenFormatError: HN302, the index is not one.
        SuiteError: HN101, nothing is selected.
    """
    index, known = load_index(root), entries()
    found = [_check_one(root, name, known[name], bench) for name in select_entries(patterns)]
    if not patterns:
        found += _unused(root, index, known)
    return found


def _check_one(root: Path, name: str, case: Case | None, bench: Bench) -> Outcome:
    if not (root / file_of(name)).is_file():
        return Outcome(name=name, problems=(f"{file_of(name)}: missing",))
    if load_index(root).entries.get(name) is None:
        return Outcome(name=name, problems=(f"{INDEX}: {name} is not in it",))
    if case is None:
        if load_index(root).entries[name].get("sha256") != sha256_of(root / file_of(name)):
            return Outcome(name=name, problems=(f"{file_of(name)}: is not what was recorded",))
        recorded = json.loads((root / file_of(name)).read_text("utf-8"))
        return Outcome(name=name, problems=tuple(differences(recorded, published_plans())))
    try:
        finding = CHECKS["golden"].run(case, bench)
    except BridgeError as error:
        return Outcome(name=name, problems=(error.message, *error.where))
    return Outcome(
        name=name, problems=() if finding.passed else finding.places or (finding.summary,)
    )


def _unused(root: Path, index: Index, known: Iterable[str]) -> list[Outcome]:
    names = set(known)
    wanted = {INDEX, "README.md", *map(file_of, names)}
    files = {path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file()}
    stray = [(file, f"{file}: nothing uses it") for file in files - wanted]
    stray += [(name, f"{INDEX}: nothing uses {name}") for name in index.entries.keys() - names]
    for name, entry in index.entries.items():
        number = entry.get("recording")
        if not isinstance(number, int) or not 1 <= number <= len(index.recordings):
            stray.append((name, f"{INDEX}: {name} names recording {number!r}, there is none"))
    return [Outcome(name=name, problems=(problem,)) for name, problem in sorted(stray)]


def record(root: Path, bench: Bench, *, reason: str, patterns: Sequence[str] = ()) -> Recording:
    """Put on record what the bridge makes of the selected models now.

    What has not changed keeps its entry, with the reason it was recorded for. Without a selection,
    what nothing uses any more is removed.

    Args:
        root: The folder of goldens.
        bench: Makes the models; without a fault.
        reason: Why the values may change, for those who find them changed.
        patterns: As for `select_entries`.

    Raises:
        GoldenRecordError: HN301, without a reason, in CI, or with a fault.
        SuiteError: HN101, nothing is selected.
    """
    refuse_recording(reason)
    if bench.fault.name != "healthy":
        raise GoldenRecordError("a bridge with a fault in it is not recorded")
    names, known = select_entries(patterns), entries()
    index, stale = Index(), []
    if (root / INDEX).is_file():
        index = load_index(root)
    for name in names:
        text = _text_of(known[name], bench)
        path = root / file_of(name)
        if not path.is_file() or path.read_text("utf-8") != text or name not in index.entries:
            stale.append((name, text))
    removed = []
    if not patterns:
        removed = sorted({*_stray_cases(root, known), *(index.entries.keys() - known.keys())})
    if stale or removed:
        index.recordings.append(_recording(reason))
    for name, text in stale:
        file = root / file_of(name)
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(file, text)
        index.entries[name] = {
            "file": file_of(name),
            "sha256": sha256_of(root / file_of(name)),
            "recording": len(index.recordings),
        }
    for name in removed:
        index.entries.pop(name, None)
        (root / file_of(name)).unlink(missing_ok=True)
    if stale or removed:
        write_atomically(root / INDEX, index_text(index))
    written = [name for name, _ in stale]
    return Recording(
        written=tuple(written),
        unchanged=tuple(name for name in names if name not in written),
        removed=tuple(removed),
    )


def refuse_recording(reason: str) -> None:
    """Refuse what must not be recorded, before any work.

    Raises:
        GoldenRecordError: HN301, without a reason, or in CI.
    """
    if not reason.strip():
        raise GoldenRecordError(
            "goldens are recorded for a reason, and none is given",
            hint='--reason "what changed, and why it may": it is kept beside the values',
        )
    if os.environ.get("CI", "").lower() not in {"", "0", "false"}:
        raise GoldenRecordError(
            "goldens are not recorded in CI: they would agree with whatever is wrong",
            where="environment variable CI",
            hint="record them on a machine of yours, look at the difference, and commit it",
        )


def published_plans() -> dict[str, Json]:
    """Counts and plan digest of every published configuration, by name."""
    found = {}
    for path in sorted((suites_dir() / "variants").glob("*.json")):
        spec = spec_from_hf_config(load_hf_config(path))
        plan = Plan(spec, spec.padded_vocab_size(1))
        found[path.stem] = {
            "num_parameters": num_parameters(spec),
            "num_hf_tensors": len(plan.hf_shapes),
            "num_megatron_parameters": len(plan.mcore_shapes),
            "plan_sha256": plan.digest(),
        }
    return found


def _text_of(case: Case | None, bench: Bench) -> str:
    if case is None:
        return json.dumps(published_plans(), indent=2) + "\n"
    return record_text(header(case), {name: make() for name, make in fields(case, bench).items()})


def _stray_cases(root: Path, known: Mapping[str, object]) -> list[str]:
    return [path.stem for path in (root / "cases").glob("*.json") if path.stem not in known]


def _recording(reason: str) -> dict[str, Json]:
    made_with = {"nemotron-bridge": __version__, **describe()}
    return {"date": datetime.now(UTC).date().isoformat(), "reason": reason, "made_with": made_with}
