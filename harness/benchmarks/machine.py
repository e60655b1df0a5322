"""The machine that figures are of: one number means nothing without it."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Any

import psutil


def describe(directory: Path) -> dict[str, Any]:
    """Hardware, system, the file system worked in, and how busy it all was meanwhile."""
    from harness.report.machine import hardware

    disk = filesystem(directory)
    return hardware() | {
        "system": platform.platform(terse=True),
        "filesystem": disk,
        "load_average": list(os.getloadavg()),
        "omp_num_threads": os.environ.get("OMP_NUM_THREADS"),
    }


def filesystem(directory: Path) -> str:
    """Type of the file system that a directory is on, such as ext4."""
    at = directory.resolve()
    found = {Path(one.mountpoint): one.fstype for one in psutil.disk_partitions(all=True)}
    return next((found[place] for place in (at, *at.parents) if place in found), "unknown")
