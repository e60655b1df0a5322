"""A bundle held against itself and against this code: nothing in it is taken at its word.

What follows from something else is made again: the twin and the cases from the configuration, the
kill matrix from its units, verdicts from values and shipped limits, counts from cases, reports and
card from the evidence. What follows from nothing is held by the sums: a measured value, a digest of
weights and a time by the journals too; command, machine, versions and memory by `SHA256SUMS` alone.
Whoever wrote all of these anew can have written such a value; file the sums where they cannot.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from bridge.drawing.architecture import architecture
from bridge.errors import BridgeError
from bridge.hf_config import load_hf_config, spec_from_hf_config
from harness.checks import CHECKS
from harness.errors import EvidenceError
from harness.faults import CATALOGUE
from harness.hooks import seams_of
from harness.qualify.bundle import CONFIG_NAME, SUMS_NAME, architecture_name, files_of, texts
from harness.qualify.journals import journal_problems
from harness.qualify.origin import origin_problems
from harness.qualify.scope import Choices, Scope, scope_of
from harness.qualify.trial import matrix_data
from harness.qualify.verdict import (
    case_problems,
    fault_counts,
    overall,
    report_of,
    total_problems,
)
from harness.report.digests import code_sha256, digest_of, sha256_of
from harness.report.evidence import FILE_NAME, read_evidence, strict, thresholds_as_data
from harness.report.write import MATRIX_NAME
from harness.runner import in_running_order
from harness.thresholds import load_thresholds

Data = Mapping[str, Any]
_UNREADABLE: Final = (
    BridgeError, OSError, KeyError, TypeError, ValueError, IndexError, AttributeError,
    RecursionError,
)  # fmt: skip
_CHOICES: Final = ("weights", "paired", "full", "seed", "dtype", "device", "stand_in")


@dataclass(frozen=True, slots=True, kw_only=True)
class Audit:
    """What became of a bundle.

    Args:
        problems: Everything that does not hold; empty for a bundle that validates.
        verdict: What the bundle says of the model; None where nothing could be read.
        other_code: The digest of the code that made it, where this is another: what that code
            derives from a configuration is then not derived again.
    """

    problems: tuple[str, ...]
    verdict: str | None
    other_code: str | None = None

    @property
    def exit_code(self) -> int:
        """0 validates and has passed; 1 does not, or has failed; 3 nobody knows."""
        if self.problems or self.verdict == "failed":
            return 1
        return 3 if self.other_code or self.verdict != "passed" else 0


def audit(directory: Path) -> Audit:
    """Look at everything in a bundle.

    Raises:
        EvidenceError: HN103, there is no bundle.
    """
    if not (directory / SUMS_NAME).is_file():
        raise EvidenceError(
            "there is no bundle of a qualification",
            where=str(directory / SUMS_NAME),
            hint="give the directory that `qualify --report` named, once it has ended",
        )
    problems: list[str] = []
    try:
        problems += _sum_problems(directory)
        data = read_evidence(directory)
        matrix = json.loads((directory / MATRIX_NAME).read_text("utf-8"))
    except (BridgeError, OSError, ValueError, RecursionError) as error:
        return Audit(problems=(*problems, *str(error).splitlines()), verdict=None)
    if "qualification" not in data:
        problems.append(f"{FILE_NAME}: evidence of some run, and not of a qualification")
        return Audit(problems=tuple(problems), verdict=data["verdict"])
    code = data["code_sha256"]
    other_code = None if code == code_sha256() else code
    try:
        scope = _scope(directory, data)
        problems += _run_problems(data, matrix, scope)
        problems += journal_problems(directory, data, matrix)
        if other_code is None:
            problems += _derived_problems(directory, data, matrix, scope)
    except _UNREADABLE as error:
        first = str(error).splitlines()[:1]
        problems.append(f"cannot be derived again: {type(error).__name__}: {' '.join(first)}")
    return Audit(problems=tuple(problems), verdict=data["verdict"], other_code=other_code)


def _sum_problems(directory: Path) -> Iterator[str]:
    """Files that are not as they were, that are gone, and that nobody has summed up."""
    for path in directory.rglob("*"):
        name = path.relative_to(directory).as_posix()
        if path.is_symlink():
            yield f"{name}: a link, and no file of a bundle"
        elif path.is_dir():
            if not any(path.iterdir()):
                yield f"{name}: an empty directory, which no sum is of"
        elif not path.is_file():
            yield f"{name}: no plain file"
    wanted: dict[str, str] = {}
    for line in (directory / SUMS_NAME).read_text("utf-8", "replace").splitlines():
        digest, separator, name = line.partition("  ")
        if not separator or len(digest) != hashlib.sha256().digest_size * 2:
            yield f"{SUMS_NAME}: {line[:80]!r} is no sum"
            continue
        if name in wanted:
            yield f"{SUMS_NAME}: {name} is summed up twice"
        wanted[name] = digest
    present = files_of(directory)
    yield from (f"{name}: missing" for name in sorted(wanted.keys() - set(present)))
    yield from (f"{name}: not among the sums" for name in present if name not in wanted)
    for name in present:
        if name in wanted and sha256_of(directory / name) != wanted[name]:
            yield f"{name}: not the file that was summed up"


def _scope(directory: Path, data: Data) -> Scope:
    """What was to be run, from the configuration and the choices on record."""
    said = data["qualification"]["scope"]
    choices = Choices(
        name=said["model"],
        faults=tuple(said["fault_patterns"]),
        **{name: said[name] for name in _CHOICES},
    )
    config = load_hf_config(directory / CONFIG_NAME)
    return scope_of(config, choices, where=CONFIG_NAME)


def _run_problems(data: Data, matrix: Data, scope: Scope) -> Iterator[str]:
    """What the run's own numbers, or the limits that are shipped, contradict."""
    yield from total_problems(data)
    for name, expected in origin_problems(data["qualification"]["origin"]).items():
        yield f"qualification.origin.{name}: {expected} is expected"
    if data["allowed_not_run"]:
        yield "allowed_not_run: a qualification allows nothing to be left out"
    shipped = load_thresholds()
    ours, theirs = (
        {(one["name"], one["dtype"]): one for one in found}
        for found in (strict(thresholds_as_data(shipped)), data["thresholds"])
    )
    for key in sorted(ours.keys() | theirs.keys()):
        if ours.get(key) != theirs.get(key):
            yield f"limit {' of '.join(key)}: not the one that is shipped"
    blocks = {
        scope.choices.name: scope.as_data()["blocks"],
        scope.twin.toy.name: list(range(len(scope.twin.layer_idx))),
    }
    width = {
        scope.choices.name: scope.spec.hidden_size,
        scope.twin.toy.name: scope.twin.toy.architecture.hidden_size,
    }
    for case in data["cases"]:
        if case["model"] not in blocks:
            yield f"{case['id']}: no model of this qualification"
            continue
        limits = shipped.for_hidden_size(width[case["model"]])
        yield from case_problems(case, limits, blocks[case["model"]])
    verdict = overall(data, matrix)[0]
    if data["verdict"] != verdict:
        yield f"verdict: {data['verdict']}, cases and faults make it {verdict}"
    if data["qualification"]["faults"] != fault_counts(matrix):
        yield "qualification.faults: not what the kill matrix says"


