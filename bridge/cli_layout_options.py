"""The flags of `inspect` that say what a layout is for, and what it has to fit."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

SequenceParallel = Annotated[
    bool,
    typer.Option(
        "--sequence-parallel", help="Divide activations outside the TP regions among TP ranks too."
    ),
]
Draw = Annotated[
    Path | None,
    typer.Option("--draw", help="Write the picture of the blocks to this .svg or .png file."),
]
PurposeName = Annotated[
    Literal["inference", "training"],
    typer.Option(
        "--purpose",
        help="What memory is counted for: weights and KV cache, or weights, gradients, Adam and "
        "activations.",
    ),
]
SequenceLength = Annotated[
    int,
    typer.Option(
        "--sequence-length", min=1, max=1 << 30, help="Tokens of a sequence, answer included."
    ),
]
MicroBatchSize = Annotated[
    int,
    typer.Option(
        "--micro-batch-size", min=1, max=1 << 20, help="Sequences that a rank holds at once."
    ),
]
DataParallelSize = Annotated[
    int,
    typer.Option(
        "--data-parallel-size", min=1, help="Replicas, which share the optimizer's state."
    ),
]
DistributedOptimizer = Annotated[
    bool,
    typer.Option(
        "--use-distributed-optimizer/--no-use-distributed-optimizer",
        help="Deal the optimizer's state out over the replicas.",
    ),
]
Recompute = Annotated[
    Literal["none", "full"],
    typer.Option(
        "--recompute-granularity",
        help="full: keep each block's input alone, and run the block again on the way back.",
    ),
]
ParamsDtype = Annotated[
    Literal["float32", "bfloat16", "float16"] | None,
    typer.Option(
        "--dtype", show_default="the model's own", help="Of weights, activations and cache."
    ),
]
SuggestLayout = Annotated[
    bool,
    typer.Option(
        "--suggest-layout", help="Find the layouts that fit --gpus of --memory each, best first."
    ),
]
Gpus = Annotated[int | None, typer.Option("--gpus", min=1, help="All GPUs that there are.")]
Memory = Annotated[str | None, typer.Option("--memory", help="Memory of each GPU, such as 80GiB.")]
GpusPerNode = Annotated[
    int, typer.Option("--gpus-per-node", min=1, help="TP groups stay within a node.")
]
MemoryFraction = Annotated[
    float,
    typer.Option(
        "--memory-fraction", min=0.01, max=1.0,
        help="Share of the memory that the estimate may fill; the rest is for what it leaves out.",
    ),
]  # fmt: skip
