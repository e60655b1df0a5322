"""Cases are isolated, ordered so that shared work is done once, and counted honestly."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from bridge.errors import CheckpointError
from harness import checks, runner
from harness.bench import Bench
from harness.checks import Check
from harness.compare import Finding
from harness.errors import RanksUnavailableError
from harness.report.text import print_report
from harness.runner import Result, RunReport, in_running_order, run_cases
from harness.suite import Case, load_suite


def case(model: str, check: str = "config", **axes: str) -> Case:
    """A case in float32."""
    return Case(check=check, model=model, dtype="float32", **axes)


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    """A bench that nothing is asked of."""
    with Bench(tmp_path) as found:
        yield found


@pytest.fixture
def behave(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[Case], Finding]], None]:
    """Replace what every check does."""

    def install(what: Callable[[Case], Finding]) -> None:
        monkeypatch.setattr(Check, "run", lambda _self, one, _bench: what(one))

    return install


def finding(passed: bool, value: float = 0.5) -> Finding:  # noqa: FBT001 - the verdict
    """A finding with a value."""
    return Finding(
        passed=passed, summary=f"value {value}", value=value, limit=1.0, places=("here",)
    )


def test_an_exception_in_a_case_is_its_result_and_costs_no_other(
    bench: Bench, behave: Callable[[Callable[[Case], Finding]], None]
) -> None:
    """Three cases, one broken, three results."""

    def check(one: Case) -> Finding:
        if one.model == "tied":
            raise ZeroDivisionError("broken check")
        return finding(passed=True)

    behave(check)
    report = run_cases([case("nano-4b"), case("tied"), case("puzzle")], bench)
    assert [one.status for one in report.results] == ["passed", "error", "passed"]
    assert "ZeroDivisionError: broken check" in report.results[1].traceback
    assert report.count_line == "2 passed, 0 failed, 1 error"
    assert report.exit_code == 3


def test_a_layout_of_more_ranks_than_there_are_is_not_run_and_not_passed(
    bench: Bench, behave: Callable[[Callable[[Case], Finding]], None]
) -> None:
    """Counted for its reason; forgiven only where that is allowed."""

    def check(one: Case) -> Finding:
        if one.model == "tied":
            raise RanksUnavailableError("layout tp4-pp1 has 4 ranks, torchrun has started 2")
        return finding(passed=True)

    behave(check)
    cases = [case("nano-4b"), case("tied")]
    report = run_cases(cases, bench)
    assert report.count_line == "1 passed, 0 failed, 1 not run (ranks)"
    assert report.exit_code == 3
    assert run_cases(cases, bench, allowed_not_run=["ranks"]).exit_code == 0


def test_an_error_of_the_user_is_kept_with_its_places(
    bench: Bench, behave: Callable[[Callable[[Case], Finding]], None]
) -> None:
    """Code, place and help, as on the command line."""

    def check(_one: Case) -> Finding:
        raise CheckpointError("gone", where="/there", hint="look")

    behave(check)
    (result,) = run_cases([case("tied")], bench).results
    assert result.status == "error"
    assert result.traceback == "BR300 gone\n  --> /there\nhelp: look"


def test_a_failure_outranks_an_error_in_the_exit_code(
    bench: Bench, behave: Callable[[Callable[[Case], Finding]], None]
) -> None:
    """1 says that the conversion is wrong; 3 only that something could not be tried."""

    def check(one: Case) -> Finding:
        if one.model == "tied":
            raise ZeroDivisionError
        return finding(passed=False)

    behave(check)
    report = run_cases([case("nano-4b"), case("tied")], bench)
    assert report.exit_code == 1
    assert report.count_line == "0 passed, 1 failed, 1 error"


def test_a_case_without_its_device_is_counted_as_not_run(
    bench: Bench,
    behave: Callable[[Callable[[Case], Finding]], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A skip is never a pass, unless it was allowed by name; then something else must pass."""
    monkeypatch.setattr(runner, "_unavailable", lambda one: "gpu" if one.device == "cuda" else None)
    behave(lambda _one: finding(passed=True))
    cases = [case("tied"), case("tied", device="cuda"), case("puzzle", device="cuda")]
    report = run_cases(cases, bench)
    assert report.count_line == "1 passed, 0 failed, 2 not run (gpu)"
    assert report.exit_code == 3
    assert run_cases(cases, bench, allowed_not_run=["gpu"]).exit_code == 0
    assert run_cases(cases[1:], bench, allowed_not_run=["gpu"]).exit_code == 3


