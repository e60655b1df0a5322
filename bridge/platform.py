"""The one place that knows a CPU from a GPU, and how a rank joins and leaves Megatron-Core.

Megatron-Core asks `torch.cuda` for its device even where there is none. On a machine without a GPU
`prepare` answers for it; everything else runs unchanged, over gloo.

Importing this module starts no thread and touches no device, so that rank processes can be forked
from a server that has it loaded.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform as host
import sys
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Final, Literal

import torch

from bridge.errors import EnvironmentMissingError, LayoutError
from bridge.spec import ParallelLayout

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

Device = Literal["cpu", "cuda"]

_TIMEOUT: Final = timedelta(minutes=5)
_SEED: Final = 1234
_PACKAGES: Final = (
    "torch",
    "megatron-core",
    "transformer-engine",
    "flash-attn",
    "transformers",
    "numpy",
)


def prepare(device: Device = "cpu") -> torch.device:
    """Make this process fit to run Megatron-Core on a kind of device. May be called again.

    On a CPU, GPUs that CUDA has not been started on are hidden from this process first, and
    `torch.cuda.current_device` and `torch.cuda.synchronize` then stand for the CPU.

    Returns:
        The device tensors belong on until `initialize` picks one GPU of several.

    Raises:
        EnvironmentMissingError: BR500, no GPU where one is asked for, or GPUs that are already in
            use where the CPU is.
    """
    if device == "cuda":
        if not torch.cuda.is_available():
            raise EnvironmentMissingError(
                "no CUDA device is available", hint="run on the CPU with --device cpu"
            )
        return torch.device("cuda", torch.cuda.current_device())
    if not torch.cuda.is_initialized():  # type: ignore[no-untyped-call]  # torch leaves it untyped
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    if torch.cuda.is_available():
        raise EnvironmentMissingError(
            "this process already uses a GPU and cannot run Megatron-Core on the CPU",
            hint="start it with CUDA_VISIBLE_DEVICES set to nothing",
        )
    torch.cuda.current_device = _current_device  # type: ignore[assignment]  # Megatron passes it on as `device=` only
    torch.cuda.synchronize = _synchronize
    return torch.device("cpu")


def refuse_missing_gpu(device: str) -> None:
    """See that there is a GPU where one is asked for, before any work.

    Raises:
        EnvironmentMissingError: BR500, there is none.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise EnvironmentMissingError(
            "there is no GPU that torch can use", where="--device cuda", hint="use --device cpu"
        )


def forbid_tf32() -> None:
    """Let float32 products on GPUs be float32's, Transformer Engine's and cuBLAS's own included.

    Transformer Engine asks cuBLAS for TF32, ten bits of a factor instead of 23, whatever torch is
    told; the libraries obey a variable that they read when they start. So call this before anything
    touches a GPU: in this process, or in the parent of those that do.
    """
    os.environ["NVIDIA_TF32_OVERRIDE"] = "0"
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False


def float32_product_error(size: int = 256) -> dict[str, float]:
    """How exact float32 products on this GPU are, measured: rms error over rms, in ulp of float32.

    Returns:
        By who multiplies: "torch", and "transformer-engine" where that is loaded. About 1
        in float32, thousands in TF32.
    """
    generator = torch.Generator().manual_seed(_SEED)
    left, right = (torch.randn(size, size, generator=generator) for _ in range(2))
    exact = left.double() @ right.double().t()
    products = {"torch": left.cuda() @ right.cuda().t()}
    if "transformer_engine" in sys.modules:
        import transformer_engine.pytorch as te

        linear = te.Linear(size, size, bias=False, params_dtype=torch.float32, device="cuda")
        with torch.no_grad():
            linear.weight.copy_(right)
            products["transformer-engine"] = linear(left.cuda())
    unit = exact.square().mean().sqrt() * torch.finfo(torch.float32).eps
    return {
        name: float((found.cpu().double() - exact).square().mean().sqrt() / unit)
        for name, found in products.items()
    }


def _current_device() -> torch.device:
    return torch.device("cpu")


def _synchronize(device: object = None) -> None:
    """Do nothing: a CPU has no queue to wait for."""


