"""Faults: their spelling, and which calls can meet them."""

from __future__ import annotations

import pytest

from bridge.errors import UsageError
from harness.torture.faults import Fault, answers, parse_fault

SPELT = [
    ("w17-before", Fault(on="w", at=17, how="before")),
    ("w1-power", Fault(on="w", at=1, how="power")),
    ("rename.2-half", Fault(on="c", at=2, how="half", call="rename")),
    ("fsync.1-EIO", Fault(on="c", at=1, how="EIO", call="fsync")),
    ("r5-EIO", Fault(on="r", at=5, how="EIO")),
    ("w9-ENOSPC!", Fault(on="w", at=9, how="ENOSPC", lasting=True)),
    ("t0.40-hand", Fault(on="t", at=0.4, how="hand")),
    ("d0.97-disk", Fault(on="d", at=0.97, how="disk")),
]


@pytest.mark.parametrize(("text", "fault"), SPELT)
def test_a_fault_is_what_its_spelling_says(text: str, fault: Fault) -> None:
    """Both ways: an id in a report runs the same trial again."""
    assert parse_fault(text) == fault
    assert str(fault) == text


@pytest.mark.parametrize("text", ["", "w17", "w17-EFOO", "x1-before", "t2-group", "w1-before!x"])
def test_anything_else_is_refused(text: str) -> None:
    """With what was given."""
    with pytest.raises(UsageError, match="is no fault"):
        parse_fault(text)


def test_only_a_kill_kills() -> None:
    """A process that is told of an error goes on."""
    kills = ["w17-before", "w1-power", "rename.2-half", "t0.40-hand"]
    assert [text for text, fault in SPELT if fault.kills] == kills


def test_a_call_meets_only_what_a_system_would_answer_it() -> None:
    """No removal ever found a disk full, and no write of an open file lacked permission."""
    assert answers("pwrite", "ENOSPC")
    assert not answers("unlink", "ENOSPC")
    assert answers("create", "EACCES")
    assert not answers("pwrite", "EACCES")
    assert answers("preadv", "EIO")
    assert not answers("open", "EROFS")
