"""The flags that several commands share, and what they stand for.

Flags are spelled as Megatron's, with `--tp`, `--pp` and `--vp` as short forms.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from bridge.console import RichProgress, parse_size
from bridge.errors import UsageError

if TYPE_CHECKING:
    from bridge.conversion import ConversionOptions
    from bridge.transfer import TransferLimits

Model = Annotated[
    str,
    typer.Argument(
        metavar="M", help="Checkpoint directory, config.json, or Hub id such as nvidia/NAME."
    ),
]
HfModel = Annotated[str, typer.Option("--hf-model", help="Checkpoint directory or Hub id.")]
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
VocabDivisor = Annotated[
    int,
    typer.Option(
        "--make-vocab-size-divisible-by", min=1,
        help="Pad the vocabulary to a multiple of this times TP.",
    ),
]  # fmt: skip
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of text.")]
MemoryBudget = Annotated[
    str, typer.Option("--memory-budget", help="Memory for buffers, such as 512MiB.")
]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Replace an existing target once the new one is done.")
]
CarryField = Annotated[
    list[str] | None,
    typer.Option("--carry-field", help="Let an unknown configuration field through. Repeatable."),
]
Verify = Annotated[
    Literal["auto", "full", "none"],
    typer.Option(
        "--verify",
        help="auto: read the target back and compare every bit. full: then also run `verify` on "
        "it, placement and logits over real ranks included.",
    ),
]
TrustRemoteCode = Annotated[
    bool,
    typer.Option(
        "--trust-remote-code", help="Run the checkpoint's own code as the reference of a proof."
    ),
]
Revision = Annotated[
    str | None, typer.Option("--revision", help="Branch, tag or commit, for a Hub id.")
]


def transfer_limits(memory_budget: str) -> TransferLimits:
    """Read `--memory-budget`; refuse one that cannot be kept, with UsageError BR001."""
    from bridge.transfer import TransferLimits

    limits = TransferLimits(memory_budget=parse_size(memory_budget))
    if limits.buffers_nbytes > limits.memory_budget:
        raise UsageError(
            f"a memory budget of {memory_budget} cannot be kept",
            hint=f"{limits.threads} threads need {limits.buffers_nbytes} bytes or more",
        )
    return limits


def conversion_options(
    verify: str, memory_budget: str, *, overwrite: bool, carry: Collection[str] | None
) -> ConversionOptions:
    """What `import` and `export` do alike."""
    from bridge.conversion import ConversionOptions

    return ConversionOptions(
        limits=transfer_limits(memory_budget),
        verify="none" if verify == "none" else "auto",
        overwrite=overwrite,
        carry=carry or (),
        progress=RichProgress(),
    )
