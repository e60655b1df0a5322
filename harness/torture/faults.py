"""What is done to a process, at which of its calls: data, with a spelling for ids.

`w17-before` kills before the 17th call that changes something, `-half` in the middle of its bytes,
`-after` when it has returned, and `-power` then takes away all that was not brought to the disk.
`rename.1-before` counts calls of that name alone, which threads shift less.
`w17-ENOSPC` makes it fail, `w17-ENOSPC!` and all that follow it, `r5-EIO` the 5th call that reads.
`t0.40-group` kills every process at 40 % of the time that the command takes, `-lead` and `-hand`
one of them. `d0.70-disk` gives it a disk with room for 70 % of what it writes.
"""

from __future__ import annotations

import errno
import re
from dataclasses import dataclass
from typing import Final, Literal, TypeAlias, cast

from bridge.errors import UsageError

On: TypeAlias = Literal["w", "r", "c", "t", "d"]
"""Calls that write, calls that read, those of one name, time, and the size of the disk."""

KILLS: Final = ("before", "half", "after", "power")
SIGNALS: Final = ("group", "lead", "hand")
_SPELLING: Final = re.compile(
    rf"(?:(?P<on>[wr])|(?P<call>[a-z_]+)\.)(?P<at>\d+)-(?P<how>{'|'.join(KILLS)}|E[A-Z]+)(?P<lasting>!?)"
    rf"|(?P<part_of>[td])(?P<part>\d\.\d\d)-(?P<part_how>{'|'.join(SIGNALS)}|disk)"
)

_BYTES: Final = frozenset({"write", "writev", "pwrite", "pwritev", "copy_file_range", "sendfile"})
_MOVES: Final = frozenset({"mkdir", "rename", "replace", "exchange", "link", "symlink"})
_SPACE: Final = _BYTES | _MOVES | {"create", "posix_fallocate", "fsync", "fdatasync"}
_CHANGES: Final = _MOVES | {"create", "rmdir", "unlink", "remove", "truncate"}
_NAMES: Final = _CHANGES | {"open", "stat", "lstat", "scandir", "listdir"}

TAKES_BYTES: Final = _BYTES
"""Calls that can be cut short in the middle of their bytes."""

ERRORS: Final = {
    "ENOSPC": _SPACE,
    "EDQUOT": _SPACE,
    "EIO": None,
    "EACCES": _NAMES,
    "EROFS": _CHANGES,
    "ESTALE": None,
    "ENOENT": _NAMES,
}
"""Which calls a system answers so; None is any of them."""

LASTING: Final = ("ENOSPC", "EROFS", "ESTALE", "ENOENT")
"""Errors that stay: a disk that is full, one mounted read-only again, and a mount that has gone."""


def answers(name: str, error: str) -> bool:
    """Whether a call by this name can fail with this error."""
    names = ERRORS[error]
    return names is None or name in names


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """One thing that happens to one run of a command.

    Args:
        on: What is counted.
        at: The number of the call, from 1; or a part of the time or the disk, of 1.
        how: A kill's manner, a signal's addressee, an error's name, or `disk`.
        lasting: Whether later calls fail too.
        call: The name that is counted, `create` and `open` for those of `open`.
    """

    on: On
    at: float
    how: str
    lasting: bool = False
    call: str = ""

    @property
    def kills(self) -> bool:
        """Whether the process ends by it, rather than being told."""
        return self.how in KILLS or self.how in SIGNALS

    @property
    def number(self) -> int:
        """What stands for the error in `errno`."""
        return int(getattr(errno, self.how))

    def __str__(self) -> str:
        at = f"{self.at:.2f}" if self.on in "td" else f"{self.at:.0f}"
        on = f"{self.call}." if self.on == "c" else self.on
        return f"{on}{at}-{self.how}{'!' if self.lasting else ''}"


def parse_fault(text: str) -> Fault:
    """The fault that is spelt so.

    Raises:
        UsageError: BR001, none is.
    """
    found = _SPELLING.fullmatch(text)
    if found is None or (found["at"] and found["how"] not in (*KILLS, *ERRORS)):
        raise UsageError(
            f"{text[:80]!r} is no fault",
            where="--replay",
            hint="copy the id of a trial from a report, such as import/w17-before",
        )
    if found["at"]:
        return Fault(
            on=cast("On", found["on"] or "c"),
            at=int(found["at"]),
            how=found["how"],
            lasting=bool(found["lasting"]),
            call=found["call"] or "",
        )
    on = cast("On", found["part_of"])
    return Fault(on=on, at=float(found["part"]), how=found["part_how"])