def _derived_problems(directory: Path, data: Data, matrix: Data, scope: Scope) -> Iterator[str]:
    """What this code makes of the configuration, the units and the evidence, and is not there."""
    said, derived = data["qualification"]["scope"], strict(scope.as_data())
    yield from (
        f"qualification.scope.{name}: not what follows from {CONFIG_NAME}"
        for name in sorted(said.keys() | derived.keys())
        if said.get(name) != derived.get(name)
    )
    wanted = [case.id for case in in_running_order(scope.cases)]
    found = [result.case.id for result in report_of(data).results]
    stated = [case["id"] for case in data["cases"]]
    if found != stated:
        yield "cases: ids that are not those of their fields"
    if wanted != found:
        lacking, odd = sorted(set(wanted) - set(found)), sorted(set(found) - set(wanted))
        yield f"cases: not those that follow from {CONFIG_NAME}; lacking {lacking}, odd {odd}"
    yield from _matrix_problems(matrix, scope)
    inputs = data["inputs"]
    if set(inputs) != {scope.choices.name, scope.twin.toy.name}:
        yield f"inputs: of {', '.join(inputs)}"
    elif inputs[scope.choices.name]["config_sha256"] != sha256_of(directory / CONFIG_NAME):
        yield f"inputs: the run was of another {CONFIG_NAME}"
    yield from _input_problems(inputs.get(scope.choices.name, {}), scope)
    pictures = {
        scope.choices.name: scope.spec,
        scope.twin.toy.name: spec_from_hf_config(scope.twin_config),
    }
    for name, spec in pictures.items():
        drawn = strict(architecture(spec, None, name="").as_data())
        if inputs.get(name, {}).get("architecture") != drawn:
            yield f"inputs: the picture of {name} is another model's"
    if data["qualification"]["architecture"] != architecture_name(scope):
        yield f"qualification.architecture: not what follows from {CONFIG_NAME}"
    for name, text in texts(data, scope.twin_config, matrix).items():
        try:
            same = (directory / name).read_text("utf-8") == text
        except (OSError, ValueError):
            same = False
        if not same:
            yield f"{name}: not what the evidence makes it"
    twin = inputs.get(scope.twin.toy.name, {}).get("config_sha256")
    text = texts(data, scope.twin_config, matrix)["twin.json"]
    if twin != hashlib.sha256(text.encode()).hexdigest():
        yield "inputs: the run was of another twin"


