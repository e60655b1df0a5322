"""What grows is noticed; what wanders is not."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from harness.torture.soak import ROTATION, RSS_LIMIT, Sample, judge, soak
from harness.torture.soaking import _turns

STEADY = Sample(
    what="import", code=0, expected=0, rss=250 << 20, files=6, threads=1, temporary=0, shared=0,
    children=0,
)  # fmt: skip
LEAK = """
import os
import bridge.convert

real = bridge.convert.import_checkpoint

def leaking(*args, **kwargs):
    os.open(os.devnull, os.O_RDONLY)
    return real(*args, **kwargs)

bridge.convert.import_checkpoint = leaking
"""


def samples(*, slope: float = 0.0, count: int = 200) -> list[Sample]:
    """Memory that grows by so many bytes a conversion, with the noise of an allocator."""
    noise = np.random.default_rng(0).normal(0, 100 << 10, count)
    return [
        replace(STEADY, rss=int(STEADY.rss + slope * turn + noise[turn])) for turn in range(count)
    ]


def test_memory_that_wanders_does_not_grow() -> None:
    """The limit is on the slope, not on the noise; the first quarter may fill caches."""
    assert judge(samples(), 1.0).problems == []
    settling = [replace(one, rss=(100 << 20) + turn) for turn, one in enumerate(samples()[:50])]
    assert judge([*settling, *samples()[50:]], 1.0).problems == []


def test_memory_that_grows_is_noticed() -> None:
    """By twice the limit."""
    found = judge(samples(slope=2 * RSS_LIMIT), 1.0)
    assert found.rss_slope == pytest.approx(2 * RSS_LIMIT, rel=0.2)
    assert "memory grows by" in found.problems[0]


def test_what_the_first_of_a_kind_leaves_is_no_growth() -> None:
    """The last turn of the first rotation may start what stays, in a soak however short."""
    short = samples(count=2 * ROTATION)
    first = [replace(one, files=5, rss=0) for one in short[: ROTATION - 1]]
    found = judge([*first, *short[ROTATION - 1 :]], 1.0)
    assert (found.problems, found.rss_slope) == ([], None)
    assert len(_turns(Path("x"))) == ROTATION


@pytest.mark.parametrize("name", ["files", "threads", "temporary", "shared", "children"])
def test_anything_that_is_left_is_noticed(name: str) -> None:
    """One more at the end than when it had settled."""
    last = replace(STEADY, **{name: getattr(STEADY, name) + 1})
    found = judge([*samples(), last], 1.0)
    assert found.growth[name] == 1
    assert f"1 more {name} at the end" in found.problems


def test_an_unexpected_exit_is_noticed() -> None:
    """Either way: damaged weights that convert, too."""
    odd = replace(STEADY, what="import of damaged weights", expected=2)
    assert judge([STEADY, odd], 1.0).problems == [
        "conversion 2 (import of damaged weights) exits with 0, not 2"
    ]


def test_a_real_soak_finds_a_descriptor_that_is_left_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And nothing else: conversions of every kind in one process, once around."""
    (tmp_path / "leaking_files.py").write_text(LEAK)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{Path(__file__).parents[3]}")
    (tmp_path / "soak").mkdir()
    found, seconds = soak(tmp_path / "soak", 12, load=["leaking_files"], advance=lambda _: None)
    verdict = judge(found, seconds)
    assert verdict.growth["files"] > 0
    assert verdict.problems == [f"{verdict.growth['files']} more files at the end"]
