"""What a walk keeps on disk is what it takes up again, or nothing at all."""

from __future__ import annotations

import math
import resource
import struct
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from harness.block_states import judge_block
from harness.streaming.record import (
    FILE_NAME,
    PartError,
    Record,
    Store,
    relative_error,
    worst_part,
)
from harness.thresholds import load_thresholds

THRESHOLDS = load_thresholds()
LOADING: dict[str, Any] = {"dtype": "float32", "thresholds": THRESHOLDS}


def record_of(*, wrong: bool = False) -> Record:
    """One judged block of one probe; a wrong one holds no number."""
    rng = np.random.default_rng(0)
    truth = rng.standard_normal((1, 4, 8))
    reference = truth.astype(np.float32)
    made = np.full_like(reference, np.nan) if wrong else reference + np.float32(1e-7)
    judged = judge_block(
        0, "no-op + linear", reference=reference, forced=([(0, made)], truth),
        free=([(0, reference)], truth), dtype="float32", thresholds=THRESHOLDS,
    )  # fmt: skip
    part = PartError(
        name="the FFN sub-block", kind="linear", segment_idx=2, candidate=1e-7, reference=math.inf
    )
    return Record(judgements={"long": [judged]}, parts={"long": {0: [part]}})


@pytest.mark.parametrize("wrong", [False, True])
def test_what_is_kept_is_loaded_to_the_last_bit(wrong: bool, tmp_path: Path) -> None:  # noqa: FBT001 - a case
    """Numbers that are none, verdicts, states in their own dtype."""
    store, record = Store(tmp_path, {"model": "m", "probes": ["long"]}), record_of(wrong=wrong)
    states = {"oracle-0": np.array([[0.1, -0.0]]), "megatron-0": np.array([1 / 3], np.float32)}
    store.save(7, record, states)
    found = Store(tmp_path, {"model": "m", "probes": ["long"]}).load(**LOADING)
    assert found is not None
    first, loaded, arrays = found
    assert first == 7
    (mine,), (theirs,) = record.judgements["long"], loaded.judgements["long"]
    assert mine.to_dict() == theirs.to_dict()
    assert [one.passed for one in mine.verdicts] == [one.passed for one in theirs.verdicts]
    assert [one.describe() for one in mine.verdicts] == [one.describe() for one in theirs.verdicts]
    assert np.array_equal(mine.free.candidate_by_position, theirs.free.candidate_by_position)
    assert record.parts == loaded.parts
    assert states.keys() == arrays.keys()
    for name, state in states.items():
        assert state.dtype == arrays[name].dtype
        assert state.tobytes() == arrays[name].tobytes()


def test_another_walk_and_a_torn_file_are_nothing(tmp_path: Path) -> None:
    """Never states of something else."""
    store = Store(tmp_path, {"model": "m"})
    assert store.load(**LOADING) is None
    store.save(1, record_of(), {})
    assert Store(tmp_path, {"model": "n"}).load(**LOADING) is None
    path = tmp_path / FILE_NAME
    path.write_bytes(path.read_bytes()[:-40])
    assert store.load(**LOADING) is None
    store.forget()
    assert not path.exists()
    store.forget()


def test_a_record_that_says_it_holds_gigabytes_is_nothing(tmp_path: Path) -> None:
    """Its archive's directory lies, and no memory is asked for what it says."""
    store = Store(tmp_path, {"model": "m"})
    store.save(1, record_of(), {})
    path = tmp_path / FILE_NAME
    raw = bytearray(path.read_bytes())
    entry = raw.index(b"PK\x01\x02")
    struct.pack_into("<II", raw, entry + 20, 3 << 30, 3 << 30)
    path.write_bytes(raw)
    limits = resource.getrlimit(resource.RLIMIT_AS)
    allowed = psutil.Process().memory_info().vms + (1 << 29)
    resource.setrlimit(resource.RLIMIT_AS, (allowed, limits[1]))
    try:
        assert store.load(**LOADING) is None
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)


def test_the_worst_part_is_measured_by_the_reference() -> None:
    """A large error that the reference makes too is none of Megatron's."""
    parts = [
        PartError(name=name, kind="", segment_idx=0, candidate=ours, reference=theirs)
        for name, ours, theirs in (("a", 1e-3, 1e-3), ("b", 1e-4, 1e-6), ("c", 1e-5, 0.0))
    ]
    worst = worst_part(parts, 1e-6)
    assert worst is not None
    assert worst.name == "b"
    assert worst_part([], 1e-6) is None


def test_a_relative_error_is_of_what_is_added() -> None:
    """Rms over rms; where nothing is added, nothing may be."""
    truth = np.array([3.0, 4.0])
    assert math.isclose(0.2, relative_error(truth * 1.2, truth))
    assert relative_error(np.zeros(2), np.zeros(2)) == 0
    assert relative_error(truth, np.zeros(2)) == math.inf
