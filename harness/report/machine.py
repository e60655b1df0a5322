"""The machine a run was made on, and how much of its memory the run took."""

from __future__ import annotations

import os
import platform
import re
import time
from pathlib import Path
from typing import Any, Final

import psutil

_EVERY: Final = 1.0
"""Seconds between two looks at memory: a look is cheap, a thousand cases are many."""


def hardware() -> dict[str, Any]:
    """CPU model, usable cores, memory, GPUs.

    GPUs are counted only where torch may be asked for them without starting CUDA in a process that
    is to stay on the CPU.
    """
    return {
        "cpu": _cpu_model(),
        "cores": usable_cores(),
        "memory_bytes": psutil.virtual_memory().total,
        "gpus": _gpus(),
    }


def usable_cores() -> int:
    """Cores that this process may run on; all of them where the system does not say."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _cpu_model() -> str:
    """The name by which people know a CPU; `platform` has it on some systems only."""
    info = Path("/proc/cpuinfo")
    if info.is_file():
        match = re.search(r"^model name\s*:\s*(.+)$", info.read_text("utf-8"), re.MULTILINE)
        if match:
            return match[1].strip()
    return platform.processor() or platform.machine()


def _gpus() -> list[str]:
    import torch

    if not torch.cuda.is_available():
        return []
    return [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]


class MemoryWatch:
    """The largest resident set of this process and of any one it started.

    Linux keeps each process's peak, so a look now and then misses nothing but what ran wholly
    between two of them; elsewhere it is the largest of the sizes seen.
    """

    def __init__(self) -> None:
        self._peaks: dict[tuple[int, float], int] = {}
        self._me = psutil.Process()
        self._last = -_EVERY

    def look(self, *, now: bool = False) -> None:
        """Take the sizes down, once a second at most unless `now`."""
        if not now and time.monotonic() - self._last < _EVERY:
            return
        for process in (self._me, *self._me.children(recursive=True)):
            try:
                key, size = (process.pid, process.create_time()), _peak(process)
            except psutil.Error:  # it has just ended
                continue
            self._peaks[key] = max(size, self._peaks.get(key, 0))
        self._last = time.monotonic()

    def peaks(self) -> dict[str, int]:
        """Bytes: of the process itself, and of the largest one it started."""
        mine = (self._me.pid, self._me.create_time())
        others = [size for key, size in self._peaks.items() if key != mine]
        return {
            "main_bytes": self._peaks.get(mine, 0),
            "largest_rank_bytes": max(others, default=0),
        }


def _peak(process: psutil.Process) -> int:
    try:
        status = Path(f"/proc/{process.pid}/status").read_text("utf-8")
    except OSError:
        status = ""
    match = re.search(r"^VmHWM:\s+(\d+) kB$", status, re.MULTILINE)
    return int(match[1]) * 1024 if match else int(process.memory_info().rss)
