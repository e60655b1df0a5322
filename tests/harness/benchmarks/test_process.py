"""What is said of a child is true of the child, and of nothing else."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import psutil
import pytest

from harness.benchmarks.process import Run, environment, run

MIB = 1 << 20


def python(code: str) -> list[str]:
    """A command that runs some Python, with nothing imported beforehand."""
    return [sys.executable, "-I", "-S", "-c", code]


def test_the_peak_is_what_the_child_allocated() -> None:
    """600 MiB, touched and given back before the end, on top of a bare interpreter."""
    found = run(python(f"held = b'x' * {600 * MIB}; del held"), timeout=60)
    assert found.exit_code == 0
    assert 600 * MIB <= found.peak_rss < 625 * MIB


def test_the_peak_of_this_process_is_no_part_of_it() -> None:
    """A child starts with its parent's peak on Linux, unless somebody small is in between."""
    held = b"x" * (400 * MIB)
    found = run(python("pass"), timeout=60)
    assert len(held) == 400 * MIB
    assert 0 < found.peak_rss < 100 * MIB


def test_the_peak_of_a_tree_is_that_of_all_its_processes_at_once() -> None:
    """Three that hold 100 MiB each until all do: the largest alone is not the whole."""
    child = f"held = b'x' * {100 * MIB}; print(flush=True); input()"
    parent = (
        "import subprocess, sys, time\n"
        f"words, pipe = [sys.executable, '-I', '-S', '-c', {child!r}], subprocess.PIPE\n"
        "all = [subprocess.Popen(words, stdin=pipe, stdout=pipe) for _ in '123']\n"
        "for one in all: one.stdout.readline()\n"
        "time.sleep(1)\n"
        "for one in all: one.communicate(b'\\n')\n"
    )
    alone = run(python(parent), timeout=60)
    together = run(python(parent), timeout=60, tree=True)
    assert 100 * MIB <= alone.peak_rss < 200 * MIB
    assert 300 * MIB <= together.peak_rss < 400 * MIB


def test_the_seconds_are_the_command_s() -> None:
    """At least what it slept."""
    assert run(python("import time; time.sleep(0.3)"), timeout=60).seconds >= 0.3


def test_a_failure_has_its_exit_code_and_the_end_of_stderr() -> None:
    """What a table can show of it."""
    code = "import sys; print('out'); sys.stderr.write('first\\nthen\\n'); sys.exit(7)"
    found = run(python(code), timeout=60)
    assert found.exit_code == 7
    assert found.stdout == "out\n"
    assert found.failure == "exit code 7: first | then"
    assert found.json() is None


def test_a_death_by_signal_is_a_failure() -> None:
    """As when the system runs out of memory."""
    found = run(python("import os; os.kill(os.getpid(), 9)"), timeout=60)
    assert found.exit_code == -9
    assert found.failure


def test_a_program_that_is_not_there_is_a_failure_that_names_it() -> None:
    """127, as a shell has it."""
    found = run(["nemotron-no-such-program"], timeout=60)
    assert found.exit_code == 127
    assert "nemotron-no-such-program" in found.failure


def test_at_the_time_limit_everything_is_ended(tmp_path: Path) -> None:
    """The command, and the process it had started."""
    started = tmp_path / "pid"
    code = (
        "import subprocess, sys, time, pathlib\n"
        "sleep = 'import time; time.sleep(60)'\n"
        "one = subprocess.Popen([sys.executable, '-I', '-S', '-c', sleep])\n"
        f"pathlib.Path({str(started)!r}).write_text(str(one.pid))\n"
        "time.sleep(60)\n"
    )
    found = run(python(code), timeout=3)
    assert found.timed_out
    assert "time limit" in found.failure
    assert _gone(int(started.read_text()))


def _gone(pid: int) -> bool:
    """Whether a killed process has ended; a zombie without a parent has."""
    for _ in range(100):
        try:
            if psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
                return True
        except psutil.NoSuchProcess:
            return True
        time.sleep(0.05)
    return False


def test_json_is_what_it_printed() -> None:
    """One document, whatever a library has to say before and after it."""
    assert run(python("print('{\"a\": 1}')"), timeout=60).json() == {"a": 1}
    noisy = Run(
        seconds=1.0, exit_code=0, peak_rss=1,
        stdout='[rank 0] {hello}\n{not json}\n{\n  "a": {\n    "b": [1]\n  }\n}\nbye\n',
    )  # fmt: skip
    assert noisy.json() == {"a": {"b": [1]}}


@pytest.mark.parametrize("stdout", ["", "[1]", '{"a": ', 'a {"a": 1}'])
def test_what_is_no_json_object_is_none(stdout: str) -> None:
    """Cut short by a kill, or something else."""
    assert Run(seconds=1.0, exit_code=0, peak_rss=1, stdout=stdout).json() is None


def test_children_may_keep_their_bytecode(monkeypatch: pytest.MonkeyPatch) -> None:
    """Or each start-up would be measured with compiling everything."""
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    monkeypatch.setenv("KEPT", "yes")
    assert "PYTHONDONTWRITEBYTECODE" not in environment()
    assert environment()["KEPT"] == "yes"
    assert os.environ["PYTHONDONTWRITEBYTECODE"] == "1"
