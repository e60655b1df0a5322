"""Every kind of input, mutated: a short run, and readers that such a run must catch."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from harness.fuzz import yamls
from harness.fuzz.kinds import KINDS
from harness.fuzz.mutation import mutate
from harness.fuzz.pickles import CANARY, PAYLOADS
from harness.fuzz.run import shares

HERE = Path(__file__).parent
FUZZ = (sys.executable, "-m", "harness", "fuzz")


@pytest.fixture(scope="module")
def caught(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a run finds in broken readers, in a process of its own: it forks."""
    done = subprocess.run(  # noqa: S603 - our own command
        [sys.executable, str(HERE / "broken_readers.py"), str(tmp_path_factory.mktemp("broken"))],
        capture_output=True, text=True, check=True, timeout=120,
    )  # fmt: skip
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.mark.parametrize(
    ("kind", "problem"),
    [
        ("throws", "KeyError"),
        ("leaves", "SystemExit"),
        ("vanishes", "exit 0"),
        ("killed", "signal SIGKILL"),
        ("crashes", "signal SIGSEGV"),
        ("hangs", "hang"),
        ("loops", "hang"),
        ("grows", "memory"),
        ("bounded", "memory"),
        ("runs", "payload ran"),
        ("never", "the original is not to be BR300"),
    ],
)
def test_a_broken_reader_is_caught_and_the_run_goes_on(
    caught: dict[str, Any], kind: str, problem: str
) -> None:
    """That problem and no other, and every input of the kind was read all the same."""
    found = caught["kinds"][kind]
    assert [problem] == found["problems"]
    assert found["inputs"] == 12
    others = found["accepted"] + sum(found["refused"].values())
    assert others + found["findings"] - (kind == "never") == 12


def test_a_refusal_with_a_code_is_no_finding(caught: dict[str, Any]) -> None:
    """It is counted by its code."""
    found = caught["kinds"]["refuses"]
    assert found["findings"] == 0
    assert found["refused"]["BR300"] > 0


def test_a_hang_says_where(caught: dict[str, Any]) -> None:
    """The stack, down to the line that sleeps; and nothing is left behind but the world."""
    assert "in _hang" in caught["hang"][0]
    assert caught["left"] == ["world"]


@pytest.fixture(scope="module")
def short_run(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Some 2,000 inputs of all kinds; the tokenizer's, which need transformers, are few."""
    report = tmp_path_factory.mktemp("fuzz")
    done = subprocess.run(  # noqa: S603 - our own command
        [*FUZZ, "--inputs", "2000", "--seed", "11", "--report", str(report), "--json"],
        capture_output=True, text=True, check=False, timeout=280,
    )  # fmt: skip
    found: dict[str, Any] = json.loads(done.stdout)
    assert found == json.loads((report / "fuzz.json").read_text("utf-8"))
    assert done.returncode == 0, json.dumps(found["findings"], indent=1)
    return found


def test_no_input_of_any_kind_is_a_finding(short_run: dict[str, Any]) -> None:
    """Each was read or refused with a code, and no payload ran."""
    assert short_run["verdict"] == "passed"
    assert short_run["inputs"] == 2000
    assert set(short_run["kinds"]) == {kind.name for kind in KINDS}
    assert short_run["payloads"] > 0
    assert short_run["payloads_ran"] == 0


def test_inputs_are_neither_all_read_nor_all_refused(short_run: dict[str, Any]) -> None:
    """Else mutations are too weak, or so strong that only the first check is ever reached."""
    kinds = short_run["kinds"].values()
    assert sum(one["accepted"] for one in kinds) > 200
    codes = {code for one in kinds for code in one["refused"]}
    assert len(codes) >= 10
    assert sum(sum(one["refused"].values()) for one in kinds) > 500


@pytest.fixture
def inside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A directory that payloads may write to, and where they run."""
    monkeypatch.chdir(tmp_path)
    yield tmp_path / CANARY
    shutil.rmtree(tmp_path, ignore_errors=True)


@pytest.mark.filterwarnings("ignore")  # payloads close nothing
def test_payloads_are_real(inside: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Most make the file when Python's own loaders get them; the others try."""
    ran = 0
    for attack in PAYLOADS:
        try:
            pickle.loads(attack)  # noqa: S301 - that is the point
        except Exception:  # noqa: BLE001, S112 - some name what is not installed
            continue
        finally:
            ran += inside.exists()
            inside.unlink(missing_ok=True)
    assert ran >= 12
    for text in yamls.PAYLOADS[:4]:
        yaml.load(f"a: {text}", Loader=yaml.UnsafeLoader)  # noqa: S506 - that is the point
        assert inside.exists(), text
        inside.unlink()
    capfd.readouterr()


def test_the_same_numbers_give_the_same_input() -> None:
    """Whatever was mutated before; other numbers give other inputs."""
    originals = [b'{"a": [1, 2.5, "x"], "b": {"c": null}}' * 1, b'{"d": true}']
    kind = next(one for one in KINDS if one.name == "replay")

    def made(index: int, seed: int = 3) -> bytes:
        return mutate(kind.name, kind.form, originals, seed=seed, index=index).data

    first = [made(index) for index in range(300)]
    assert first[::-1] == [made(index) for index in reversed(range(300))]
    assert len(set(first)) > 250
    assert made(5, seed=4) != made(5)


def test_no_kind_goes_without_and_all_are_as_many_as_asked() -> None:
    """Even where shares are below one input."""
    for inputs in (100, 2000, 100_000):
        counts = shares(KINDS, inputs)
        assert sum(counts.values()) == inputs
        assert min(counts.values()) >= 1


def fuzz(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the command."""
    return subprocess.run(  # noqa: S603 - our own command
        [*FUZZ, *arguments], capture_output=True, text=True, check=False, timeout=120
    )


def test_an_input_is_replayed_by_its_name(tmp_path: Path) -> None:
    """Its bytes are kept, the same each time, and what it raises is what a user sees."""
    done = fuzz("--replay", "tracker:0:3", "--report", str(tmp_path))
    kept = (tmp_path / "findings" / "tracker-0-3").read_bytes()
    tracker = next(one for one in KINDS if one.name == "tracker")
    again = mutate("tracker", tracker.form, [b"0"], seed=0, index=3)
    assert again.data == kept
    assert done.returncode in {0, 2}
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "arguments", [("--replay", "variant"), ("--replay", "x:0:1"), ("--only", "x")]
)
def test_what_names_nothing_is_bad_usage(arguments: tuple[str, str]) -> None:
    """Exit 2, and for a kind the names that there are."""
    done = fuzz(*arguments)
    assert done.returncode == 2
    assert "BR001" in done.stderr


def test_an_interrupted_run_says_what_it_has_seen(tmp_path: Path) -> None:
    """Ctrl-C: the table, exit 130, and nothing left in memory's file system or running."""
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    with subprocess.Popen(  # noqa: S603 - our own command
        [*FUZZ, "--inputs", "20000", "--only", "variant", "--only", "journal"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment,
        start_new_session=True,
    ) as run:  # fmt: skip
        assert run.stderr is not None
        run.stderr.readline()  # a tenth is done
        os.killpg(run.pid, signal.SIGINT)
        out, _ = run.communicate(timeout=60)
    assert run.returncode == 130
    assert "ended early" in out
    for _ in range(100):  # what multiprocessing has started ends when it sees that we have
        try:
            os.killpg(run.pid, 0)
        except ProcessLookupError:
            return
        time.sleep(0.2)
    pytest.fail("something of it still runs")
