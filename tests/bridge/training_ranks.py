"""What training does inside rank processes: Megatron-Core's own optimizer, saves and loads.

A module beside the tests, because ranks import its functions by name. Nothing here writes a
checkpoint but Megatron-Core (`torch_dist`) and torch (the legacy format).
"""

from __future__ import annotations

import argparse
import contextlib
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.overrides import TorchFunctionMode

from bridge.backward import loss_and_gradients
from bridge.dtypes import Dtype
from bridge.live_parameters import load_hf
from bridge.megatron_args import checkpoint_args
from bridge.model import build_model
from bridge.spec import ModelSpec, ParallelLayout
from bridge.storage.safetensors import SafetensorsSource
from harness.live import live_tensors
from harness.ranks import RankContext

ITERATION = 3


class CudaIsCpu(TorchFunctionMode):
    """Let the optimizer, which names CUDA's tensor types and device outright, run on a CPU."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # noqa: ANN401 - as the base class
        """Answer for CUDA where there is none."""
        kwargs = dict(kwargs or {})
        if str(kwargs.get("device", "")).startswith("cuda"):
            kwargs["device"] = "cpu"
        if func is torch.Tensor.cuda:
            return args[0]
        found = func(*args, **kwargs)
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            return found.replace("torch.", "torch.cuda.", 1)
        return found


@contextlib.contextmanager
def groups_of(layout: ParallelLayout, formed: ParallelLayout) -> Iterator[None]:
    """Megatron's groups of a layout of fewer ranks than have met: the rest is data parallel."""
    from megatron.core import parallel_state

    def form(one: ParallelLayout) -> None:
        parallel_state.destroy_model_parallel()
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=one.tensor_model_parallel_size,
            pipeline_model_parallel_size=one.pipeline_model_parallel_size,
            virtual_pipeline_model_parallel_size=one.virtual_pipeline_model_parallel_size,
            create_gloo_process_groups=False,
        )

    form(layout)
    try:
        yield
    finally:
        form(formed)


class Training:
    """A model on its ranks with DistributedDataParallel and the distributed optimizer."""

    def __init__(self, spec: ModelSpec, layout: ParallelLayout, hf: Path | None) -> None:
        from megatron.core.distributed import (
            DistributedDataParallel,
            DistributedDataParallelConfig,
        )
        from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

        self.spec, self.layout = spec, layout
        self.parts = build_model(spec, layout, params_dtype=spec.params_dtype)
        if hf is not None:
            with SafetensorsSource(hf) as source:
                load_hf(self.parts, spec, layout, source)
        with CudaIsCpu():
            self.wrapped = [
                DistributedDataParallel(
                    part.config, DistributedDataParallelConfig(use_distributed_optimizer=True), part
                )
                for part in self.parts
            ]
            self.optimizer = get_megatron_optimizer(
                OptimizerConfig(
                    optimizer="adam",
                    lr=0.01,
                    bf16=spec.params_dtype == "bfloat16",
                    params_dtype=getattr(torch, spec.params_dtype),
                    use_distributed_optimizer=True,
                    clip_grad=1.0,
                ),
                self.wrapped,
                use_gloo_process_groups=False,
            )

    def step(self, seed: int) -> float:
        """One step on a batch of this data-parallel rank's own; the loss before it."""
        from megatron.core import parallel_state

        generator = torch.Generator().manual_seed(
            100 * seed + parallel_state.get_data_parallel_rank()
        )
        input_ids = torch.randint(0, self.spec.vocab_size, (2, 9), generator=generator)
        for part in self.wrapped:
            part.zero_grad_buffer()
        self.optimizer.zero_grad()
        loss = loss_and_gradients(self.parts, self.spec, self.layout, input_ids)
        with CudaIsCpu():
            for part in self.wrapped:
                part.finish_grad_sync()
            updated, norm, _ = self.optimizer.step()
        assert updated
        assert norm > 0
        return float(loss)

    def state(self, *, is_loading: bool = False) -> dict[str, Any]:
        """The sharded state that Megatron-LM's `generate_state_dict` builds, keys and all."""
        from megatron.core.dist_checkpointing import ShardedObject

        several = len(self.parts) > 1
        model = {
            f"model{index}" if several else "model": part.sharded_state_dict()
            for index, part in enumerate(self.parts)
        }
        with CudaIsCpu():
            optimizer = self.optimizer.sharded_state_dict(
                model if several else model["model"],
                is_loading=is_loading,
                metadata={"distrib_optim_sharding_type": "dp_reshardable"},
            )
        rank = torch.distributed.get_rank()
        generators = {"random": random.getstate(), "np": np.random.get_state()}  # noqa: NPY002 - what Megatron-LM saves
        rng = ShardedObject(
            "rng_state", [generators], (torch.distributed.get_world_size(),), (rank,)
        )
        return {
            **model,
            "optimizer": optimizer,
            "rng_state": rng,
            "opt_param_scheduler": {"max_lr": 0.01, "num_steps": 24},
        }


