"""A process becomes a Megatron-Core rank and ceases to be one, on a CPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import pytest
import torch

from bridge import platform
from bridge.errors import EnvironmentMissingError, LayoutError
from bridge.spec import ParallelLayout

PP2 = ParallelLayout(pipeline_model_parallel_size=2, num_layers_per_stage=(1, 1))
LAYOUTS = (
    ParallelLayout(tensor_model_parallel_size=2, num_layers_per_stage=(2,)),
    PP2,
    ParallelLayout(num_layers_per_stage=(2,)),
    ParallelLayout(
        pipeline_model_parallel_size=2,
        virtual_pipeline_model_parallel_size=2,
        num_layers_per_stage=(1, 1, 1, 1),
    ),
    ParallelLayout(tensor_model_parallel_size=2, num_layers_per_stage=(2,), sequence_parallel=True),
)


def run_rank(rank: int, folder: Path) -> None:
    """Form the groups of every layout in turn and say what they are."""
    from megatron.core import parallel_state

    for index, layout in enumerate(LAYOUTS):
        platform.initialize(
            rank, 2, layout, init_method=f"file://{folder}/{index}", timeout=timedelta(seconds=60)
        )
        total = torch.tensor([rank + 1])
        torch.distributed.all_reduce(total, group=parallel_state.get_tensor_model_parallel_group())
        sys.stdout.write(
            f"{parallel_state.get_tensor_model_parallel_world_size()} "
            f"{parallel_state.get_pipeline_model_parallel_world_size()} "
            f"{parallel_state.get_virtual_pipeline_model_parallel_world_size()} "
            f"{parallel_state.get_data_parallel_world_size()} {int(total)}\n"
        )
        platform.finalize()
        assert not torch.distributed.is_initialized()
        assert not parallel_state.model_parallel_is_initialized()


@pytest.mark.ranks
def test_the_same_processes_form_one_layout_after_another(tmp_path: Path) -> None:
    """TP, PP, neither, VPP, TP again: sizes are right and the TP group sums over its ranks."""
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    ranks = [
        subprocess.Popen(  # noqa: S603 - our own file
            [sys.executable, __file__, str(rank), str(tmp_path)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )
        for rank in range(2)
    ]
    try:
        outputs = [process.communicate(timeout=120) for process in ranks]
    finally:
        for process in ranks:
            process.kill()
    for rank, (output, log) in enumerate(outputs):
        alone = rank + 1
        assert output.splitlines() == [
            "2 1 None 1 3",
            f"1 2 None 1 {alone}",
            f"1 1 None 2 {alone}",
            f"1 2 2 1 {alone}",
            "2 1 None 1 3",
        ], log


@pytest.mark.parametrize(
    ("rank", "world_size", "place", "device", "backend"),
    [
        (3, 4, (None, None), 3, "nccl"),
        (9, 16, (1, 8), 1, "nccl"),
        (1, 2, (1, 16), 1, "nccl"),
        (5, 8, (1, 4), 1, "nccl"),
        (9, 16, (9, 16), 1, "gloo"),
        (9, 16, (None, None), 1, "gloo"),
    ],
)
def test_a_rank_takes_the_gpu_of_its_place_and_nccl_where_nobody_shares_one(
    monkeypatch: pytest.MonkeyPatch,
    rank: int,
    world_size: int,
    place: tuple[int | None, int | None],
    device: int,
    backend: str,
) -> None:
    """Eight GPUs to a host: on two of them, as a part of one, and too few on one."""
    joined: list[str] = []
    taken: list[torch.device] = []

    def join(backend: str, **_options: object) -> None:
        joined.append(backend)
        raise InterruptedError

    monkeypatch.setattr(platform, "prepare", lambda _device: torch.device("cuda", 0))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    monkeypatch.setattr(torch.distributed, "init_process_group", join)
    layout = ParallelLayout(tensor_model_parallel_size=2, num_layers_per_stage=(1,))
    with pytest.raises(InterruptedError):
        platform.initialize(
            rank, world_size, layout, device="cuda", local_rank=place[0],
            local_world_size=place[1],
        )  # fmt: skip
    assert taken == [torch.device("cuda", device)]
    assert joined == [backend]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("forbidden", [True, False])
def test_tf32_is_measured_and_can_be_forbidden(*, forbidden: bool) -> None:
    """Torch's products, and Transformer Engine's where it is installed, in a new process."""
    program = (
        "import contextlib, json\n"
        "with contextlib.suppress(ImportError):\n"
        "    import transformer_engine.pytorch\n"
        "from bridge.platform import float32_product_error, forbid_tf32\n"
        f"if {forbidden}: forbid_tf32()\n"
        "print(json.dumps(float32_product_error()))"
    )
    environment = {name: one for name, one in os.environ.items() if name != "NVIDIA_TF32_OVERRIDE"}
    done = subprocess.run(  # noqa: S603 - our own words
        [sys.executable, "-c", program],
        env=environment
        | {
            "PYTHONPATH": os.pathsep.join(
                [str(Path(__file__).parents[2]), environment.get("PYTHONPATH", "")]
            )
        },
        capture_output=True, text=True, check=True, timeout=120,
    )  # fmt: skip
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["torch"] < 10
    if "transformer-engine" in found:
        assert (found["transformer-engine"] < 10) is forbidden


def test_ranks_that_do_not_fill_the_layout_are_refused() -> None:
    """Before anything waits for anyone."""
    with pytest.raises(LayoutError, match="3 ranks for layout tp1-pp2 of 2"):
        platform.initialize(0, 3, PP2, init_method="tcp://127.0.0.1:1")
    assert not torch.distributed.is_initialized()


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_leaving_imports_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """At a process's end nothing can be: a conversion under torchrun never needed Megatron."""
    monkeypatch.delitem(sys.modules, "megatron.core.parallel_state", raising=False)
    platform.finalize()
    assert "megatron.core.parallel_state" not in sys.modules


def test_without_a_gpu_torch_cuda_answers_for_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """`device=torch.cuda.current_device()`, as Megatron writes it, is then the CPU."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr(torch.cuda, "current_device", torch.cuda.current_device)
    monkeypatch.setattr(torch.cuda, "synchronize", torch.cuda.synchronize)
    assert platform.prepare("cpu") == torch.device("cpu")
    assert torch.ones(2, device=torch.cuda.current_device()).device.type == "cpu"
    torch.cuda.synchronize()
    assert platform.prepare("cpu") == torch.device("cpu")
    with pytest.raises(EnvironmentMissingError, match="no CUDA device"):
        platform.prepare("cuda")


def test_the_description_names_versions_that_are_installed_and_those_that_are_not() -> None:
    """Evidence must say what ran."""
    found = platform.describe()
    assert found["device"] == "cpu"
    assert found["versions"]["torch"].startswith(torch.__version__.split("+")[0])
    assert found["versions"]["megatron-core"]
    assert "transformer-engine" in found["versions"]


if __name__ == "__main__":
    run_rank(int(sys.argv[1]), Path(sys.argv[2]))
