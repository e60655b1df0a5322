"""One rank of a Megatron-Core process that saves or loads the checkpoint the tests compare with.

Run as `megatron_ranks.py save|load DIRECTORY RANK WORLD_SIZE`. It is a script, not a test: saving
spawns a manager process, which imports the main module anew.

    save   writes `expected()` twice: to DIRECTORY/tp1 whole, to DIRECTORY/tp2 cut over the ranks as
           tensor parallelism does: `columns` by columns, `rows` by rows, `layers` stacked, by rows
    load   reads keys of the test's own checkpoint and torch.saves them to DIRECTORY/loaded.pt
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch

NUM_LAYERS = 3


def expected() -> dict[str, torch.Tensor]:
    """Key to global tensor; every element tells where it belongs."""
    layer = torch.arange(24 * 16, dtype=torch.float32).reshape(24, 16)
    return {
        "decoder.columns.weight": layer,
        "decoder.rows.weight": (layer % 256).to(torch.bfloat16),
        "decoder.norm.weight": torch.linspace(0, 1, 5, dtype=torch.float64),
        "decoder.layers.weight": torch.stack([layer + 1000 * n for n in range(NUM_LAYERS)]),
        "decoder.layers.norm": torch.arange(15, dtype=torch.int64).reshape(NUM_LAYERS, 5),
    }


def save(directory: Path, rank: int, tensor_model_parallel_size: int) -> None:
    """Save with real ShardedTensors; ranks beyond the parts hold replicas."""
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing import ShardedObject, ShardedTensor
    from megatron.core.transformer.enums import AttnBackend

    tensors = expected()
    tp = tensor_model_parallel_size
    tp_rank, replica = rank % tp, rank // tp

    def cut(key: str, axis: int) -> Any:  # noqa: ANN401 - Megatron-Core has no types
        part = tensors[key].chunk(tp, axis)[tp_rank].contiguous()
        return ShardedTensor.from_rank_offsets(key, part, (axis, tp_rank, tp), replica_id=replica)

    state: dict[str, object] = {
        "a": cut("decoder.columns.weight", 1),
        "b": cut("decoder.rows.weight", 0),
        "c": ShardedTensor.from_rank_offsets(
            "decoder.norm.weight", tensors["decoder.norm.weight"], replica_id=rank
        ),
        "d": {
            str(layer): ShardedTensor.from_rank_offsets(
                "decoder.layers.weight",
                tensors["decoder.layers.weight"][layer].chunk(tp)[tp_rank],
                (0, layer, NUM_LAYERS),
                (1, tp_rank, tp),
                prepend_axis_num=1,
                replica_id=replica,
            )
            for layer in range(NUM_LAYERS)
        },
        "e": {
            str(layer): ShardedTensor.from_rank_offsets(
                "decoder.layers.norm",
                tensors["decoder.layers.norm"][layer],
                (0, layer, NUM_LAYERS),
                prepend_axis_num=1,
                replica_id=rank,
            )
            for layer in range(NUM_LAYERS)
        },
        "f": ShardedObject("decoder._extra_state", {"scale": 1.5}, (1,), (0,), replica_id=rank),
        "args": argparse.Namespace(
            hidden_size=16, params_dtype=torch.bfloat16, attention_backend=AttnBackend.flash
        ),
        "checkpoint_version": 3.0,
        "iteration": 7,
    }
    if rank == 0:
        directory.mkdir(parents=True)
    torch.distributed.barrier()
    dist_checkpointing.save(
        state, str(directory), content_metadata={"singleton_local_shards": False}
    )


def load(directory: Path) -> None:
    """Load strictly, with nothing missing and nothing unexpected, and keep what was loaded."""
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing import ShardedObject, ShardedTensor

    layer = (6, 4)
    state: dict[str, object] = {
        "stacked": {
            str(n): ShardedTensor.from_rank_offsets(
                "decoder.layers.mlp.linear_fc1.weight",
                torch.zeros(layer, dtype=torch.bfloat16),
                (0, n, 2),
                prepend_axis_num=1,
            )
            for n in range(2)
        },
        "single": ShardedTensor.from_rank_offsets(
            "decoder.layers.1.mlp.linear_fc2.weight", torch.zeros(4, 10)
        ),
        "extra": [
            ShardedObject("decoder.layers.mlp.linear_fc1._extra_state", None, (2,), (n,))
            for n in range(2)
        ],
    }
    loaded = dist_checkpointing.load(state, str(directory), strict="raise_all")
    # The common state was loaded weights_only; a namespace of plain values goes back the same way.
    torch.save(loaded, directory / "loaded.pt")


def main() -> None:
    """Set a CPU up for Megatron-Core, then do one thing."""
    command, directory, rank, world_size = sys.argv[1], *map(str, sys.argv[2:])
    torch.cuda.current_device = lambda: torch.device("cpu")  # type: ignore[assignment,return-value] # as bridge.platform does
    torch.cuda.synchronize = lambda *_: None  # as bridge.platform does
    torch.distributed.init_process_group(
        "gloo",
        init_method=f"file://{directory}.rendezvous",
        rank=int(rank),
        world_size=int(world_size),
    )
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    # It only logs memory with it, and without psutil it fails in a way that hangs the save.
    filesystem_async._process_memory = lambda: 0
    if command == "save":
        for size in (1, 2):
            save(Path(directory) / f"tp{size}" / "iter_0000007", int(rank), size)
    else:
        load(Path(directory))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
