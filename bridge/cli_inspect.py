"""The commands that look at a model and write nothing: `list`, `inspect`, `plan`."""

from __future__ import annotations

import fnmatch
from typing import Annotated

import typer

from bridge.cli import app
from bridge.cli_options import (
    CarryField,
    Json,
    Model,
    PpSize,
    Revision,
    TpSize,
    VocabDivisor,
    VppSize,
)
from bridge.console import print_json, stdout, table
from bridge.render import print_description


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
    all_blocks: Annotated[
        bool, typer.Option("--blocks", help="Show every block, not only the kinds.")
    ] = False,
    revision: Revision = None,
    carry: CarryField = None,
    json_: Json = False,
) -> None:
    """Show a model's blocks, its exact parameters, and what each rank of a layout holds."""
    from bridge.consumers import consumer_refusals
    from bridge.convert import read_spec
    from bridge.describe import describe
    from bridge.hf_config import load_hf_config
    from bridge.hub import resolve_model
    from bridge.pipeline import plan_layout

    path = resolve_model(model, weights=False, revision=revision)
    spec = read_spec(path, carry=carry or ())
    layout = plan_layout(
        spec,
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        virtual_pipeline_model_parallel_size=vp,
        make_vocab_size_divisible_by=divisor,
    )
    refusals = consumer_refusals(spec, load_hf_config(path))
    found = describe(spec, layout) | {"consumers_that_refuse": refusals}
    if json_:
        print_json(found)
    else:
        print_description(model, found, all_blocks=all_blocks)


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
    if json_:
        print_json(
            {
                "padded_vocab_size": plan.padded_vocab_size,
                "num_hf_tensors": len(plan.hf_shapes),
                "num_megatron_parameters": len(plan.mcore_shapes),
                "num_tiles": tiles,
                "plan_sha256": plan.digest(),
                "weights_accounted_for": accounted,
                "tiles": [line for line in plan.lines() if _matches(line, tensor)],
            }
        )
        return
    for line in plan.lines():
        if _matches(line, tensor):
            typer.echo(line)
    checked = "weights accounted for" if accounted else "no weights there to account for"
    typer.echo(
        f"{len(plan.hf_shapes)} HF tensors, {len(plan.mcore_shapes)} Megatron parameters, "
        f"{tiles} tiles; {checked}; plan sha256 {plan.digest()}"
    )


def _matches(line: str, pattern: str | None) -> bool:
    return pattern is None or fnmatch.fnmatchcase(line.partition("[")[0], pattern)