def initialize(
    rank: int,
    world_size: int,
    layout: ParallelLayout,
    *,
    init_method: str | None = None,
    store: Store | None = None,
    device: Device = "cpu",
    timeout: timedelta = _TIMEOUT,
    seed: int = _SEED,
    local_rank: int | None = None,
    local_world_size: int | None = None,
) -> torch.device:
    """Join `world_size` ranks and form Megatron-Core's groups for a layout.

    Ranks are laid out as Megatron does, TP innermost, PP outermost; with more ranks than the
    layout needs the rest is data parallel. Ranks of a host share its GPUs in turn where there are
    fewer, over gloo then, because NCCL refuses shared devices.

    Args:
        rank: This process's.
        world_size: A multiple of `layout.world_size`.
        layout: How the model is cut.
        init_method: Where ranks meet, as torch.distributed takes it. A `file://` must be new each
            time.
        store: Instead of `init_method`.
        device: "cpu" or "cuda".
        timeout: For every collective.
        seed: Of torch's generator and Megatron's.
        local_rank: This process's among those of its host; None where all ranks are on it.
        local_world_size: How many there are on a host, the same for all ranks; None likewise.

    Returns:
        This rank's device.

    Raises:
        LayoutError: BR200, the ranks do not fit the layout.
        EnvironmentMissingError: BR500, see `prepare`.
    """
    if world_size % layout.world_size:
        raise LayoutError(
            f"{world_size} ranks for layout {layout.name} of {layout.world_size}",
            hint=f"start a multiple of {layout.world_size} ranks",
        )
    mine = join(
        rank, world_size,
        init_method=init_method, store=store, device=device, timeout=timeout,
        local_rank=local_rank, local_world_size=local_world_size,
    )  # fmt: skip
    try:
        form_groups(layout, distributed_timeout_minutes=timeout.total_seconds() / 60)
        seed_everything(seed, device)
    except BaseException:
        finalize()
        raise
    return mine


def join(
    rank: int,
    world_size: int,
    *,
    init_method: str | None = None,
    store: Store | None = None,
    device: Device = "cpu",
    timeout: timedelta = _TIMEOUT,
    local_rank: int | None = None,
    local_world_size: int | None = None,
) -> torch.device:
    """Join `world_size` ranks, without Megatron-Core's groups; arguments are `initialize`'s.

    Raises:
        EnvironmentMissingError: BR500, see `prepare`.
    """
    mine = prepare(device)
    backend = "gloo"
    if device == "cuda":
        num_gpus = torch.cuda.device_count()
        mine = torch.device("cuda", (rank if local_rank is None else local_rank) % num_gpus)
        torch.cuda.set_device(mine)
        if min(world_size, local_world_size or world_size) <= num_gpus:
            backend = "nccl"
    torch.distributed.init_process_group(
        backend,
        rank=rank,
        world_size=world_size,
        init_method=init_method,
        store=store,
        timeout=timeout,
    )
    return mine


def form_groups(layout: ParallelLayout, **options: object) -> None:
    """Form Megatron-Core's groups for a layout, in ranks that have joined.

    Args:
        layout: How the model is cut.
        **options: Of `megatron.core.parallel_state.initialize_model_parallel`, sizes excepted.
    """
    from megatron.core import parallel_state

    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=layout.tensor_model_parallel_size,
        pipeline_model_parallel_size=layout.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=layout.virtual_pipeline_model_parallel_size,
        **{"create_gloo_process_groups": False, **options},
    )


def seed_everything(seed: int | None = _SEED, device: Device = "cpu") -> None:
    """Seed torch, unless `seed` is None, and put Megatron's RNG tracker in its inference form.

    The ordinary tracker keeps CUDA generator states, which a CPU has none of; the inference one
    does nothing, and nothing here drops out or initialises.
    """
    from megatron.core.tensor_parallel import random

    random.initialize_rng_tracker(inference_rng_tracker=True, force_reset=True)
    if seed is None:
        return
    torch.manual_seed(seed)
    if device == "cuda":
        random.model_parallel_cuda_manual_seed(seed, inference_rng_tracker=True)


def finalize() -> None:
    """Leave all groups; the process may then `initialize` again, for any layout."""
    # Where it was never imported it has formed none, and a process that ends can import no more.
    parallel_state = sys.modules.get("megatron.core.parallel_state")
    if parallel_state is not None:
        parallel_state.destroy_model_parallel()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def describe(device: Device = "cpu") -> dict[str, Any]:
    """What results were computed on: the device, its host and the versions, for evidence."""
    versions: dict[str, str | None] = {}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    found: dict[str, Any] = {
        "device": device,
        "machine": host.machine(),
        "system": host.system(),
        "python": host.python_version(),
        "num_threads": torch.get_num_threads(),
        "versions": versions,
    }
    if device == "cuda":
        found |= {
            "device_name": torch.cuda.get_device_name(),
            "device_count": torch.cuda.device_count(),
            "cuda": torch.version.cuda,
        }
    return found
