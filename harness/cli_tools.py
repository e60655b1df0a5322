"""The commands that write something and judge nothing: `toy` and `logits`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from bridge.cli import app
from bridge.cli_options import (
    CarryField,
    DeviceName,
    Json,
    LayersName,
    Overwrite,
    PpSize,
    Revision,
    TpSize,
    TrustRemoteCode,
    VppSize,
)
from bridge.errors import UsageError
from bridge.outputs import check_output
from bridge.storage.target import refuse_overlap

DtypeName = Annotated[
    Literal["float32", "bfloat16"], typer.Option("--dtype", help="What to compute in.")
]
Timeout = Annotated[
    float, typer.Option("--timeout", min=1, help="Seconds that one case may keep ranks busy.")
]


@app.command()
def toy(
    name: Annotated[str, typer.Argument(help="Such as super-49b-v1; `--names` lists them.")] = "",
    hf_path: Annotated[Path | None, typer.Option("--hf-path", help="Directory to create.")] = None,
    dtype: Annotated[
        Literal["float32", "bfloat16"], typer.Option("--dtype", help="Of the weights.")
    ] = "bfloat16",
    seed: Annotated[int, typer.Option("--seed", min=0, help="Which weights.")] = 0,
    names: Annotated[bool, typer.Option("--names", help="Show every toy.")] = False,
    overwrite: Overwrite = False,
    json_: Json = False,
) -> None:
    """Write a small checkpoint with the traits of one variant, to try the other commands on."""
    from bridge.console import print_json, stdout, table
    from harness.toys import CONTEXT_TOY, TOYS, toy_named, write_checkpoint

    if names:
        toys = (*TOYS.values(), CONTEXT_TOY)
        known = [{"name": one.name, "stands_for": one.stands_for} for one in toys]
        if json_:
            print_json(known)
            return
        rows = table("toy", "stands for")
        for one in known:
            rows.add_row(one["name"], one["stands_for"])
        stdout().print(rows)
        return
    if not name or hf_path is None:
        raise UsageError(
            "a toy needs a name and a directory",
            hint="nemotron-bridge toy super-49b-v1 --hf-path DIR; --names lists them",
        )
    found = toy_named(name)
    write_checkpoint(found, hf_path, dtype=dtype, seed=seed, overwrite=overwrite)
    if json_:
        print_json(
            {
                "hf_path": str(hf_path),
                "name": found.name,
                "stands_for": found.stands_for,
                "dtype": dtype,
                "seed": seed,
            }
        )
    else:
        typer.echo(f"{hf_path}: {found.stands_for}")


@app.command()
def logits(
    output: Annotated[Path, typer.Option("--output", help="safetensors file to write.")],
    input_: Annotated[
        Path | None,
        typer.Option("--input", help="safetensors: input_ids, optionally position_ids."),
    ] = None,
    probe: Annotated[
        Literal["short", "long"] | None,
        typer.Option("--probe", help="In place of --input: a probe that `verify` uses."),
    ] = None,
    hf_model: Annotated[
        str | None, typer.Option("--hf-model", help="Checkpoint directory or Hub id.")
    ] = None,
    megatron_path: Annotated[
        Path | None, typer.Option("--megatron-path", help="Megatron checkpoint to run.")
    ] = None,
    tp: TpSize = 1,
    pp: PpSize = 1,
    vp: VppSize = None,
    dtype: DtypeName = "float32",
    device: DeviceName = "cpu",
    layers: LayersName = "auto",
    trust_remote_code: TrustRemoteCode = False,
    revision: Revision = None,
    carry: CarryField = None,
    timeout: Timeout = 1800.0,
    overwrite: Overwrite = False,
    json_: Json = False,
) -> None:
    """Write the logits of one model: Hugging Face's, or Megatron's over the layout's ranks.

    With --megatron-path, --hf-model may add the configuration that the checkpoint lacks. The file
    says what it was made from, so that `verify --reference-logits` can hold a conversion to it.
    """
    from bridge.console import print_json
    from bridge.hub import resolve_here
    from harness.detached import write_reference
    from harness.logits_file import (
        ProbeName,
        Tokens,
        compute_hf,
        compute_megatron,
        read_input,
    )
    from harness.suite import layers_named

    if megatron_path is None and (tp, pp, vp) != (1, 1, None):
        raise UsageError(
            "a layout is for ranks, and the Hugging Face model runs on none",
            hint="leave --tp, --pp and --vp away, or give --megatron-path",
        )
    given: Tokens | ProbeName
    if input_ is not None and probe is None:
        given = read_input(input_)
    elif probe is not None and input_ is None:
        given = probe
    else:
        raise UsageError(
            "the model needs one input", hint="give --input FILE, or --probe short, or --probe long"
        )
    check_output(output, overwrite=overwrite)
    path = None
    if hf_model is not None:
        path = resolve_here(hf_model, weights=megatron_path is None, revision=revision)
    refuse_overlap(output, [one for one in (path, megatron_path) if one is not None])
    if megatron_path is not None:
        found = compute_megatron(
            megatron_path, given, hf_model=path, tp=tp, pp=pp, vp=vp, dtype=dtype, device=device,
            layers=layers_named(layers, device), timeout=timeout, carry=carry or (),
        )  # fmt: skip
    elif path is not None:
        found = compute_hf(
            path, given, dtype=dtype, device=device, trust_remote_code=trust_remote_code,
            carry=carry or (),
        )  # fmt: skip
    else:
        raise UsageError("no model", hint="give --hf-model or --megatron-path")
    write_reference(output, found, overwrite=overwrite)
    shape = found.logits.shape
    result = {
        "output": str(output),
        "shape": list(shape),
        "dtype": "float32",
        "made_from": found.provenance.to_metadata(),
    }
    if json_:
        print_json(result)
    else:
        typer.echo(f"{output}: logits {shape}, float32")
