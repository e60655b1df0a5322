"""Conversions without end in one process: memory, open files, threads and debris must not grow."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from harness.errors import TortureError

RSS_LIMIT: Final = 16 << 10
"""Bytes that a conversion may leave behind in resident memory, over the last three quarters of a
soak. 200 healthy conversions left 0.8 KiB each, which is the allocator's wandering; a window or a
map that is not let go is 1 MiB, and the parsed headers of one toy are 20 KiB."""
_SETTLING: Final = 0.25
"""The part of a soak in which caches may fill."""
ROTATION: Final = 34
"""Conversions until each kind has had its turn: before, caches may fill whatever the part."""
_LEAST: Final = 120
"""Conversions without which a slope says nothing: 60 showed 14 to 64 KiB where 200 show none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """The process after one conversion.

    Args:
        what: Which it was.
        code: Its exit code.
        expected: What that should be.
        rss: Bytes of resident memory.
        files: Open descriptors.
        threads: Threads.
        temporary: Entries of its TMPDIR.
        shared: Entries of /dev/shm that were not there at the start and that no process has open.
        children: Processes that it has started and that are still there.
    """

    what: str
    code: int
    expected: int
    rss: int
    files: int
    threads: int
    temporary: int
    shared: int
    children: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Soak:
    """What a soak came to.

    Args:
        conversions: How many.
        seconds: They took.
        rss_slope: Bytes per conversion, by least squares over the settled part; None if short.
        rss_last: Bytes at the end.
        growth: By what was counted: its value at the end less that where it had settled.
        problems: What is not as it should be.
    """

    conversions: int
    seconds: float
    rss_slope: float | None
    rss_last: int
    growth: Mapping[str, int]
    problems: Sequence[str]

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self) | {"rss_limit": RSS_LIMIT}


def judge(samples: Sequence[Sample], seconds: float) -> Soak:
    """Say what grows."""
    problems = [
        f"conversion {number} ({one.what}) exits with {one.code}, not {one.expected}"
        for number, one in enumerate(samples, start=1)
        if one.code != one.expected
    ]
    start = int(len(samples) * _SETTLING)
    settled = samples[max(start, ROTATION) if len(samples) > ROTATION else start :]
    growth = {
        name: getattr(settled[-1], name) - getattr(settled[0], name)
        for name in ("files", "threads", "temporary", "shared", "children")
    }
    problems += [f"{count} more {name} at the end" for name, count in growth.items() if count > 0]
    problems += [
        f"{getattr(settled[-1], name)} {name} are left"
        for name in ("temporary", "shared", "children")
        if getattr(settled[-1], name)
    ]
    slope = None
    if len(samples) >= _LEAST:
        turns = np.arange(len(settled))
        slope = float(np.polyfit(turns, [one.rss for one in settled], 1)[0])
        if slope > RSS_LIMIT:
            problems.append(
                f"memory grows by {slope / 1024:.1f} KiB per conversion, limit "
                f"{RSS_LIMIT / 1024:.0f} KiB"
            )
    return Soak(
        conversions=len(samples),
        seconds=seconds,
        rss_slope=slope,
        rss_last=samples[-1].rss,
        growth=growth,
        problems=problems,
    )


def soak(
    root: Path, count: int, *, load: Sequence[str] = (), advance: Callable[[Sample], None]
) -> tuple[list[Sample], float]:
    """Run `count` conversions in one process below a directory that exists; with the seconds.

    Raises:
        TortureError: HN206, the process ends before it is done.
    """
    started = time.monotonic()
    temporary = root / "tmp"
    temporary.mkdir(parents=True)
    process = subprocess.Popen(  # noqa: S603 - our own module
        [sys.executable, "-m", "harness.torture.soaking", str(root), str(count), *load],
        stdout=subprocess.PIPE,
        text=True,
        # glibc gives each of many short threads an arena, and these wander by megabytes over
        # hundreds of conversions: with one, what stays is what somebody holds.
        env=os.environ
        | {"OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1", "TMPDIR": str(temporary)},
    )
    samples = []
    try:
        for line in process.stdout or ():
            samples.append(Sample(**json.loads(line)))
            advance(samples[-1])
    finally:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(5)
        process.kill()
        process.wait()
        if process.stdout is not None:
            process.stdout.close()
    if process.returncode or len(samples) < count:
        raise TortureError(
            f"the soak has ended after {len(samples)} of {count} conversions",
            where=f"exit code {process.returncode}",
            hint="what is above may say why",
        )
    return samples, time.monotonic() - started
