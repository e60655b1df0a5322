"""One buffer in which one module after another has its parameters."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, Final

import torch

_ALIGNMENT: Final = 64
"""Elements; what the fastest kernels want of an address."""


class Arena:
    """Memory for the parameters of the one module that is being computed with.

    Args:
        num_elements: Of the largest module, padding between its parameters left aside.
        num_parameters: Of that module, at most.
        dtype: Of its parameters.
        device: Where they are.
    """

    def __init__(
        self,
        num_elements: int,
        *,
        dtype: torch.dtype,
        device: torch.device,
        num_parameters: int = 16,
    ) -> None:
        size = num_elements + num_parameters * _ALIGNMENT
        self._flat = torch.empty(size, dtype=dtype, device=device)
        self._used = 0

    def clear(self) -> None:
        """Give up what was given out; the next parameters take its place."""
        self._used = 0

    def take(self, shape: Iterable[int]) -> torch.Tensor:
        """Memory for a parameter, what it holds undefined."""
        dims = tuple(shape)
        start, count = self._used, math.prod(dims)
        self._used += -(-count // _ALIGNMENT) * _ALIGNMENT
        if start + count > len(self._flat):
            raise AssertionError(f"{dims} is more than the arena was made for")
        return self._flat[start : start + count].view(dims)


def give(module: Any, name: str, tensor: torch.Tensor) -> None:  # noqa: ANN401 - a torch module
    """Make a tensor the parameter of this name, whatever it was before, `meta` included."""
    *path, leaf = name.split(".")
    owner = module.get_submodule(".".join(path))
    owner.register_parameter(leaf, torch.nn.Parameter(tensor, requires_grad=False))
