"""Ranks and workers of the harness that stop, hang or leave, and a run that is ended."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
import pytest

from bridge.crew import bounds
from bridge.spec import ParallelLayout
from harness.errors import WorkerFailedError, WorkerTimeoutError
from harness.launcher import RankPool
from harness.workers import over_benches

if TYPE_CHECKING:
    from tests import leftovers
    from tests.harness import rank_functions as ranks
else:  # modules beside this file and above it: tests are not a package
    sys.path += [str(Path(__file__).parent), str(Path(__file__).parents[1])]
    import leftovers
    import rank_functions as ranks

pytestmark = pytest.mark.ranks

ROOT = Path(__file__).parents[2]
TIMEOUT = 4.0
"""Seconds that a call may take."""
ORPHANED = 20.0
"""Seconds until the processes of a killed run have ended, on a busy machine."""
OTHERS = ("torchinductor_",)
"""Of what torch keeps in TMPDIR: a cache for all runs of a user."""
TWO = ParallelLayout(tensor_model_parallel_size=2, num_layers_per_stage=(1,))


@pytest.fixture(scope="module")
def pool() -> Iterator[RankPool]:
    """One pool for all tests."""
    with RankPool(timeout=60) as found:
        yield found


@pytest.mark.parametrize(
    ("how", "said"), [("stop", "4 s: it is stopped, as by SIGSTOP (nor"), ("sleep", "4 s (nor")]
)
def test_the_rank_that_others_wait_for_is_the_one_that_is_named(
    pool: RankPool, how: str, said: str
) -> None:
    """Rank 0 does not return either, but from a collective; its stack says so."""
    pool.run(TWO, ranks.pid)
    with pytest.raises(WorkerTimeoutError, match="rank 1 of 2 did not finish within") as caught:
        pool.run(TWO, ranks.wait_for, 1, how, timeout=TIMEOUT)
    assert caught.value.rank == 1
    assert f"did not finish within {said} did ranks [0])" in caught.value.message
    assert "torch/distributed" in caught.value.log_tails[0]
    assert ("in wait_for" in caught.value.log_tails[1]) is (how == "sleep")
    assert pool.run(TWO, ranks.total, 1.0) == [3.0, 3.0]


def test_a_rank_that_calls_exit_shows_where(pool: RankPool) -> None:
    """Before the others complain that it is gone."""
    with pytest.raises(WorkerFailedError, match="rank 1 of 2 failed with SystemExit: 7") as caught:
        pool.run(TWO, ranks.wait_for, 1, "exit", timeout=30)
    assert "in wait_for" in caught.value.rank_traceback


def _script(directory: Path, body: str) -> Path:
    script = directory / "run.py"
    script.write_text(
        f"import sys\nsys.path += [{str(Path(__file__).parent)!r}, {str(ROOT)!r}]\n"
        + textwrap.dedent(body)
    )
    return script


def test_ranks_of_a_killed_run_end_though_one_is_stopped(
    tmp_path: Path, session: leftovers.Session
) -> None:
    """It is woken up, to end as the others do, by the process that it is forked from.

    Which is stopped, too. The pool's directory is gone as well, and the socket of that process.
    """
    script = _script(
        tmp_path,
        """
        import rank_functions as ranks
        from bridge.crew.attendants import attendant
        from bridge.spec import ParallelLayout
        from harness.launcher import RankPool

        pool = RankPool(timeout=240)
        layout = ParallelLayout(tensor_model_parallel_size=2, num_layers_per_stage=(1,))
        pool.run(layout, ranks.pid)
        attendant("forkserver").suspend()
        print(*pool.run(layout, ranks.pid), flush=True)
        pool.run(layout, ranks.wait_for, 0, "stop")
        """,
    )
    with subprocess.Popen(  # noqa: S603 - our own
        [sys.executable, str(script)], stdout=subprocess.PIPE, text=True,
        env=os.environ | session.variables(),
    ) as process:  # fmt: skip
        assert process.stdout is not None
        first = psutil.Process(int(process.stdout.readline().split()[0]))
        assert leftovers.until(lambda: first.status() == psutil.STATUS_STOPPED)
        process.kill()
    assert session.leftovers(seconds=ORPHANED, apart_from=OTHERS) == []


@pytest.mark.cluster
def test_processes_with_benches_of_a_killed_run_end_and_take_their_scratch_along(
    tmp_path: Path, session: leftovers.Session
) -> None:
    """Though one is stopped."""
    (tmp_path / "pids").mkdir()
    script = _script(
        tmp_path,
        f"""
        import rank_functions as ranks
        from harness.workers import over_benches

        if __name__ == "__main__":
            arguments = [({str(tmp_path / "pids")!r},)] * 2
            list(over_benches(ranks.say_and_sleep, arguments, workers=2, timeout=60))
        """,
    )
    with subprocess.Popen(  # noqa: S603 - our own
        [sys.executable, str(script)], env=os.environ | session.variables()
    ) as process:
        assert leftovers.until(lambda: len(list((tmp_path / "pids").iterdir())) == 2, seconds=120)
        psutil.Process(int(next((tmp_path / "pids").iterdir()).name)).suspend()
        process.kill()
    assert session.leftovers(seconds=ORPHANED, apart_from=OTHERS) == []


@pytest.mark.cluster
@pytest.mark.usefixtures("nobody_stays_behind")
@pytest.mark.parametrize(
    ("last", "said"), [(3, "has given no sign of life for 3 s: it is stopped"), (5, "was ended")]
)
def test_a_process_with_a_bench_that_stops_or_dies_ends_the_run(
    monkeypatch: pytest.MonkeyPatch, last: int, said: str
) -> None:
    """What was done before has been given."""
    monkeypatch.setattr(bounds, "FROZEN", 3.0)
    done: list[tuple[int, int]] = []
    started = time.monotonic()
    with pytest.raises(WorkerFailedError, match=said):
        done.extend(over_benches(ranks.double, [(1,), (2,), (last,)], workers=1, timeout=60))
    assert time.monotonic() - started < 3 + bounds.DEATH + 60


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
@pytest.mark.cluster
def test_a_suite_that_is_told_to_end_clears_up(
    tmp_path: Path, session: leftovers.Session, number: int, code: int
) -> None:
    """Ranks and scratch; the report can be resumed."""
    command = [sys.executable, "-m", "harness", "parity", "--report", str(tmp_path / "report")]
    process = subprocess.Popen(  # noqa: S603 - our own
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT,
        env=os.environ | session.variables(),
    )  # fmt: skip
    journal = tmp_path / "report" / "journal.jsonl"
    running = leftovers.until(
        lambda: journal.is_file() and len(journal.read_text().splitlines()) > 12, seconds=200
    )
    assert running
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == code, err
    assert "Traceback" not in err
    assert session.leftovers(seconds=ORPHANED, apart_from=OTHERS) == []
