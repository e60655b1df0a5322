"""Rank processes form any layout, stay alive between calls, and fail loudly and at once."""

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

import pytest

from bridge.errors import CheckpointError
from bridge.spec import ParallelLayout
from harness.errors import BackendUnavailableError, WorkerFailedError, WorkerTimeoutError
from harness.launcher import RankPool

if TYPE_CHECKING:
    from tests.harness import rank_functions as ranks
else:  # a module beside this file: tests are not a package
    sys.path.append(str(Path(__file__).parent))
    import rank_functions as ranks

pytestmark = pytest.mark.ranks


def layout(tp: int = 1, pp: int = 1, vp: int | None = None) -> ParallelLayout:
    """One layer per stage."""
    return ParallelLayout(
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        virtual_pipeline_model_parallel_size=vp,
        num_layers_per_stage=(1,) * (pp * (vp or 1)),
    )


@pytest.fixture(scope="module")
def pool() -> Iterator[RankPool]:
    """One pool for all tests that leave it in order, and those that do not."""
    with RankPool(timeout=60) as found:
        yield found


def test_ranks_are_laid_out_as_megatron_does_and_formed_anew_for_each_layout(
    pool: RankPool,
) -> None:
    """TP runs innermost and PP outermost, whatever layout came before."""
    assert pool.run(layout(), ranks.describe) == [(0, 0, 0, 1)]
    assert pool.run(layout(tp=2, pp=2), ranks.describe) == [
        (0, 0, 0, 4),
        (1, 1, 0, 4),
        (2, 0, 1, 4),
        (3, 1, 1, 4),
    ]
    assert pool.run(layout(pp=2, vp=2), ranks.describe) == [(0, 0, 0, 2), (1, 0, 1, 2)]
    assert pool.run(layout(tp=2), ranks.describe) == [(0, 0, 0, 2), (1, 1, 0, 2)]


def test_processes_stay_alive_from_one_layout_to_the_next(pool: RankPool) -> None:
    """Starting ranks anew would cost more than most cases."""
    first = pool.run(layout(tp=2), ranks.pid)
    again = pool.run(layout(pp=2), ranks.pid)
    assert first == again
    assert first == list(pool.pids())[:2]


def test_collectives_reach_every_rank_of_the_layout(pool: RankPool) -> None:
    """1.5 x (1 + 2 + 3 + 4) on each of four ranks."""
    assert pool.run(layout(tp=4), ranks.total, 1.5) == [15.0] * 4


def test_a_value_is_cached_until_the_groups_change(pool: RankPool) -> None:
    """A model is built once per layout, and forgotten with it."""
    pool.run(layout(tp=2), ranks.pid)
    assert pool.run(layout(tp=2), ranks.counted, "a") == [1, 1]
    assert pool.run(layout(tp=2), ranks.counted, "a") == [1, 1]
    pool.run(layout(), ranks.pid)
    assert pool.run(layout(tp=2), ranks.counted, "a") == [2, 2]


def test_a_hook_reaches_the_ranks_and_is_taken_back(pool: RankPool) -> None:
    """A deliberate fault changes one call and no later one."""
    faulty = pool.run(layout(tp=2), ranks.describe, hook=ranks.lie_about_rank)
    assert [found[0] for found in faulty] == [0, 7]
    assert [found[0] for found in pool.run(layout(tp=2), ranks.describe)] == [0, 1]


def test_a_rank_that_throws_is_named_with_its_traceback_and_log(pool: RankPool) -> None:
    """The others wait in a barrier: they are ended, and not taken for the cause."""
    with pytest.raises(WorkerFailedError) as caught:
        pool.run(layout(tp=2, pp=2), ranks.throw_on, 2, timeout=10)
    error = caught.value
    assert type(error) is WorkerFailedError
    assert error.rank == 2
    assert error.exit_code == 3
    assert "ValueError: thrown on purpose" in error.rank_traceback
    assert "in throw_on" in error.rank_traceback
    assert "about to fail" in error.log_tails[2]
    assert "thrown on purpose" in str(error)


def test_a_killed_rank_is_reported_before_the_time_limit(pool: RankPool) -> None:
    """Ten seconds are given; were it noticed later, the error would be a time-out."""
    pool.run(layout(tp=4), ranks.pid)  # started and formed: nothing but the death is waited for
    with pytest.raises(WorkerFailedError, match="SIGKILL") as caught:
        pool.run(layout(tp=4), ranks.die_on, 3, timeout=10)
    assert type(caught.value) is WorkerFailedError
    assert caught.value.rank == 3


