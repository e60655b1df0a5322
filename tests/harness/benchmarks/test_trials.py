"""Trials run in turns, failures are told and end nothing else, sums are those of the runs."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from harness.benchmarks import page_cache
from harness.benchmarks.process import Run
from harness.benchmarks.trials import Outcome, Trial, in_turns, measurement
from harness.benchmarks.workspace import Workspace


def append(path: Path, letter: str, code: int = 0) -> list[str]:
    """A command that leaves a letter behind."""
    script = f"open({str(path)!r}, 'a').write({letter!r}); raise SystemExit({code})"
    return [sys.executable, "-I", "-S", "-c", script]


def test_trials_alternate_and_a_failing_one_stops_alone(work: Workspace, tmp_path: Path) -> None:
    """`cp, import, cp, import`: a machine that slows down slows both."""
    log = tmp_path / "log"
    found = in_turns(
        work,
        [
            Trial(name="a", command=append(log, "a")),
            Trial(name="bad", command=append(log, "x", code=3)),
            Trial(name="b", command=append(log, "b")),
        ],
        repeats=3,
    )
    assert log.read_text() == "axbabab"
    assert [len(found[name].runs) for name in ("a", "bad", "b")] == [3, 0, 3]
    assert found["bad"].problem == "exit code 3: nothing on stderr"
    failed = measurement("g", Trial(name="bad", command=[]), found["bad"], conditions={})
    assert (failed.status, failed.reason) == ("failed", "exit code 3: nothing on stderr")


def test_the_target_is_gone_before_and_after_each_run(work: Workspace, tmp_path: Path) -> None:
    """`mkdir` fails where there is one."""
    target = tmp_path / "target"
    target.mkdir()
    trial = Trial(name="mkdir", command=["mkdir", target], target=target)
    found = in_turns(work, [trial], repeats=2)
    assert len(found["mkdir"].runs) == 2
    assert not target.exists()


def test_a_cache_that_cannot_be_emptied_is_no_failure(
    work: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The figure is left out, and nothing is run: it would not be what it is called."""
    (tmp_path / "source").mkdir()
    trial = Trial(name="a", command=append(tmp_path / "log", "a"), source=tmp_path / "source")
    for name, answer, reason in (
        ("drop", False, "no way to empty the page cache"),
        ("cached_share", 0.5, "50% of the source stayed in the page cache"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(page_cache, name, lambda _path, answer=answer: answer)
            found = in_turns(work, [trial], repeats=1, cache="cold")
        left_out = measurement("g", trial, found["a"], conditions={})
        assert left_out.status == "not run"
        assert reason in left_out.reason
    assert not (tmp_path / "log").exists()


def ran(seconds: float, peak_rss: int) -> Run:
    """A run that took this."""
    return Run(seconds=seconds, exit_code=0, peak_rss=peak_rss)


def test_a_measurement_sums_up_the_runs() -> None:
    """Medians of times (3 s) and details (1 s), the largest memory, ratios to cp's median (2 s)."""
    outcome = Outcome(
        runs=[ran(4.0, 10), ran(3.0, 30), ran(2.0, 20)],
        details=[{"verify_seconds": 5.0}, {"verify_seconds": 1.0}, {"verify_seconds": 0.5}],
    )
    copy = Outcome(runs=[ran(2.0, 1), ran(9.0, 1), ran(1.0, 1)])
    found = measurement(
        "import", Trial(name="import", command=[]), outcome, conditions={"cache": "warm"},
        size=6 * 10**9, references={"cp": copy, "cp_on_disk": None},
        plain=Outcome(runs=[ran(2.5, 1)]),
        limits={"ratio_to_cp": 1.4, "median_seconds": 3.0, "load_ratio_to_cp": 0.0},
    )  # fmt: skip
    assert found.samples == [4.0, 3.0, 2.0]
    assert found.values == {
        "peak_rss_bytes": 30.0,
        "verify_seconds": 1.0,
        "gb_per_second": 2.0,
        "ratio_to_cp": 1.5,
        "added_ratio_to_cp": 0.25,
        "verify_ratio_to_cp": 0.5,
    }
    assert [(one.name, one.met) for one in found.limits] == [
        ("ratio_to_cp", False),
        ("median_seconds", True),
    ]


def test_a_trial_may_count_a_part_of_its_process(work: Workspace) -> None:
    """What it printed as its time is its time, and no figure besides; the rest is as ever."""
    trial = Trial(
        name="load",
        command=[sys.executable, "-I", "-S", "-c", 'print(\'{"load_seconds": 4, "more": 7}\')'],
        details=lambda run: run.json() or {},
        counted="load_seconds",
    )
    outcome = in_turns(work, [trial], repeats=2)["load"]
    assert outcome.samples == [4, 4]
    read = Outcome(counted="s", runs=[ran(9.0, 1)], details=[{"s": 2.0}])
    found = measurement(
        "load", trial, outcome, conditions={}, size=8 * 10**9, references={"read": read}
    )
    assert found.samples == [4, 4]
    assert found.values.keys() == {"peak_rss_bytes", "more", "gb_per_second", "ratio_to_read"}
    assert (found.values["gb_per_second"], found.values["ratio_to_read"]) == (2.0, 2.0)


def test_a_trial_that_does_not_print_its_time_has_failed(work: Workspace) -> None:
    """The time of its process stands for nothing."""
    trial = Trial(name="a", command=["true"], counted="load_seconds")
    outcome = in_turns(work, [trial], repeats=2)["a"]
    found = measurement("load", trial, outcome, conditions={})
    assert (found.status, found.reason) == ("failed", "it did not print load_seconds")
