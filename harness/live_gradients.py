"""Gradients inside rank processes: one backward pass, and its result in Hugging Face's terms."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from harness import live
from harness.ranks import RankContext

Array = np.ndarray[Any, np.dtype[Any]]
Slices = tuple[slice, ...]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Tile:
    """A rectangle of a Hugging Face tensor's gradient; see `bridge.backward.GradientTile`."""

    hf_name: str | None
    slices: Slices
    parameter: str
    gradient: Array


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RankGradients:
    """What one rank has after a backward pass.

    Args:
        loss: In nats per token.
        tiles: Gradients of its parameters.
        without: Parameters that were left without a gradient.
    """

    loss: float
    tiles: list[Tile]
    without: list[str]


def gradients(
    context: RankContext, request: live.ModelRequest, input_ids: Array, position_ids: Array
) -> RankGradients:
    """Run a batch forward and back; arrays are float32 or float64, exact."""
    import torch

    from bridge.backward import hf_gradient_tiles, loss_and_gradients
    from bridge.live_parameters import local_parameters

    parts = live.model(context, request)
    try:
        loss = loss_and_gradients(
            parts,
            request.spec,
            request.layout,
            torch.from_numpy(input_ids),
            torch.from_numpy(position_ids),
        )
        tiles = [
            Tile(
                hf_name=one.hf_name,
                slices=one.box.slices,
                parameter=one.parameter,
                gradient=as_array(one.gradient),
            )
            for one in hf_gradient_tiles(parts, request.spec, request.layout)
        ]
        without = [
            one.name for one in local_parameters(parts, request.layout) if one.tensor.grad is None
        ]
    finally:
        for part in parts:  # the model stays, for the next case
            part.zero_grad(set_to_none=True)
    return RankGradients(loss=loss.item(), tiles=tiles, without=without)


def as_array(tensor: Any) -> Array:  # noqa: ANN401 - a torch tensor; torch is not imported here
    """A tensor as numpy has it: bfloat16 as float32, which holds it exactly."""
    import torch

    wide = tensor if tensor.dtype == torch.float64 else tensor.float()
    found: Array = wide.detach().cpu().numpy()
    return found
