"""How the cores of a machine are shared out between the oracle and the two models.

Threads of a matrix product beyond the cores that are free do not share a core: they spin on it
until the slowest of them is done. So the oracle has threads of its own, and NumPy's products none.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import numpy as np
import torch

from harness import oracle
from harness.report.machine import usable_cores

_PREFIXES: Final = (("scipy_openblas_", "64_"), ("openblas_", "64_"), ("openblas_", ""))


@contextlib.contextmanager
def oracle_cores() -> Iterator[None]:
    """The oracle's, which computes alone while a model is held whole: as many as torch has here.

    So one in a process that shares the machine with others of its kind.
    """
    count = torch.get_num_threads()
    with _torch_threads(1), _openblas_threads(1), oracle.threads(count):
        yield


def cores_for_each(device: str = "cpu") -> int:
    """Threads for the oracle, and as many for the models, that are streamed: half the cores.

    Where a GPU runs the models they need one core to drive it, and the oracle may have the others.
    """
    cores = usable_cores()
    return max(1, cores // 2 if device == "cpu" else cores - 1)


@contextlib.contextmanager
def shared_cores(device: str = "cpu") -> Iterator[None]:
    """Hold torch to its share of the cores, and NumPy to one, while a model is streamed."""
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
