"""The commands that look at a model and write nothing: `list`, `inspect`, `plan`."""

from __future__ import annotations

import fnmatch
from pathlib import Path
from typing import Annotated, Final

import typer

from bridge import cli_layout_options as options
from bridge.cli import app
from bridge.cli_options import (
    CarryField,
    Json,
    Model,
    Overwrite,
    PpSize,
    Revision,
    TpSize,
    VocabDivisor,
    VppSize,
)
from bridge.console import parse_size, print_json, stdout, table
from bridge.errors import UsageError
from bridge.render import print_description
from bridge.render_layouts import memory_as_data, print_suggestions, suggestions_as_data

_SEQUENCE_LENGTH: Final = 8192


@app.command("list")
def list_models(json_: Json = False) -> None:
    """Show the published checkpoints of the family."""
    from dataclasses import asdict

    from bridge.family import FAMILY

    if json_:
        print_json([asdict(member) for member in FAMILY])
        return
    rows = table(
        "checkpoint", "class", "layers", "parameters", "traits", right=("layers", "parameters")
    )
    for member in FAMILY:
        count = f"{member.num_parameters:,}" if member.num_parameters else "51.5 B published"
        rows.add_row(
            member.hub_id, member.architecture, str(member.num_layers), count, member.traits
        )
    stdout().print(rows)


@app.command()
def inspect(
    model: Model,
    tp: TpSize = 1,
    pp: PpSize = 1,
    vp: VppSize = None,
    divisor: VocabDivisor = 128,
    sequence_parallel: options.SequenceParallel = False,
    all_blocks: Annotated[
        bool, typer.Option("--blocks", help="Show every block, not only the kinds.")
    ] = False,
    draw: options.Draw = None,
    overwrite: Overwrite = False,
    purpose: options.PurposeName = "inference",
    sequence_length: options.SequenceLength = _SEQUENCE_LENGTH,
    micro_batch_size: options.MicroBatchSize = 1,
    data_parallel_size: options.DataParallelSize = 1,
    distributed_optimizer: options.DistributedOptimizer = True,
    recompute: options.Recompute = "none",
    dtype: options.ParamsDtype = None,
    suggest_layout: options.SuggestLayout = False,
    gpus: options.Gpus = None,
    memory: options.Memory = None,
    gpus_per_node: options.GpusPerNode = 8,
    memory_fraction: options.MemoryFraction = 0.9,
    revision: Revision = None,
    carry: CarryField = None,
    json_: Json = False,
) -> None:
    """Show a model's blocks, its exact parameters, and what each rank of a layout holds.

    With --suggest-layout, show the layouts that fit a cluster instead, and their flags.
    """
    from bridge.consumers import consumer_refusals
    from bridge.convert import read_spec
    from bridge.describe import describe
    from bridge.drawing.architecture import architecture
    from bridge.drawing.files import write_picture
    from bridge.hf_config import load_hf_config
    from bridge.hub import resolve_model
    from bridge.layout_search import Machine, suggest_layouts
    from bridge.memory import rank_memory
    from bridge.pipeline import plan_layout
    from bridge.workload import Workload

    machine = None
    if suggest_layout:
        given = (tp, pp, vp, data_parallel_size, sequence_parallel) != (1, 1, None, 1, False)
        if gpus is None or memory is None or given:
            raise UsageError(
                "--suggest-layout chooses every parallel size, for a cluster of a given size",
                hint="give --gpus N and --memory SIZE, and nothing that it chooses",
            )
        machine = Machine(
            num_gpus=gpus, memory=_memory(memory), gpus_per_node=gpus_per_node,
            memory_fraction=memory_fraction,
        )  # fmt: skip
        if all_blocks:
            raise UsageError(
                "--suggest-layout shows layouts, no blocks", hint="leave --blocks away"
            )
    elif (gpus, memory, gpus_per_node, memory_fraction) != (None, None, 8, 0.9):
        raise UsageError(
            "--gpus, --memory, --gpus-per-node and --memory-fraction are what a layout is sought "
            "for",
            hint="add --suggest-layout",
        )
    of_training = (data_parallel_size, distributed_optimizer, recompute)
    if purpose == "inference" and of_training != (1, True, "none"):
        raise UsageError(
            "replicas, the distributed optimizer and recomputation are of training",
            hint="add --purpose training",
        )
    _check_picture(draw, overwrite=overwrite)
    path = resolve_model(model, weights=False, revision=revision)
    spec = read_spec(path, carry=carry or ())
    limit = spec.max_position_embeddings
    if purpose == "inference" and limit < sequence_length != _SEQUENCE_LENGTH:
        raise UsageError(
            f"--sequence-length {sequence_length} is more than the model has positions",
            where=f"max_position_embeddings={limit}",
            hint=f"give at most {limit}",
        )
    work = Workload(
        purpose=purpose,
        sequence_length=sequence_length,
        micro_batch_size=micro_batch_size,
        data_parallel_size=data_parallel_size,
        distributed_optimizer=distributed_optimizer,
        recompute=recompute,
        params_dtype=dtype or spec.params_dtype,
    )
    if machine is not None:
        suggestions = suggest_layouts(spec, work, machine, make_vocab_size_divisible_by=divisor)
        layout = suggestions[0].layout
    else:
        layout = plan_layout(
            spec,
            tensor_model_parallel_size=tp,
            pipeline_model_parallel_size=pp,
            virtual_pipeline_model_parallel_size=vp,
            sequence_parallel=sequence_parallel,
            make_vocab_size_divisible_by=divisor,
        )
    picture = architecture(spec, layout, name=_short_name(model))
    if draw is not None:
        write_picture(picture, draw, overwrite=overwrite)
    if machine is not None:
        found = suggestions_as_data(suggestions, machine, dtype=dtype)
        if json_:
            print_json(found)
        else:
            print_suggestions(model, found)
        return
    ranks = rank_memory(spec, layout, work)
    found = describe(spec, layout) | {
        "memory": memory_as_data(ranks, work),
        "consumers_that_refuse": consumer_refusals(spec, load_hf_config(path)),
    }
    if json_:
        print_json(found)
    else:
        print_description(model, found, picture, all_blocks=all_blocks)


