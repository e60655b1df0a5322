"""The machine that figures are of: one number means nothing without it."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
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
        **gpu_versions(),
    }


def gpu_versions() -> dict[str, str | None]:
    """Of the driver, and of the CUDA that torch was built with; None without a GPU."""
    import torch

    if not torch.cuda.is_available():
        return {"gpu_driver": None, "cuda": None}
    return {"gpu_driver": _driver(), "cuda": torch.version.cuda}


def _driver() -> str | None:
    """As its own tool names it; torch does not know."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return None
    try:
        said = subprocess.run(  # noqa: S603 - no argument comes from outside
            [tool, "--query-gpu=driver_version", "--format=csv,noheader"],
            capture_output=True, check=True, text=True, timeout=30,
        ).stdout  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return None
    return next(iter(said.split()), None)


def filesystem(directory: Path) -> str:
    """Type of the file system that a directory is on, such as ext4."""
    at = directory.resolve()
    found = {Path(one.mountpoint): one.fstype for one in psutil.disk_partitions(all=True)}
    return next((found[place] for place in (at, *at.parents) if place in found), "unknown")
