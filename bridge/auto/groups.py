"""The process groups a live model needs, formed unless they are there already.

Under torchrun its ranks join; a plain `python` is a group of one. Groups formed here are left when
the process ends, so that a model outlives the call that made it.
"""

from __future__ import annotations

import atexit
import os
from collections.abc import Callable
from functools import wraps
from typing import Any

import torch

from bridge import platform
from bridge.crew.launch import under_torchrun
from bridge.crew.live import LiveCrew
from bridge.crew.protocol import Alone, Crew
from bridge.errors import LayoutError, UsageError
from bridge.live_layout import refuse_other_parallelism
from bridge.platform import Device
from bridge.spec import ParallelLayout


def device_kind(*, use_cpu: bool = False) -> Device:
    """The GPU where there is one, unless the CPU is asked for."""
    return "cpu" if use_cpu or not torch.cuda.is_available() else "cuda"


def join(device: Device) -> None:
    """Be one of torch.distributed's ranks; nothing happens where this process is one already.

    Raises:
        UsageError: BR001, an environment that torchrun does not make.
        EnvironmentMissingError: BR500, see `bridge.platform.prepare`.
    """
    if torch.distributed.is_initialized():
        platform.prepare(device)
        return
    _refuse_odd_environment()
    environ = os.environ
    if under_torchrun():
        platform.join(
            int(environ["RANK"]),
            int(environ["WORLD_SIZE"]),
            init_method="env://",
            device=device,
            local_rank=int(environ.get("LOCAL_RANK", environ["RANK"])),
            local_world_size=int(environ.get("LOCAL_WORLD_SIZE", environ["WORLD_SIZE"])),
        )
    else:  # one rank needs nobody to meet
        store = torch.distributed.HashStore()  # type: ignore[attr-defined]  # torch does not list it
        platform.join(0, 1, store=store, device=device)
    atexit.register(_leave)


def _refuse_odd_environment() -> None:
    """Refuse variables that say no rank: each process would think itself alone.

    Raises:
        UsageError: BR001, all of them.
    """
    environ = os.environ
    wrong = [
        f"{name}={environ[name]}"
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
        if not environ.get(name, "0").isdigit()
    ]
    if not wrong and under_torchrun():
        rank, size = environ["RANK"], environ["WORLD_SIZE"]
        wrong = [] if int(rank) < int(size) else [f"RANK={rank} of WORLD_SIZE={size}"]
        wrong += [f"no {name}" for name in ("MASTER_ADDR", "MASTER_PORT") if name not in environ]
    if wrong:
        raise UsageError(
            "the environment is not that of one of torchrun's ranks",
            where=wrong,
            hint="start the script with torchrun, or unset RANK and WORLD_SIZE to run it alone",
        )


def _leave() -> None:
    if torch.distributed.is_initialized():
        platform.finalize()


def form(layout: ParallelLayout, device: Device, *, seed: int | None, **options: object) -> None:
    """Join, and form Megatron-Core's groups for a layout unless they are formed for just that.

    Args:
        layout: How the model is cut; ranks beyond it are data parallel.
        device: Where the model will live.
        seed: Of torch's generator and Megatron's; None leaves torch's alone.
        **options: Of `megatron.core.parallel_state.initialize_model_parallel`.

    Raises:
        LayoutError: BR200, the ranks do not fit the layout, or groups are formed for another.
    """
    from megatron.core import parallel_state

    join(device)
    if device == "cpu":
        _schedules_on_cpu()
    if parallel_state.is_initialized():
        _refuse_other_groups(layout)
        if device == "cpu":  # whoever formed them, Megatron's own generators need a GPU
            platform.seed_everything(None, device)
        return
    world_size = torch.distributed.get_world_size()
    if world_size % layout.world_size:
        raise LayoutError(
            f"{world_size} ranks for layout {layout.name} of {layout.world_size}",
            hint=f"start a multiple of {layout.world_size} ranks: torchrun --nproc-per-node "
            f"{layout.world_size} SCRIPT",
        )
    platform.form_groups(layout, **options)
    platform.seed_everything(seed, device)


def groups_formed() -> dict[str, int | None]:
    """The provider's sizes as Megatron-Core's groups have them; empty where there are none."""
    from megatron.core import parallel_state

    if not parallel_state.is_initialized():
        return {}
    return {
        "tensor_model_parallel_size": parallel_state.get_tensor_model_parallel_world_size(),
        "pipeline_model_parallel_size": parallel_state.get_pipeline_model_parallel_world_size(),
        "virtual_pipeline_model_parallel_size": (
            parallel_state.get_virtual_pipeline_model_parallel_world_size()
        ),
    }


def _refuse_other_groups(layout: ParallelLayout) -> None:
    refuse_other_parallelism()
    odd = [
        f"{name}: groups are formed for {size}, the provider says {getattr(layout, name)}"
        for name, size in groups_formed().items()
        if size != getattr(layout, name)
    ]
    if odd:
        raise LayoutError(
            "Megatron-Core's groups are formed for another layout",
            where=odd,
            hint="set the provider's sizes before its initialize_model_parallel, or call "
            "megatron.core.parallel_state.destroy_model_parallel first",
        )


def crew_here() -> Crew:
    """The ranks of this process's groups, or of torchrun; a crew of one where there are none.

    Raises:
        UsageError: BR001, an environment that torchrun does not make.
    """
    if not torch.distributed.is_initialized():
        _refuse_odd_environment()
        if not under_torchrun():
            return Alone()
        join(device_kind())
    return LiveCrew()


class _OnCpu:
    """torch, as Megatron's pipeline schedules use it, where no GPU is."""

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    @staticmethod
    @wraps(torch.zeros)
    def zeros(*args: Any, **kwargs: Any) -> torch.Tensor:
        # Never put back, for who runs a schedule does so later: so nothing changes beside a GPU.
        if kwargs.get("device") == "cuda" and not torch.cuda.is_available():
            kwargs["device"] = "cpu"
        zeros: Callable[..., torch.Tensor] = torch.zeros
        return zeros(*args, **kwargs)


def _schedules_on_cpu() -> None:
    """Let `get_forward_backward_func` count tokens on the CPU; it names the GPU in three places.

    Source: megatron-core 0.16.1 `pipeline_parallel.schedules`, `total_num_tokens`.
    """
    from megatron.core.pipeline_parallel import schedules

    if not isinstance(schedules.torch, _OnCpu):
        schedules.torch = _OnCpu()