def test_a_hung_rank_is_reported_with_its_stack(pool: RankPool) -> None:
    """The time limit ends a case; the stack says where it hung."""
    with pytest.raises(WorkerTimeoutError, match="within 2 s") as caught:
        pool.run(layout(tp=2), ranks.hang_on, 1, timeout=2)
    assert caught.value.rank == 1
    assert "in hang_on" in caught.value.log_tails[1]


def test_a_failure_leaves_no_rank_behind_and_the_next_call_starts_new_ones(pool: RankPool) -> None:
    """Isolated cases: one broken case costs the next one nothing but a fork."""
    before = pool.run(layout(tp=2), ranks.pid)
    children = pool.run(layout(tp=2), ranks.spawn_child)
    with pytest.raises(WorkerFailedError):
        pool.run(layout(tp=2), ranks.throw_on, 0)
    assert ranks.gone([*before, *children])
    after = pool.run(layout(tp=2), ranks.pid)
    assert not set(before) & set(after)
    assert pool.run(layout(tp=2), ranks.total, 1.0) == [3.0, 3.0]


def test_a_rank_that_died_between_calls_is_replaced_and_told_of(
    pool: RankPool, caplog: pytest.LogCaptureFixture
) -> None:
    """A pool that somebody has shot at works on, and says so: memory may be running out."""
    victim = pool.run(layout(tp=2), ranks.pid)[1]
    os.kill(victim, signal.SIGKILL)
    while Path(f"/proc/{victim}").exists():  # until the fork server has reaped it
        time.sleep(0.05)
    assert pool.run(layout(tp=2), ranks.total, 1.0) == [3.0, 3.0]
    assert f"rank 1 (process {victim}) was ended by SIGKILL" in caplog.text


def test_an_error_for_the_user_comes_through_as_itself(pool: RankPool) -> None:
    """A damaged checkpoint read by a rank is bad input, exit code 2, not a failed worker."""
    with pytest.raises(CheckpointError) as caught:
        pool.run(layout(), ranks.refuse)
    assert caught.value.where == ("/there",)
    assert caught.value.exit_code == 2
    assert caught.value.__notes__ == ["raised on rank 0 of layout tp1-pp1"]


def test_a_result_that_cannot_travel_is_an_error_not_a_hang(pool: RankPool) -> None:
    """Whatever a rank does, the parent hears of it."""
    with pytest.raises(WorkerFailedError, match="pickle"):
        pool.run(layout(), ranks.unpicklable)


def test_a_function_that_cannot_be_sent_is_refused(pool: RankPool) -> None:
    """A lambda has no name to import it by."""
    with pytest.raises(BackendUnavailableError, match="cannot be sent"):
        pool.run(layout(), lambda _context: None)


def test_pools_side_by_side_do_not_disturb_each_other(pool: RankPool, tmp_path: Path) -> None:
    """As under pytest-xdist: no port, file or log is shared."""
    with RankPool(timeout=60, log_dir=tmp_path) as other:
        assert other.run(layout(tp=2), ranks.total, 1.0) == [3.0, 3.0]
        assert pool.run(layout(tp=2), ranks.total, 2.0) == [6.0, 6.0]
        assert not set(other.pids()) & set(pool.pids())
        pids = list(other.pids())
    assert ranks.gone(pids)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["rank0.log", "rank1.log"]


def test_a_closed_pool_refuses_work() -> None:
    """Closing is final, and may be done twice."""
    pool = RankPool()
    pool.close()
    pool.close()
    with pytest.raises(BackendUnavailableError, match="closed"):
        pool.run(layout(), ranks.pid)


def test_ranks_and_their_children_end_with_a_parent_that_was_killed(tmp_path: Path) -> None:
    """No orphan, even when the user's process gets no chance to clean up."""
    script = tmp_path / "parent.py"
    script.write_text(
        textwrap.dedent(f"""
        import sys
        sys.path += [{str(Path(__file__).parent)!r}, {str(Path.cwd())!r}]
        import rank_functions as ranks
        from bridge.spec import ParallelLayout
        from harness.launcher import RankPool

        # No __main__ guard: ranks must not run this file again.
        pool = RankPool(timeout=60)
        layout = ParallelLayout(tensor_model_parallel_size=2, num_layers_per_stage=(1,))
        pids = pool.run(layout, ranks.pid) + pool.run(layout, ranks.spawn_child)
        print(*pids, pool.log_dir, flush=True)
        pool.run(layout, ranks.hang_on, 1)
        """),
        "utf-8",
    )
    command = [sys.executable, str(script)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:  # noqa: S603 - our own
        assert process.stdout is not None
        *words, private = process.stdout.readline().split()
        pids = [int(pid) for pid in words]
        assert len(pids) == 4
        assert Path(private).is_dir()
        assert all(ranks.is_alive(pid) for pid in pids)
        process.kill()
    assert ranks.gone(pids)
    assert not Path(private).exists()