def train_and_save(
    context: RankContext, spec: ModelSpec, layout: ParallelLayout, hf: Path, root: Path
) -> dict[str, Any]:
    """Train two steps from a Hugging Face checkpoint; save in both formats all there is.

    Returns:
        What `held` does, and the losses.
    """
    from megatron.core import dist_checkpointing

    with groups_of(layout, context.layout):
        training = Training(spec, layout, hf)
        losses = [training.step(seed) for seed in range(2)]
        iteration = _new_iteration(context, root / "torch_dist")
        common = _common(spec, layout)
        dist_checkpointing.save(common | training.state(), str(iteration))
        _save_legacy(context, training.parts, common, root / "torch", training.optimizer)
        torch.distributed.barrier()
        return held(training.parts) | {"losses": losses}


def save_legacy(
    context: RankContext, spec: ModelSpec, layout: ParallelLayout, hf: Path, root: Path
) -> None:
    """Save an untrained model in the legacy format."""
    parts = build_model(spec, layout, params_dtype=spec.params_dtype)
    with SafetensorsSource(hf) as source:
        load_hf(parts, spec, layout, source)
    _save_legacy(context, parts, _common(spec, layout), root, None)
    torch.distributed.barrier()


def resume(
    context: RankContext, spec: ModelSpec, layout: ParallelLayout, imported: Path
) -> dict[str, Any]:
    """Start training from an import, loaded by Megatron-Core alone, strict; two steps.

    Returns:
        What `held` does, the losses, and the `args` that came with the checkpoint.
    """
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.validation import StrictHandling

    with groups_of(layout, context.layout):
        training = Training(spec, layout, None)
        for part in training.parts:
            for parameter in part.parameters():
                torch.nn.init.constant_(parameter, float("nan"))
        wanted = {
            f"model{index}": part.sharded_state_dict() for index, part in enumerate(training.parts)
        }
        loaded = dist_checkpointing.load(
            wanted, str(imported), strict=StrictHandling.RAISE_UNEXPECTED
        )
        for index, part in enumerate(training.parts):
            part.load_state_dict(loaded[f"model{index}"], strict=True)
        training.optimizer.reload_model_params()  # as Megatron-LM's --finetune does
        losses = [training.step(seed) for seed in range(2)]
        return held(training.parts) | {"losses": losses, "args": vars(loaded["args"])}


def _new_iteration(context: RankContext, root: Path) -> Path:
    iteration = root / f"iter_{ITERATION:07d}"
    if context.rank == 0:
        iteration.mkdir(parents=True)
        (root / "latest_checkpointed_iteration.txt").write_text(str(ITERATION))
    torch.distributed.barrier()
    return iteration


def _save_legacy(
    context: RankContext,
    parts: list[Any],
    common: dict[str, Any],
    root: Path,
    optimizer: Any,  # noqa: ANN401 - Megatron-Core has no types
) -> None:
    """Write this rank's file as Megatron-LM's `save_checkpoint` does."""
    from megatron.core import parallel_state

    iteration = _new_iteration(context, root)
    name = f"mp_rank_{parallel_state.get_tensor_model_parallel_rank():02d}"
    if parallel_state.get_pipeline_model_parallel_world_size() > 1:
        name += f"_{parallel_state.get_pipeline_model_parallel_rank():03d}"
    if parallel_state.get_data_parallel_rank():
        return
    models = [part.state_dict_for_save_checkpoint() for part in parts]
    state = {
        **common,
        **(
            {"model": models[0]}
            if len(models) == 1
            else {f"model{index}": model for index, model in enumerate(models)}
        ),
        "opt_param_scheduler": {"max_lr": 0.01},
        "rng_state": [{"random": random.getstate(), "np": np.random.get_state()}],  # noqa: NPY002 - what Megatron-LM saves
    }
    (iteration / name).mkdir()
    if optimizer is not None:
        state["optimizer"] = optimizer.state_dict()
        torch.save({"anything": 1}, iteration / name / "distrib_optim.pt")
    torch.save(state, iteration / name / "model_optim_rng.pt")


def _common(spec: ModelSpec, layout: ParallelLayout) -> dict[str, Any]:
    return {
        "args": _args(spec, layout),
        "checkpoint_version": 3.0,
        "iteration": ITERATION,
        "num_floating_point_operations_so_far": 0,
    }


def _args(spec: ModelSpec, layout: ParallelLayout) -> argparse.Namespace:
    """A training run's arguments: those of the model, and samples of the hundreds of others."""
    from megatron.core.transformer.enums import AttnBackend

    args = {
        name: getattr(torch, value.name) if isinstance(value, Dtype) else value
        for name, value in checkpoint_args(spec, layout).items()
    }
    sizes = {
        "tensor_model_parallel_size": layout.tensor_model_parallel_size,
        "pipeline_model_parallel_size": layout.pipeline_model_parallel_size,
        "virtual_pipeline_model_parallel_size": layout.virtual_pipeline_model_parallel_size,
        "attention_backend": AttnBackend.auto,
        "use_distributed_optimizer": True,
        "no_save_optim": None,
        "lr": 0.01,
    }
    return argparse.Namespace(**(args | sizes))


def held(parts: list[Any]) -> dict[str, Any]:
    """This rank's place and its live parameters' bits, by Megatron's own names."""
    from megatron.core import parallel_state

    return {
        "tp_rank": parallel_state.get_tensor_model_parallel_rank(),
        "dp_rank": parallel_state.get_data_parallel_rank(),
        "tensors": {
            one.name: one.tensor.detach().view(torch.int16).numpy().copy()
            for one in live_tensors(parts)
        },
    }
