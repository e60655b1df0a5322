"""The matrix counts honestly, and checks see only what they say they see."""

from __future__ import annotations

import errno
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bridge.errors import CheckpointError
from harness.bench import Bench
from harness.checks import CHECKS
from harness.errors import WorkerFailedError
from harness.faults.matrix import cases_for, run_healthy, run_unit
from harness.faults.units import Matrix, Unit
from harness.hooks import SEAMS, Fault
from harness.runner import run_case
from harness.suite import ON_CPU


def unit(fault: str, toy: str, *killed_by: str, dtype: str = "float32") -> Unit:
    """One fault on one toy, looked at by all checks."""
    return Unit(
        fault=fault, toy=toy, killed_by=killed_by, first="", checks=("a", "b", "c"), seconds=0.0,
        dtype=dtype,
    )  # fmt: skip


def test_a_fault_that_one_dtype_lets_through_must_die_in_another() -> None:
    """What is too small for bfloat16 is left to float32; on every toy, and it is said which."""
    small = [unit("one", "x", "a"), unit("one", "x", dtype="bfloat16")]
    matrix = Matrix(units=small, checks=("a", "b"), faults=("one",), seconds=0.0)
    assert matrix.survivors == []
    assert matrix.indispensable == {"a": ["one"], "b": []}
    assert matrix.dtypes == ["float32", "bfloat16"]
    assert matrix.killed_in("float32") == matrix.killed_by == {"one": ["a"]}
    assert matrix.killed_in("bfloat16") == {"one": []}
    other = unit("one", "y", dtype="bfloat16")
    assert Matrix(
        units=[*small, other], checks=("a", "b"), faults=("one",), seconds=0.0
    ).survivors == ["one"]


def test_a_check_is_needed_that_a_suite_of_one_dtype_would_miss() -> None:
    """What only `a` sees in float32 is no less its own because bfloat16 shows it to `b` too."""
    matrix = Matrix(
        units=[
            *(unit("one", "x", "a"), unit("one", "x", "a", "b", dtype="bfloat16")),
            *(unit("two", "x", "a", "b"), unit("two", "x", "a", "b", dtype="bfloat16")),
        ],
        checks=("a", "b"), faults=("one", "two"), seconds=0.0,
    )  # fmt: skip
    assert matrix.indispensable == {"a": ["one"], "b": []}
    assert matrix.redundant_checks == ["b"]


def test_a_fault_survives_when_one_toy_lets_it_through_or_none_tried_it() -> None:
    """Killed on one toy is not killed."""
    matrix = Matrix(
        units=[unit("one", "x", "a"), unit("one", "y"), unit("two", "x", "a", "b")],
        checks=("a", "b", "c"),
        faults=("one", "two", "three"),
        seconds=0.0,
    )
    assert matrix.survivors == ["one", "three"]
    assert matrix.killed_by == {"one": ["a"], "two": ["a", "b"], "three": []}
    assert matrix.idle_checks == ["c"]


def test_a_check_is_redundant_when_nothing_depends_on_it_alone() -> None:
    """`b` kills, but `a` kills all of it too."""
    matrix = Matrix(
        units=[unit("one", "x", "a"), unit("two", "x", "a", "b")],
        checks=("a", "b"),
        faults=("one", "two"),
        seconds=0.0,
    )
    assert matrix.redundant_checks == ["b"]
    assert matrix.indispensable["a"] == ["one"]


def explode(*_: Any, **__: Any) -> Any:  # noqa: ANN401 - stands for any seam
    """Nobody may get here."""
    raise AssertionError("a check went through a seam that it does not declare")


@pytest.mark.ranks
@pytest.mark.parametrize("check", CHECKS)
def test_a_check_goes_through_no_seam_it_does_not_declare(check: str, tmp_path: Path) -> None:
    """With every other seam booby-trapped, it passes as if nothing were there."""
    traps: dict[str, Callable[..., Any]] = {
        seam: explode for seam in SEAMS if seam not in CHECKS[check].sees
    }
    trapped = Fault(name="trapped", **traps)  # type: ignore[arg-type]  # any seam
    with Bench(tmp_path, timeout=120) as bench:
        case = cases_for("nano-4b", bench, [check])[-1]
        assert run_case(case, bench.under(trapped)).status == "passed"


@pytest.mark.ranks
def test_a_unit_names_its_killers_in_order(tmp_path: Path) -> None:
    """A wrong RoPE factor is seen by the configuration and by RoPE, in a model of any kind."""
    with Bench(tmp_path, timeout=120) as bench:
        found = run_unit(bench, "rope-factor", "nano-4b", ["config", "placement", "rope"], ON_CPU)
    assert found.killed_by == ("config", "rope")
    assert found.checks == ("config", "placement", "rope")
    assert found.first.startswith("config/nano-4b/float32: ")


def _raises(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the check of the configuration end so."""

    def run(*_: object) -> Any:  # noqa: ANN401 - a Finding, were there one
        raise error

    monkeypatch.setattr("harness.checks.config.run", run)


def _wrapped() -> CheckpointError:
    """An error of the bridge's that a full disk has led to."""
    error = CheckpointError("cannot write")
    error.__context__ = OSError(errno.ENOSPC, "full")
    return error


@pytest.mark.parametrize("error", [MemoryError(), OSError(errno.ENOSPC, "full"), _wrapped()])
def test_a_machine_without_room_has_noticed_no_fault(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor does it say anything of the healthy model."""
    _raises(error, monkeypatch)
    with Bench(tmp_path) as bench:
        with pytest.raises(WorkerFailedError, match="rope-factor could not be tried"):
            run_unit(bench, "rope-factor", "nano-4b", ["config"], ON_CPU)
        with pytest.raises(WorkerFailedError, match="the healthy model"):
            run_healthy(bench, "nano-4b", ["config"], ON_CPU)


def test_a_file_that_is_gone_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A damaged checkpoint makes such errors."""
    _raises(FileNotFoundError(errno.ENOENT, "gone"), monkeypatch)
    with Bench(tmp_path) as bench:
        found = run_unit(bench, "rope-factor", "nano-4b", ["config"], ON_CPU)
    assert found.killed_by == ("config",)