def _check_picture(path: Path | None, *, overwrite: bool) -> None:
    """Refuse a picture that could not be written, and a flag for one that is not asked for."""
    from bridge.drawing.files import check_picture

    if path is not None:
        check_picture(path, overwrite=overwrite)
    elif overwrite:
        raise UsageError(
            "--overwrite is for the picture, and none is drawn", hint="give --draw FILE.svg"
        )


def _memory(text: str) -> int:
    """Bytes of a GPU; a number alone is one of bytes, which is rarely what was meant."""
    found = parse_size(text)
    if found < 1 << 20 and text.strip().isdigit():
        raise UsageError(
            f"--memory {text} is {found} bytes, too little for a GPU",
            hint=f"name the unit: --memory {found}GiB",
        )
    return found


def _short_name(model: str) -> str:
    """What a picture calls a model: the last part of its path, URL or Hub id that is its own."""
    parts = [part for part in model.split("/") if part not in ("", ".", "config.json")]
    return parts[-1].removesuffix(".json") if parts else "model"


@app.command()
def plan(
    model: Model,
    tp: TpSize = 1,
    divisor: VocabDivisor = 128,
    tensor: Annotated[
        str | None, typer.Option("--tensor", help="Only Megatron parameters matching this pattern.")
    ] = None,
    revision: Revision = None,
    carry: CarryField = None,
    json_: Json = False,
) -> None:
    """Show what a conversion would move: one line per tile. Accounts for the weights if there."""
    from bridge.convert import read_spec
    from bridge.hub import resolve_model
    from bridge.plan import Plan, account_for
    from bridge.storage.safetensors import SafetensorsSource

    path = resolve_model(model, weights=False, revision=revision)
    spec = read_spec(path, carry=carry or ())
    plan = Plan(spec, spec.padded_vocab_size(tp, make_vocab_size_divisible_by=divisor))
    accounted = path.is_dir() and any(path.glob("*.safetensors"))
    if accounted:
        with SafetensorsSource(path) as source:
            account_for(plan.hf_shapes, source.tensors, where=str(path))
    tiles = sum(len(tiling.tiles) for tiling in plan.hf_to_mcore.values())
    lines = [line for line in plan.lines() if _matches(line, tensor)]
    if not lines:
        raise UsageError(
            "no Megatron parameter matches the pattern",
            where=f"--tensor {tensor}",
            hint="without it all are shown; * stands for anything, as in *.linear_qkv.weight",
        )
    if json_:
        print_json(
            {
                "padded_vocab_size": plan.padded_vocab_size,
                "num_hf_tensors": len(plan.hf_shapes),
                "num_megatron_parameters": len(plan.mcore_shapes),
                "num_tiles": tiles,
                "plan_sha256": plan.digest(),
                "weights_accounted_for": accounted,
                "tiles": lines,
            }
        )
        return
    for line in lines:
        typer.echo(line)
    checked = "weights accounted for" if accounted else "no weights there to account for"
    typer.echo(
        f"{len(plan.hf_shapes)} HF tensors, {len(plan.mcore_shapes)} Megatron parameters, "
        f"{tiles} tiles; {checked}; plan sha256 {plan.digest()}"
    )


def _matches(line: str, pattern: str | None) -> bool:
    return pattern is None or fnmatch.fnmatchcase(line.partition("[")[0], pattern)
