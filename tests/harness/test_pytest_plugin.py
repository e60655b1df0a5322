"""The pytest plugin, run as another project's pytest would run it."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path

import numpy as np
import pytest

from harness.toys import toy_named, write_checkpoint

pytest_plugins = ["pytester"]

INSTALLED = any(one.name == "nemotron_bridge" for one in entry_points(group="pytest11"))
PLUGIN = () if INSTALLED else ("-p", "harness.pytest_plugin")
GOLDEN_TEST = """
import numpy as np

def test_logits(nemotron_golden):
    nemotron_golden.check(np.arange(12.0).reshape(1, 2, 6) {change}, "logits")
"""


@pytest.fixture(autouse=True)
def at_home(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not in CI, and the package is found from anywhere."""
    monkeypatch.delenv("CI", raising=False)
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))


def run(pytester: pytest.Pytester, *args: str) -> pytest.RunResult:
    """Run pytest in a process of its own, as strict as a careful project's."""
    return pytester.runpytest_subprocess(
        *PLUGIN, "-W", "error", "--strict-markers", "-p", "no:cacheprovider", *args
    )


def test_loading_the_plugin_imports_nothing_heavy() -> None:
    """It is loaded in every run of an environment that has it."""
    code = (
        "import sys, harness.pytest_plugin as _\n"
        "print(sorted({'torch', 'megatron', 'numpy', 'transformers'} & {*sys.modules}))"
    )
    found = subprocess.run(  # noqa: S603 - our own words
        [sys.executable, "-c", code], check=True, capture_output=True, text=True, timeout=60
    )
    assert found.stdout.strip() == "[]"


def test_each_check_on_each_layout_is_a_test_of_its_own(pytester: pytest.Pytester) -> None:
    """Ids say what runs; a check without layouts comes once."""
    pytester.makepyfile("""
        import pytest

        @pytest.mark.parity(
            model="nowhere", layouts=["tp1-pp1", "tp2-pp1"], checks=["config", "rope"]
        )
        class TestMine:
            def test_it(self): ...
    """)
    result = run(pytester, "--collect-only", "-q")
    assert [line.partition("[")[2].rstrip("]") for line in result.outlines if "[" in line] == [
        "config/float32",
        "rope/tp1-pp1/float32",
        "rope/tp2-pp1/float32",
    ]


def test_a_mark_that_makes_no_sense_is_one_error(pytester: pytest.Pytester) -> None:
    """Misspelt checks end the collection with the known names, and no traceback."""
    pytester.makepyfile("""
        import pytest

        @pytest.mark.parity(model="nowhere", checks=["logitz"])
        def test_it(): ...
    """)
    result = run(pytester)
    result.assert_outcomes(errors=1)
    result.stdout.fnmatch_lines(["*check 'logitz'*", "*checks are config*"])
    result.stdout.no_fnmatch_line("*Traceback*")


def test_a_good_checkpoint_passes_and_a_wrong_twin_fails_with_its_place(
    pytester: pytest.Pytester,
) -> None:
    """Over two xdist workers: mark, fixture, evidence of both workers, and the failing tensor."""
    from bridge.convert import import_checkpoint

    toy = toy_named("nano-8b")
    write_checkpoint(toy, pytester.path / "mine", seed=0)
    write_checkpoint(toy, pytester.path / "other", seed=1)
    import_checkpoint(pytester.path / "other", pytester.path / "twin")
    pytester.makepyfile("""
        import pytest

        @pytest.fixture
        def parity_model():
            return "mine"

        @pytest.mark.parity(checks=["config", "round_trip"])
        def test_mine(parity_case):
            assert parity_case.model == "mine"

        def test_twin(parity):
            parity("mine", "twin", checks=["round_trip"])
    """)
    result = run(pytester, "-n", "2", "--nemotron-report", "report")
    result.assert_outcomes(passed=2, failed=1)
    result.stdout.fnmatch_lines(
        ["*FAILED round_trip/mine*", "*-->*model.*elements differ*", "*2 passed, 1 failed*"]
    )
    evidence = json.loads((pytester.path / "report" / "evidence.json").read_text())
    assert sorted(case["status"] for case in evidence["cases"]) == ["failed", "passed", "passed"]


def test_goldens_are_missing_then_written_then_held_to(pytester: pytest.Pytester) -> None:
    """Missing fails; only the flag writes; the same passes; one ulp of a million fails."""
    pytester.makepyfile(test_mine=GOLDEN_TEST.format(change=""))
    result = run(pytester)
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["*golden logits is missing*", "*--nemotron-golden-update*"])
    assert not (pytester.path / "goldens").exists()
    run(pytester, "--nemotron-golden-update").assert_outcomes(passed=1)
    recorded = json.loads((pytester.path / "goldens" / "logits.json").read_text())
    rows = np.array(recorded["golden"]["logits"])
    assert rows[:, :-1].tolist() == np.arange(12.0).reshape(2, 6).tolist()
    assert rows[0, -1] == pytest.approx(np.log(np.exp(np.arange(6.0)).sum()), rel=1e-9)
    run(pytester).assert_outcomes(passed=1)
    pytester.makepyfile(test_mine=GOLDEN_TEST.format(change="* (1 + 1e-6)"))
    result = run(pytester)
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["*numbers differ by more than 1e-08 x rms*"])


def test_a_golden_that_no_test_uses_fails_the_run_until_it_is_removed(
    pytester: pytest.Pytester,
) -> None:
    """Under xdist too; but not when its test was only left out."""
    pytester.makepyfile(test_mine=GOLDEN_TEST.format(change="") + "\ndef test_other(): ...\n")
    run(pytester, "--nemotron-golden-update")
    assert run(pytester, "-k", "other").ret == pytest.ExitCode.OK
    pytester.makepyfile(test_mine="def test_other(): ...\n")
    for arguments in ((), ("-n", "2")):
        result = run(pytester, *arguments)
        assert result.ret == pytest.ExitCode.TESTS_FAILED
        result.stdout.fnmatch_lines(["*no test uses this golden*logits.json"])
    run(pytester, "--nemotron-golden-update")
    assert not list((pytester.path / "goldens").iterdir())


def test_goldens_are_never_written_in_ci(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There, they would agree with whatever is wrong."""
    monkeypatch.setenv("CI", "true")
    pytester.makepyfile(test_mine=GOLDEN_TEST.format(change=""))
    result = run(pytester, "--nemotron-golden-update")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    assert not (pytester.path / "goldens").exists()