@pytest.mark.parametrize(
    ("device", "layers", "there", "reason"),
    [
        ("cpu", "local", (), None),
        ("cpu", "te", ("gpu", "transformer_engine"), "transformer-engine"),
        ("cuda", "local", (), "gpu"),
        ("cuda", "te", (), "gpu"),
        ("cuda", "local", ("gpu",), None),
        ("cuda", "te-fused", ("gpu",), "transformer-engine"),
        ("cuda", "te-fused", ("gpu", "transformer_engine"), None),
        ("cuda", "te-flash", ("gpu", "transformer_engine"), "flash-attn"),
        ("cuda", "te-flash", ("gpu", "transformer_engine", "flash_attn"), None),
    ],
)
def test_what_a_case_lacks_is_named(
    monkeypatch: pytest.MonkeyPatch,
    device: str,
    layers: str,
    there: tuple[str, ...],
    reason: str | None,
) -> None:
    """A card, Transformer Engine on it, flash-attn in that: whichever is missing first."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: "gpu" in there)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name if name in there else None)
    one = replace(case("tied", device=device), layers=layers)
    assert runner._unavailable(one) == reason


def test_cases_run_by_layout_and_each_result_is_told_at_once(
    bench: Bench,
    behave: Callable[[Callable[[Case], Finding]], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """No ranks first, then tp1-pp1, whose logits others are compared with."""
    behave(lambda _one: finding(passed=True))
    told: list[str] = []
    cases = [
        case("tied", "layouts", layout="tp2-pp1", probe="short"),
        case("tied", "logits", layout="tp1-pp1", probe="short"),
        case("nano-4b", "logits", layout="tp2-pp1", probe="short"),
        case("tied"),
    ]
    monkeypatch.setattr(bench, "pool", lambda _device: _NoPool())
    run_cases(cases, bench, on_result=lambda one: told.append(one.case.id))
    assert told == [
        "config/tied/float32",
        "logits/tied/tp1-pp1/float32/short",
        "layouts/tied/tp2-pp1/float32/short",
        "logits/nano-4b/tp2-pp1/float32/short",
    ]


class _NoPool:
    def warm_up(self) -> None:
        """Start nothing."""

    def close(self) -> None:
        """Nothing was started."""


def test_the_parity_suite_forms_each_layout_once() -> None:
    """Seven layouts, seven groups; round trips need none."""
    ordered = in_running_order(load_suite("parity").cases)
    ranks = [one.layout for one in ordered if one.layout and one.check != "round_trip"]
    changes = [b for a, b in zip([None, *ranks], ranks, strict=False) if a != b]
    assert len(set(ranks)) == len(changes)
    assert changes[0] == "tp1-pp1"


def results() -> RunReport:
    """A run with one of each kind of result."""
    logits = {"check": "logits", "layout": "tp2-pp1"}
    return RunReport(
        results=[
            Result(case=case("tied"), status="passed", finding=finding(passed=True)),
            Result(
                case=case("tied", **logits, probe="short"), status="failed",
                finding=finding(passed=False, value=37.5),
            ),
            Result(
                case=case("tied", **logits, probe="long"), status="passed",
                finding=finding(passed=True, value=1.25),
            ),
            Result(case=case("puzzle"), status="error", reason="E", traceback="trace\nback"),
            Result(case=case("puzzle", device="cuda"), status="not run", reason="gpu"),
            Result(
                case=case("puzzle", **logits, probe="long"), status="failed",
                finding=finding(passed=False, value=math.nan),
            ),
        ],
        seconds=2.5,
    )  # fmt: skip


def test_the_text_report_shows_every_model_and_every_failure_with_its_place() -> None:
    """One row per model; the worst excess by layout; nothing hidden behind the count."""
    stream = io.StringIO()
    print_report(results(), Console(file=stream, width=200))
    lines = stream.getvalue().splitlines()
    assert lines[0].split() == ["model", "config", "logits"]
    assert lines[1].split() == ["tied", "1/1", "1/2", "FAILED"]
    assert lines[2].split() == ["puzzle", "0/2", "ERROR", "0/1", "FAILED"]
    text = stream.getvalue()
    assert "tied    37.5" in text
    assert "puzzle  not measured" in text
    assert "FAILED logits/tied/tp2-pp1/float32/short\n  value 37.5\n  --> here" in text
    assert "ERROR config/puzzle/float32\n  trace\n  back" in text
    assert lines[-1].strip() == "2 passed, 2 failed, 1 error, 1 not run (gpu) in 2 s"


def test_the_registry_names_modules_that_exist_and_claims_in_words() -> None:
    """A check is one file under harness/checks of its own name."""
    folder = Path(checks.__file__).parent
    files = {path.stem for path in folder.glob("*.py")} - {"__init__"}
    assert files == set(checks.CHECKS)
    assert all(check.claim and not check.claim.endswith(".") for check in checks.CHECKS.values())
