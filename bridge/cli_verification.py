"""What `--verify` adds to a conversion whose bits have been compared; `harness.cli` provides it.

Importing this module imports no torch.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import typer

from bridge.console import gib
from bridge.errors import EnvironmentMissingError
from bridge.render import print_report
from bridge.storage.remote import Location

if TYPE_CHECKING:
    from bridge.conversion import ConversionReport


class FullVerification(Protocol):
    """What `--verify full` does after a conversion."""

    def __call__(
        self,
        hf: Path,
        megatron: Path,
        *,
        trust_remote_code: bool,
        carry: Collection[str],
        quiet: bool,
    ) -> None:
        """Prove the pair; with `quiet`, stdout is left to the command's own JSON."""
        ...


class BlockVerification(Protocol):
    """What `--verify auto` does after a conversion whose bits have been compared."""

    def __call__(
        self, hf: Location, megatron: Location, *, carry: Collection[str], num_rounded: int
    ) -> Outcome:
        """Compute with one block of each kind of the pair, unless its two sides differ in value."""
        ...


class Outcome(Protocol):
    """What became of it."""

    @property
    def status(self) -> Literal["passed", "failed", "not run", "error"]:
        """The verdict."""
        ...

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        ...

    def lines(self) -> list[str]:
        """For people."""
        ...


full_verification: FullVerification | None = None
"""Set by `harness.cli`. It raises `typer.Exit` with the harness's exit code when a check fails.
"""
block_verification: BlockVerification | None = None
"""Set by `harness.cli`; without it, bits are all that is compared."""


def finish(
    report: ConversionReport,
    verify: str,
    hf: Location,
    megatron: Location,
    *,
    trust_remote_code: bool,
    carry: Collection[str] | None,
    json_: bool,
) -> None:
    """Print what was done, and do what `--verify` adds to the comparison of bits.

    Raises:
        Exit: With the command's exit code, where that finds a difference, or crashes.
        EnvironmentMissingError: BR500, `--verify full` without the harness.
    """
    from bridge.conversion_job import peak_rss

    document = report.to_dict()
    if not json_:
        print_report(document, json_=False)
    found = None
    if verify == "auto" and block_verification is not None:
        rounded = (report.rounding or {}).get("changed", 0)
        found = block_verification(hf, megatron, carry=carry or (), num_rounded=rounded)
        document["block_parity"] = found.to_dict()
        # The conversion's workers have ended before it: no sum, but whichever was more.
        document["peak_rss"] = max(report.peak_rss, peak_rss())
    if json_:
        print_report(document, json_=True)
    elif found is not None:
        for line in found.lines():
            typer.echo(line)
        if found.status != "not run":
            typer.echo(f"peak memory with block parity {gib(document['peak_rss'])}")
    if found is not None and found.status in {"failed", "error"}:
        raise typer.Exit(1 if found.status == "failed" else 3)
    _verify_fully(
        verify, hf, megatron, trust_remote_code=trust_remote_code, carry=carry, json_=json_
    )


def _verify_fully(
    verify: str,
    hf: Location,
    megatron: Location,
    *,
    trust_remote_code: bool,
    carry: Collection[str] | None,
    json_: bool,
) -> None:
    if verify != "full":
        return
    if full_verification is None:
        raise EnvironmentMissingError(
            "--verify full needs the harness", hint="run the nemotron-bridge command"
        )
    from bridge.hub import OTHER_WEIGHTS, local_copy

    # The ranks and the reference model read files of this machine only.
    with local_copy(hf, without=OTHER_WEIGHTS) as ours, local_copy(megatron) as theirs:
        full_verification(
            ours, theirs, trust_remote_code=trust_remote_code, carry=carry or (), quiet=json_
        )
