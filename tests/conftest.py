"""What every test gets: restored global state, Hypothesis profiles, a source made of arrays."""

from __future__ import annotations

import os
import re
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import psutil
import pytest
from hypothesis import settings

from bridge.dtypes import Words, dtype_named
from bridge.storage.source import TensorInfo
from bridge.tiling import Box

if TYPE_CHECKING:
    from tests import leftovers
else:  # a module beside this file: tests are not a package
    sys.path.append(str(Path(__file__).parent))
    import leftovers

settings.register_profile("dev", max_examples=50, deadline=None, print_blob=True)
settings.register_profile("ci", max_examples=300, deadline=None, print_blob=True, derandomize=True)
settings.register_profile("nightly", max_examples=5000, deadline=None, print_blob=True)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "dev"))

# Jobs that a script starts in the background ignore Ctrl-C, and what they start does, too:
# the tests that send it would wait for ever under `nohup nox -s tests &`.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def restore_torch_globals() -> Iterator[None]:
    """Put torch's default dtype, gradient mode and thread count back, where torch is loaded.

    A test that does not import torch does not pay for it.
    """
    torch = sys.modules.get("torch")
    if torch is None:
        yield
        return
    dtype, threads = torch.get_default_dtype(), torch.get_num_threads()
    grad = torch.is_grad_enabled()
    deterministic = torch.are_deterministic_algorithms_enabled()
    yield
    torch.set_default_dtype(dtype)
    torch.set_num_threads(threads)
    torch.set_grad_enabled(grad)
    torch.use_deterministic_algorithms(deterministic)


@pytest.fixture
def nobody_stays_behind() -> Iterator[None]:
    """The test leaves no spawned process behind, however it ends.

    Those that were there before it are somebody else's.
    """
    here = psutil.Process()
    before = leftovers.workers_below(here)
    yield
    assert leftovers.workers_below(here) - before == set()


@pytest.fixture
def session() -> Iterator[leftovers.Session]:
    """A run that is to leave nothing behind; whatever it leaves goes with the test.

    Its directory has a short name: sockets may lie in it.
    """
    with tempfile.TemporaryDirectory(prefix="nb-test-", ignore_cleanup_errors=True) as scratch:
        found = leftovers.Session(Path(scratch))
        yield found
        found.kill()


class ArraySource:
    """A `TensorSource` of numpy arrays, each element taken as a word of its tensor's dtype.

    Args:
        arrays: Tensor name to array. Any array is reinterpreted, never converted.
        dtypes: Tensor name to torch's dtype name; left out, numpy's own name is taken,
            signed for unsigned.

    `closed` says whether it was; `reads` lists what was read, to be asserted on.
    """

    def __init__(
        self, arrays: Mapping[str, np.ndarray[Any, Any]], dtypes: Mapping[str, str] | None = None
    ) -> None:
        # The bridge's dtypes have no unsigned ones but uint8; a word of that size is what counts.
        names = {
            name: re.sub(r"uint(16|32|64)", r"int\1", array.dtype.name)
            for name, array in arrays.items()
        } | dict(dtypes or {})
        self.tensors = {
            name: TensorInfo(shape=array.shape, dtype=dtype_named(names[name]))
            for name, array in arrays.items()
        }
        self.arrays = {
            name: array.view(self.tensors[name].dtype.word) for name, array in arrays.items()
        }
        self.reads: list[tuple[str, Box]] = []
        self.closed = False

    def read_into(self, name: str, box: Box, out: Words) -> None:
        """Fill `out`; shapes and dtypes must be exactly right, no broadcasting."""
        found = self.arrays[name][box.slices]
        assert found.shape == box.shape, f"{box} sticks out of {name}"
        assert out.shape == box.shape
        assert out.dtype == found.dtype
        self.reads.append((name, box))
        out[...] = found

    def close(self) -> None:
        """Remember that it was closed."""
        self.closed = True

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


@pytest.fixture(scope="session")
def array_source() -> Callable[..., ArraySource]:
    """Make a `TensorSource` of numpy arrays: `array_source(arrays, dtypes={"w": "bfloat16"})`."""
    return ArraySource
