"""The flags that several commands share, and what they stand for.

Flags are spelled as Megatron's, with `--tp`, `--pp` and `--vp` as short forms.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from bridge.console import RichProgress, parse_size
from bridge.errors import UsageError
from bridge.storage.input_files import follow_links_from_now_on

if TYPE_CHECKING:
    from bridge.conversion import ConversionOptions
    from bridge.transfer import TransferLimits

Model = Annotated[
    str,
    typer.Argument(
        metavar="M", help="Checkpoint directory, config.json, URL, or Hub id such as nvidia/NAME."
    ),
]
HfModel = Annotated[str, typer.Option("--hf-model", help="Checkpoint directory, URL or Hub id.")]
TpSize = Annotated[
    int, typer.Option("--tensor-model-parallel-size", "--tp", min=1, help="TP size.")
]
PpSize = Annotated[
    int, typer.Option("--pipeline-model-parallel-size", "--pp", min=1, help="PP size.")
]
VppSize = Annotated[
    int | None,
    typer.Option(
        "--virtual-pipeline-model-parallel-size", "--vp", min=1, help="Model parts per PP rank."
    ),
]
DeviceName = Annotated[Literal["cpu", "cuda"], typer.Option("--device", help="Where to compute.")]
LayersChoice = Literal["auto", "local", "te", "te-unfused", "te-fused", "te-flash"]
LayersName = Annotated[
    LayersChoice,
    typer.Option(
        "--layers",
        help="Of the live Megatron model: its own, or Transformer Engine's, perhaps with one "
        "attention backend; by default the latter where they are installed, on a GPU.",
    ),
]
VocabDivisor = Annotated[
    int,
    typer.Option(
        "--make-vocab-size-divisible-by", min=1, max=1 << 20,
        help="Pad the vocabulary to a multiple of this times TP.",
    ),
]  # fmt: skip
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of text.")]
MemoryBudget = Annotated[
    str,
    typer.Option(
        "--memory-budget",
        help="Memory for buffers that move and compare bits, such as 512MiB: of all --workers "
        "together, of each rank under torchrun.",
    ),
]
Workers = Annotated[
    int | None,
    typer.Option(
        "--workers", min=1, show_default="1",
        help="Processes that share the files; the result is the same. Not under torchrun, which "
        "starts its own.",
    ),
]  # fmt: skip
StallTimeout = Annotated[
    float,
    typer.Option(
        "--timeout", min=1,
        help="Seconds without progress after which one of several processes is taken for hung.",
    ),
]  # fmt: skip
Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Replace an existing target once the new one is done.")
]
Resume = Annotated[
    bool,
    typer.Option(
        "--resume",
        help="Go on with what a killed or failed attempt has left beside the target; from the "
        "start where there is nothing. Nothing to do where the target is complete: by its hashes, "
        "or where none were taken by a mark, if the file system keeps extended attributes.",
    ),
]
Staging = Annotated[
    Path | None,
    typer.Option(
        "--staging", show_default="TMPDIR",
        help="For a target behind a URL: where each file is built before its upload.",
    ),
]  # fmt: skip
CarryField = Annotated[
    list[str] | None,
    typer.Option("--carry-field", help="Let an unknown configuration field through. Repeatable."),
]
Verify = Annotated[
    Literal["auto", "full", "bits", "none"],
    typer.Option(
        "--verify",
        help="bits: read the target back and compare every bit. auto: then also compute with one "
        "block of each kind, the smallest first, as far as half a minute of work and about 5 GiB "
        "of memory go; what is left out is said. full: after the bits, run `verify`, placement and "
        "logits over real ranks included.",
    ),
]
TrustRemoteCode = Annotated[
    bool,
    typer.Option(
        "--trust-remote-code", help="Run the checkpoint's own code as the reference of a proof."
    ),
]
DtypeChoice = Annotated[
    Literal["bfloat16", "float16", "float32"] | None,
    typer.Option(
        "--dtype", show_default="as stored",
        help="Round every weight to this dtype: nearest, ties to even.",
    ),
]  # fmt: skip
AllowOverflow = Annotated[
    bool,
    typer.Option(
        "--allow-overflow", help="Let values too large for --dtype become infinite, not an error."
    ),
]
FollowLinks = Annotated[
    bool,
    typer.Option(
        "--follow-links",
        help="Read files that are links to somewhere outside the checkpoint, such as another disk.",
    ),
]
Revision = Annotated[
    str | None, typer.Option("--revision", help="Branch, tag or commit, for a Hub id.")
]


def transfer_limits(memory_budget: str, workers: int | None = None) -> TransferLimits:
    """What each of `workers` processes may use of `--memory-budget` and of this machine's cores.

    Raises:
        UsageError: BR001, a budget that cannot be kept.
    """
    from bridge.crew.launch import processes_here
    from bridge.transfer import TransferLimits

    threads = max(1, (os.cpu_count() or 1) // processes_here(workers))
    limits = TransferLimits(memory_budget=parse_size(memory_budget) // (workers or 1))
    limits = replace(limits, threads=min(limits.threads, threads))
    if limits.buffers_nbytes > limits.memory_budget:
        each = f" by each of {workers} workers" if workers and workers > 1 else ""
        raise UsageError(
            f"a memory budget of {memory_budget} cannot be kept",
            hint=f"{limits.threads} threads need {limits.buffers_nbytes} bytes or more{each}",
        )
    return limits


def shard_size(text: str | None) -> int | None:
    """Bytes of `--max-shard-size`; `single` has no limit.

    Raises:
        UsageError: BR001, no such size.
    """
    if text is None:
        return None
    return sys.maxsize if text.strip().lower() == "single" else parse_size(text)


def conversion_options(
    verify: str,
    memory_budget: str,
    workers: int | None,
    *,
    overwrite: bool,
    resume: bool,
    carry: Collection[str] | None,
    staging: Path | None,
    hf_model_id: str | None = None,
    dtype: Literal["bfloat16", "float16", "float32"] | None = None,
    allow_overflow: bool = False,
    follow_links: bool = False,
) -> ConversionOptions:
    """What `import` and `export` do alike.

    Raises:
        UsageError: BR001, a budget that cannot be kept, or overflow allowed where nothing is
            rounded.
    """
    from bridge.conversion import ConversionOptions

    if follow_links:
        follow_links_from_now_on()
    if allow_overflow and dtype is None:
        raise UsageError(
            "--allow-overflow without --dtype: nothing is rounded, so nothing can overflow",
            hint="give the dtype to round to with --dtype, or leave --allow-overflow out",
        )
    return ConversionOptions(
        limits=transfer_limits(memory_budget, workers),
        verify="none" if verify == "none" else "auto",
        overwrite=overwrite,
        resume=resume,
        carry=carry or (),
        progress=RichProgress(),
        staging=staging,
        hf_model_id=hf_model_id,
        dtype=dtype,
        exact=verify == "full",
        allow_overflow=allow_overflow,
        follow_links=follow_links,
    )
