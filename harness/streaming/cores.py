"""How the cores of a machine are shared out while a model is streamed.

The oracle computes beside the two models. Threads of a matrix product beyond the cores that are
free do not share a core: they spin on it until the slowest of them is done.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import numpy as np
import torch

from harness.report.machine import usable_cores

_PREFIXES: Final = (("scipy_openblas_", "64_"), ("openblas_", "64_"), ("openblas_", ""))


def cores_for_each(device: str = "cpu") -> int:
    """Threads for the oracle, and as many for the models: half the cores.

    Where a GPU runs the models they need one core to drive it, and the oracle may have the others.
    """
    cores = usable_cores()
    return max(1, cores // 2 if device == "cpu" else cores - 1)


@contextlib.contextmanager
def shared_cores(device: str = "cpu") -> Iterator[None]:
    """Hold torch to its share of the cores, and NumPy to one: the oracle has threads of its own."""
    with _torch_threads(cores_for_each(device)), _openblas_threads(1):
        yield


@contextlib.contextmanager
def _torch_threads(most: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(min(before, most))
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextlib.contextmanager
def _openblas_threads(most: int) -> Iterator[None]:
    """The library that NumPy's wheels bring; of any other, the user's settings stand."""
    found = _openblas()
    if found is None:
        yield
        return
    library, (prefix, suffix) = found
    before: int = getattr(library, f"{prefix}get_num_threads{suffix}")()
    change = getattr(library, f"{prefix}set_num_threads{suffix}")
    change(min(before, most))
    try:
        yield
    finally:
        change(before)


def _openblas() -> tuple[ctypes.CDLL, tuple[str, str]] | None:
    package = Path(np.__file__).parent
    for folder in (package.with_name("numpy.libs"), package / ".dylibs"):
        for path in folder.glob("*openblas*"):
            with contextlib.suppress(OSError):
                library = ctypes.CDLL(str(path))  # loaded already: the same one
                for names in _PREFIXES:
                    if hasattr(library, f"{names[0]}set_num_threads{names[1]}"):
                        return library, names
    return None
