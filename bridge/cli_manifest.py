"""`verify --manifest`: whether a checkpoint's files are what a conversion has written.

Importing this module imports no torch.
"""

from __future__ import annotations

from typing import Annotated

import typer

from bridge.console import RichProgress, print_json
from bridge.errors import UsageError, VerificationError
from bridge.storage.remote import parse_location

Manifest = Annotated[
    str | None,
    typer.Option(
        "--manifest",
        metavar="DIRECTORY",
        help="Nothing but this: hold every byte of a directory, or URL, that import or export has "
        "written against the hashes in it, and name each tensor that has changed.",
    ),
]


def check(directory: str, *, alone: bool, json_: bool) -> None:
    """Run `verify --manifest`.

    Args:
        directory: What to check.
        alone: Whether nothing else was asked for.
        json_: Print one JSON document.

    Raises:
        UsageError: BR001, something else was asked for as well.
        VerificationError: BR305, naming files and tensors that are not what they were.
    """
    from bridge.manifest_check import check_manifest

    if not alone:
        raise UsageError(
            "--manifest is a check by itself: it needs no model and no other side",
            hint="give --manifest DIRECTORY alone; the other checks in a run of their own",
        )
    report = check_manifest(parse_location(directory), progress=RichProgress())
    if json_:
        print_json(report.to_dict())
    if report.differences:
        raise VerificationError(
            f"files or tensors that are not what was written: {len(report.differences)}",
            where=[f"{directory}: {text}" for text in report.differences],
            hint="restore the files, or convert again; nothing was changed",
        )
    if json_:
        return
    typer.echo(
        f"{directory}: {report.num_files} files, {report.num_tensors} tensors, "
        f"{report.nbytes / 1e9:.3f} GB, every byte as nemotron-bridge {report.bridge_version} "
        "wrote it"
    )
    for name in report.not_listed:
        typer.echo(f"  not in the manifest: {name}")
