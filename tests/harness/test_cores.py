"""The oracle's threads are those that the process has, and nobody else's spin beside them."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from harness import oracle
from harness.cores import oracle_cores


def openblas() -> ctypes.CDLL:
    """The library that NumPy's wheels bring."""
    (path,) = Path(np.__file__).parent.with_name("numpy.libs").glob("libscipy_openblas64_*")
    return ctypes.CDLL(str(path))


def blas_threads() -> int:
    """By asking it."""
    return int(openblas().scipy_openblas_get_num_threads64_())


@pytest.fixture
def two_threads() -> Iterator[None]:
    """Torch and NumPy with two threads each, whatever the machine has."""
    change = openblas().scipy_openblas_set_num_threads64_
    before = torch.get_num_threads(), blas_threads()
    torch.set_num_threads(2)
    change(2)
    yield
    torch.set_num_threads(before[0])
    change(before[1])


@pytest.mark.usefixtures("two_threads")
def test_the_oracle_has_as_many_threads_as_torch_and_blas_has_one() -> None:
    """And afterwards all is as it was."""
    together = threading.Barrier(2, timeout=20)

    class Rows:
        """Two pieces, of which neither comes before both are asked for."""

        shape = (2, 1 << 20)

        def __getitem__(self, rows: slice) -> oracle.Array:
            together.wait()
            return np.ones((rows.stop - rows.start, self.shape[1]))

    with oracle_cores():
        assert torch.get_num_threads() == 1
        assert blas_threads() == 1
        x = np.ones((1, 1, 1 << 20))
        assert oracle.linear(x, lambda _: Rows(), "w", Rows.shape).tolist() == [[[1 << 20] * 2]]
    assert torch.get_num_threads() == 2
    assert blas_threads() == 2
