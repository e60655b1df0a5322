"""The trial: which units are run, what is kept of them, and what a second part takes over."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from harness.bench import Bench, Subject
from harness.faults.journal import FILE_NAME
from harness.faults.matrix import MATRIX_CASES, cases_for, run_matrix
from harness.faults.units import Unit, unit_from_data
from harness.qualify.scope import Choices, Scope, scope_of
from harness.qualify.trial import run_trial
from harness.suite import Compute
from harness.toys import toy_named, write_checkpoint
from harness.verification import CHECK_NAMES
from tests.harness.qualify.conftest import ODD

FAULTS = ("tie-inverted", "rope-theta")


def unit(fault: str, *killed_by: str, toy: str = "nano-4b-twin") -> Unit:
    """One that every check looked at."""
    return Unit(
        fault=fault, toy=toy, killed_by=killed_by, first="x" if killed_by else "",
        checks=tuple(CHECK_NAMES), seconds=0.25, seconds_by_check={"config": 0.125},
    )  # fmt: skip


@pytest.fixture
def scope() -> Scope:
    """Two faults on the twin of a toy."""
    choices = Choices(name="nano-4b", weights="synthetic", faults=FAULTS)
    return scope_of(dict(toy_named("nano-4b").config), choices, where="config.json")


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str | None]:
    """The units that processes were asked for; each is killed, but tie-inverted."""
    found: list[str | None] = []

    def over_benches(
        function: Callable[..., Any],
        arguments: Sequence[tuple[Any, ...]],
        **_: object,
    ) -> Iterator[tuple[int, Any]]:
        del function
        for number, (name, toy, _checks, compute, enough) in enumerate(arguments):
            assert isinstance(compute, Compute)
            found.append(name)
            assert enough == (None if name is None else 2)
            killers = () if name == "tie-inverted" else CHECK_NAMES[:2]
            yield number, [] if name is None else unit(name, *killers, toy=toy)

    monkeypatch.setattr("harness.faults.matrix.over_benches", over_benches)
    return found


@pytest.fixture
def subjects(scope: Scope, tmp_path: Path) -> dict[str, Subject]:
    """The twin's checkpoint."""
    write_checkpoint(scope.twin.toy, tmp_path / "twin")
    return {scope.twin.toy.name: Subject(name=scope.twin.toy.name, hf=tmp_path / "twin")}


def trial(scope: Scope, subjects: dict[str, Subject], path: Path, *, resume: bool) -> Any:  # noqa: ANN401 - JSON
    """Run one."""
    return run_trial(scope, subjects, path, resume=resume, workers=1, timeout=10)


def test_every_fault_is_tried_once_after_the_healthy_twin(
    scope: Scope, subjects: dict[str, Subject], asked: list[str | None], tmp_path: Path
) -> None:
    """A survivor is a problem; units are on the disk as they end."""
    found = trial(scope, subjects, tmp_path, resume=False)
    assert asked == [None, "rope-theta", "tie-inverted"]
    assert found["survivors"] == ["tie-inverted"]
    assert found["problems"] == ["survived: tie-inverted"]
    header, *units = [json.loads(line) for line in (tmp_path / FILE_NAME).read_text().splitlines()]
    assert set(header["identity"]) == {"code", "twin", "dtype", "device"}
    assert {one["fault"] for one in units} == set(FAULTS)


def test_a_second_part_runs_what_the_first_has_not(
    scope: Scope, subjects: dict[str, Subject], asked: list[str | None], tmp_path: Path
) -> None:
    """A torn last line is left out; the matrix is of both parts."""
    whole = trial(scope, subjects, tmp_path, resume=False)
    journal = tmp_path / FILE_NAME
    header, first, second = journal.read_text().splitlines()
    journal.write_text(f"{header}\n{first}\n{second[:30]}")
    asked.clear()
    again = trial(scope, subjects, tmp_path, resume=True)
    assert asked == [None, json.loads(second)["fault"]]
    assert [one | {"seconds": 0} for one in again["units"]] == [
        one | {"seconds": 0} for one in whole["units"]
    ]


@pytest.mark.parametrize("change", ["other code", "another twin", "not resumed", "no journal"])
def test_units_of_another_trial_are_not_taken_over(
    scope: Scope, subjects: dict[str, Subject], asked: list[str | None], tmp_path: Path, change: str
) -> None:
    """All of it is run again."""
    trial(scope, subjects, tmp_path, resume=False)
    journal = tmp_path / FILE_NAME
    header, *units = journal.read_text().splitlines()
    identity = json.loads(header)["identity"]
    identity |= {"other code": {"code": "x"}, "another twin": {"twin": "x"}}.get(change, {})
    journal.write_text("\n".join([json.dumps({"identity": identity}), *units, ""]))
    if change == "no journal":
        journal.unlink()
    asked.clear()
    trial(scope, subjects, tmp_path, resume=change != "not resumed")
    assert asked == [None, "rope-theta", "tie-inverted"]


def test_a_unit_survives_being_written_down() -> None:
    """Field by field."""
    one = unit("tie-inverted", "logits")
    assert unit_from_data(json.loads(json.dumps(one.to_dict()))) == one


def test_a_model_that_cannot_be_cut_into_the_main_layout_is_tried_in_a_smaller_one(
    tmp_path: Path, odd_config: Path
) -> None:
    """Three heads in one block run on one rank alone; no check is lost that can look there."""
    del odd_config
    subject = Subject(name="m", hf=_written(tmp_path))
    with Bench(tmp_path, subjects={"m": subject}) as bench:
        found = cases_for("m", bench, CHECK_NAMES)
    assert {case.layout for case in found} == {None, "tp1-pp1"}
    assert {case.check for case in found} == {
        check for check, _, _ in MATRIX_CASES if check not in ("golden", "layouts")
    }  # fmt: skip


def _written(root: Path) -> Path:
    from harness.config_forms import write_config
    from harness.replay import write_model

    config = write_config(ODD, schema="2025-11", rope_style="transformers-5", state_head_dim=True)
    return write_model(config, root / "hf", seed=0)


def test_only_faults_that_the_model_can_have_are_tried_on_it(
    asked: list[str | None], tmp_path: Path
) -> None:
    """A model that is given is looked at itself, not a toy of its name."""
    subject = Subject(name="m", hf=_written(tmp_path))
    with pytest.raises(AssertionError):  # `enough` is None here: every check looks
        run_matrix(faults=("tie-inverted",), toys=("m",), subjects={"m": subject})
    asked.clear()
    matrix, _ = run_matrix(
        faults=("tie-inverted", "linear-read-as-no-op"), toys=("m",), subjects={"m": subject},
        enough_on_first=2,
    )  # fmt: skip
    assert asked == [None, "tie-inverted"]
    assert matrix.survivors == ["tie-inverted", "linear-read-as-no-op"]