def _input_problems(found: Data, scope: Scope) -> Iterator[str]:
    if bool(found.get("weight_files")) != (scope.choices.weights == "checkpoint"):
        kind = "of a checkpoint" if scope.choices.weights == "checkpoint" else "from no file"
        yield f"inputs: weights {kind} are wanted"
    if bool(found.get("megatron_files")) != scope.choices.paired:
        wanted = "a" if scope.choices.paired else "no"
        yield f"inputs: {wanted} Megatron checkpoint is wanted"


def _matrix_problems(matrix: Data, scope: Scope) -> Iterator[str]:
    units = matrix["units"]
    again = matrix_data(units, scope, matrix["seconds"], matrix["alarms"])
    if digest_of(again) != digest_of(matrix):
        yield f"{MATRIX_NAME}: not what its units make it"
    tried = [(one["fault"], one["toy"], one["dtype"]) for one in units]
    wanted = [(name, scope.twin.toy.name, scope.choices.dtype) for name in scope.faults]
    if sorted(tried) != sorted(wanted):
        yield f"{MATRIX_NAME}: not every fault that the twin can have was tried on it, once"
    for one in units:
        if not set(one["killed_by"]) <= set(one["looked"]):
            yield f"{MATRIX_NAME}: {one['fault']} was killed by a check that did not look"
        seams = seams_of(CATALOGUE[one["fault"]])
        blind = [name for name in one["looked"] if not CHECKS[name].sees & seams]
        if blind:
            yield f"{MATRIX_NAME}: {', '.join(blind)} cannot have looked at {one['fault']}"
        if bool(one["first"]) != bool(one["killed_by"]):
            yield f"{MATRIX_NAME}: {one['fault']} was killed without a word, or lived with one"
        elif one["killed_by"] and not one["first"].startswith(
            f"{one['killed_by'][0]}/{one['toy']}/"
        ):
            yield f"{MATRIX_NAME}: the word on {one['fault']} is not its first killer's"
