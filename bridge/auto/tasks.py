"""What becomes of each parameter of a live model, one entry per Megatron parameter."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from bridge.live_export import owners
from bridge.live_parameters import matched
from bridge.parameters import Parameter
from bridge.spec import ModelSpec, ParallelLayout


@dataclass(frozen=True, slots=True, kw_only=True)
class ParameterMapping:
    """Which Hugging Face tensors make a Megatron parameter.

    Args:
        megatron_param: Its name in checkpoints.
        hf_param: The one tensor, or each by what it is: `q`, `k` and `v`, or `gate` and `up`.
    """

    megatron_param: str
    hf_param: str | dict[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class ConversionTask:
    """One parameter, in the fields of Megatron-Bridge's `WeightConversionTask`.

    Args:
        param_name: In this rank's model part; the name in checkpoints where it is not here.
        global_param_name: In checkpoints, with the layer's index over the whole model.
        mapping: What it is made of.
        pp_rank: Pipeline rank that holds it.
        vp_stage: Which of that rank's parts.
        megatron_module: That part, None where it is not here.
        param_weight: This rank's shard, None where it is not here.
    """

    param_name: str
    global_param_name: str
    mapping: ParameterMapping
    pp_rank: int
    vp_stage: int
    megatron_module: Any = None
    param_weight: torch.Tensor | None = None


def conversion_tasks(
    model_parts: Sequence[Any], spec: ModelSpec, layout: ParallelLayout
) -> list[ConversionTask]:
    """A task per parameter of the whole model, in the order it runs, the same on every rank.

    Raises:
        PlanError: BR400, live parameters and the table are not the same.
    """
    here = {(one.name, one.stage): one for one, _ in matched(model_parts, spec, layout)}
    tasks = []
    for parameter, stage in owners(spec, layout):
        one = here.get((parameter.name, stage))
        tasks.append(
            ConversionTask(
                param_name=parameter.name if one is None else one.live_name,
                global_param_name=parameter.name,
                mapping=_mapping(parameter),
                pp_rank=stage.pp_rank,
                vp_stage=stage.vp_stage,
                megatron_module=None if one is None else model_parts[stage.vp_stage],
                param_weight=None if one is None else one.tensor,
            )
        )
    return tasks


def _mapping(parameter: Parameter) -> ParameterMapping:
    names = list(dict.fromkeys(tile.source for tile in parameter.tiling.tiles if tile.source))
    by_role = {name.split(".")[-2].removesuffix("_proj"): name for name in names}
    return ParameterMapping(
        megatron_param=parameter.name, hf_param=names[0] if len(names) == 1 else by_role
    )
