"""The conversion commands of `nemotron-bridge`; `harness.cli` adds the verifying ones.

Importing this module imports no torch: `--help` is instant.
"""

from __future__ import annotations

import time
from typing import Annotated

import typer

from bridge import __version__
from bridge.cli_options import (
    AllowOverflow,
    CarryField,
    DtypeChoice,
    FollowLinks,
    HfModel,
    Json,
    MemoryBudget,
    Overwrite,
    PpSize,
    Resume,
    Revision,
    Staging,
    StallTimeout,
    TpSize,
    TrustRemoteCode,
    Verify,
    VocabDivisor,
    Workers,
    conversion_options,
    shard_size,
    transfer_limits,
)
from bridge.cli_verification import finish
from bridge.console import RichProgress, parse_size, print_json
from bridge.crew.bounds import HUNG
from bridge.storage.remote import parse_location

app = typer.Typer(
    name="nemotron-bridge",
    help="Move Llama-Nemotron models between Hugging Face and Megatron-Core, and prove it right.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"nemotron-bridge {__version__}")
        raise typer.Exit


@app.callback()
def common(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Move Llama-Nemotron models between Hugging Face and Megatron-Core, and prove it right."""
    del version


@app.command("import")
def import_(
    hf_model: HfModel,
    megatron_path: Annotated[
        str, typer.Option("--megatron-path", help="Directory or URL to create.")
    ],
    tp: TpSize = 1,
    pp: PpSize = 1,
    divisor: VocabDivisor = 128,
    dtype: DtypeChoice = None,
    allow_overflow: AllowOverflow = False,
    verify: Verify = "auto",
    trust_remote_code: TrustRemoteCode = False,
    memory_budget: MemoryBudget = "1GiB",
    workers: Workers = None,
    timeout: StallTimeout = HUNG,
    overwrite: Overwrite = False,
    resume: Resume = False,
    staging: Staging = None,
    revision: Revision = None,
    follow_links: FollowLinks = False,
    carry: CarryField = None,
    json_: Json = False,
) -> None:
    """Convert Hugging Face to Megatron torch_dist, read it back bit by bit, and compute with it.

    The result loads at any TP and PP; the sizes given here only cut its files for those ranks.
    """
    from bridge.convert import import_checkpoint
    from bridge.crew.launch import crew_of
    from bridge.hub import is_hub_id, resolve_model

    with crew_of(workers, (hf_model, megatron_path), timeout=timeout) as crew:
        megatron = parse_location(megatron_path)
        hf = resolve_model(hf_model, weights=True, revision=revision)
        report = crew.run(
            import_checkpoint,
            hf,
            megatron,
            tensor_model_parallel_size=tp,
            pipeline_model_parallel_size=pp,
            make_vocab_size_divisible_by=divisor,
            options=conversion_options(
                verify,
                memory_budget,
                workers,
                overwrite=overwrite,
                resume=resume,
                carry=carry,
                staging=staging,
                hf_model_id=hf_model if is_hub_id(hf_model) else None,
                dtype=dtype,
                allow_overflow=allow_overflow,
                follow_links=follow_links,
            ),
        )
    if crew.rank:
        return
    finish(
        report, verify, hf, megatron, trust_remote_code=trust_remote_code, carry=carry, json_=json_
    )


@app.command("export")
def export(
    megatron_path: Annotated[
        str,
        typer.Option("--megatron-path", help="Checkpoint root or iteration directory, or URL."),
    ],
    hf_path: Annotated[str, typer.Option("--hf-path", help="Directory or URL to create.")],
    hf_model: Annotated[
        str | None,
        typer.Option(
            "--hf-model", help="Whose config.json and tokenizer to take; not its weights."
        ),
    ] = None,
    max_shard_size: Annotated[
        str | None,
        typer.Option(
            "--max-shard-size",
            show_default="the source's files, or 5GB",
            help="Size of a weight file, such as 5GB, or `single` for one file.",
        ),
    ] = None,
    dtype: DtypeChoice = None,
    allow_overflow: AllowOverflow = False,
    verify: Verify = "auto",
    trust_remote_code: TrustRemoteCode = False,
    memory_budget: MemoryBudget = "1GiB",
    workers: Workers = None,
    timeout: StallTimeout = HUNG,
    overwrite: Overwrite = False,
    resume: Resume = False,
    staging: Staging = None,
    revision: Revision = None,
    follow_links: FollowLinks = False,
    carry: CarryField = None,
    json_: Json = False,
) -> None:
    """Convert Megatron torch_dist to Hugging Face, read it back bit by bit, and compute with it.

    A checkpoint that `import` made gives back the source directory, each file byte for byte.
    """
    from bridge.convert import export_checkpoint
    from bridge.crew.launch import crew_of
    from bridge.hub import resolve_model

    with crew_of(workers, (megatron_path, hf_path, hf_model), timeout=timeout) as crew:
        megatron, hf = parse_location(megatron_path), parse_location(hf_path)
        resolved = None
        if hf_model is not None:
            resolved = resolve_model(hf_model, weights=False, revision=revision)
        report = crew.run(
            export_checkpoint,
            megatron,
            hf,
            hf_model=resolved,
            max_shard_size=shard_size(max_shard_size),
            options=conversion_options(
                verify,
                memory_budget,
                workers,
                overwrite=overwrite,
                resume=resume,
                carry=carry,
                staging=staging,
                dtype=dtype,
                allow_overflow=allow_overflow,
                follow_links=follow_links,
            ),
        )
    if crew.rank:
        return
    finish(
        report, verify, hf, megatron, trust_remote_code=trust_remote_code, carry=carry, json_=json_
    )


@app.command()
def synthesize(
    config: Annotated[
        str, typer.Option("--config", help="config.json, or its directory, or a URL of either.")
    ],
    hf_path: Annotated[str, typer.Option("--hf-path", help="Directory or URL to create.")],
    seed: Annotated[int, typer.Option("--seed", min=0, help="Which weights.")] = 0,
    max_shard_size: Annotated[str, typer.Option("--max-shard-size", help="Per file.")] = "5GB",
    memory_budget: MemoryBudget = "1GiB",
    workers: Workers = None,
    timeout: StallTimeout = HUNG,
    overwrite: Overwrite = False,
    resume: Resume = False,
    staging: Staging = None,
    json_: Json = False,
) -> None:
    """Write a checkpoint of any configuration with pseudo-random weights, for trials and tests."""
    from bridge.crew.launch import crew_of
    from bridge.storage.synthetic import synthesize as write

    started = time.perf_counter()
    with crew_of(workers, (config, hf_path), timeout=timeout) as crew:
        made = crew.run(
            write,
            parse_location(config),
            parse_location(hf_path),
            seed=seed,
            max_shard_size=parse_size(max_shard_size),
            limits=transfer_limits(memory_budget, workers),
            progress=RichProgress(),
            overwrite=overwrite,
            resume=resume,
            staging=staging,
        )
    if crew.rank:
        return
    seconds = time.perf_counter() - started
    if json_:
        found = {"target": str(hf_path), "seed": seed, "seconds": seconds, **made._asdict()}
        print_json(found)
    elif made.nothing_to_do:
        typer.echo(f"{hf_path}: nothing to do: it was complete, and nobody has changed it since")
    else:
        typer.echo(f"{hf_path}: {made.nbytes / 1e9:.3f} GB of synthetic weights in {seconds:.1f} s")
