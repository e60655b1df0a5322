"""The real Megatron-Bridge without a GPU, run by the interpreter that it is installed in.

    python megatron_bridge_on_cpu.py export MEGATRON HF OUT     its export of a checkpoint
    python megatron_bridge_on_cpu.py resave MEGATRON OUT        it loads one and saves it again
    python megatron_bridge_on_cpu.py import HF OUT              its import of a checkpoint

It imports packages that want a GPU and that a CPU run never calls; stand-ins serve for those.
Megatron-Core comes first, and so finds no Transformer Engine and builds its own layers.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import sys
import types
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import transformers  # noqa: F401 - it asks for what is installed, and is to see no stand-in

_STAND_INS = {
    "apex", "causal_conv1d", "datasets", "flash_attn", "grouped_gemm", "mamba_ssm", "modelopt",
    "nvidia_resiliency_ext", "transformer_engine", "transformer_engine_torch", "wandb",
}  # fmt: skip
_CORE = (
    "models.gpt.heterogeneous.heterogeneous_layer_specs", "models.gpt.gpt_model",
    "transformer.transformer_block", "dist_checkpointing", "tensor_parallel", "optimizer",
    "distributed", "pipeline_parallel",
)  # fmt: skip


class _Anything(type):
    """A class that has every attribute, each another such class."""

    def __getattr__(cls, name: str) -> Any:  # noqa: ANN401 - anything
        if name.startswith("__"):
            raise AttributeError(name)
        return _anything(name)

    def __iter__(cls) -> Iterator[Any]:
        return iter(())


def _anything(name: str) -> Any:  # noqa: ANN401 - anything
    return _Anything(name, (), {"__init__": lambda *_, **__: None})


class _StandIn(types.ModuleType):
    def __getattr__(self, name: str) -> Any:  # noqa: ANN401 - anything
        if name.startswith("__"):
            raise AttributeError(name)
        found = _anything(name)
        setattr(self, name, found)
        return found


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        del path, target
        if fullname.partition(".")[0] not in _STAND_INS:
            return None
        return importlib.machinery.ModuleSpec(fullname, self, is_package=True)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        found = _StandIn(spec.name)
        found.__path__ = []
        found.__dict__["__version__"] = "0.0.0"
        return found

    def exec_module(self, module: types.ModuleType) -> None:
        """There is nothing in it."""


def _upstream() -> tuple[Any, Any]:
    """Its `AutoBridge`, and the module that loads and saves, with Megatron-Core's own layers."""
    for name in _CORE:
        importlib.import_module(f"megatron.core.{name}")
    sys.meta_path.append(_Finder())
    # What it asks of a GPU whether there is one or not.
    cuda: Any = torch.cuda
    cuda.get_rng_state, cuda.synchronize = torch.get_rng_state, lambda *_: None
    cuda.current_device = lambda: "cpu"
    provider: Any = importlib.import_module("megatron.bridge.models.gpt_provider")
    provider.transformer_engine_layer_spec = provider.local_layer_spec
    training = importlib.import_module("megatron.bridge.training.model_load_save")
    return importlib.import_module("megatron.bridge").AutoBridge, training


def main(what: str, *paths: str) -> None:
    """Do one of the three."""
    auto, training = _upstream()
    if what == "export":
        megatron, hf, out = paths
        auto.from_hf_pretrained(hf).export_ckpt(megatron, out, show_progress=False)
        return
    source, out = paths
    with training.temporary_distributed_context(backend="gloo"):
        if what == "resave":
            model = training.load_megatron_model(
                source, use_cpu_init=True, skip_temp_dist_context=True
            )
        else:
            provider = auto.from_hf_pretrained(
                source, torch_dtype=torch.float32
            ).to_megatron_provider()
            provider.apply_rope_fusion = provider.persist_layer_norm = False
            provider.gradient_accumulation_fusion = False
            provider.finalize()
            model = provider.provide_distributed_model(
                wrap_with_ddp=False, use_cpu_initialization=True, bf16=False
            )
        training.save_megatron_model(
            model if isinstance(model, list) else [model], out, ckpt_format="torch_dist"
        )


if __name__ == "__main__":
    main(*sys.argv[1:])
