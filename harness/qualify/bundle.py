"""The bundle of a qualification: what a release manager files, and what `--check` reads again.

evidence.json  junit.xml  report.md  report.html    as of any run, the faults included
faults.json    the kill matrix of the twin
config.json    what was qualified, byte for byte
twin.json      the configuration of its twin
card.yaml      the verification card
SHA256SUMS     of every file in the directory, journals and rank logs included; written last
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from bridge.errors import UsageError
from bridge.outputs import write_atomically
from harness.errors import ResumeError
from harness.qualify.origin import Origin
from harness.qualify.scope import Scope
from harness.qualify.verdict import fault_counts, overall
from harness.report import card
from harness.report.digests import sha256_of
from harness.report.evidence import FILE_NAME, read_evidence, strict, to_json, validate
from harness.report.files import RANK_LOGS, writing_into
from harness.report.html import html
from harness.report.journal import FILE_NAME as JOURNAL_NAME
from harness.report.junit import junit
from harness.report.markdown import markdown
from harness.report.write import MATRIX_NAME

SUMS_NAME: Final = "SHA256SUMS"
CONFIG_NAME: Final = "config.json"
TWIN_NAME: Final = "twin.json"

Data = Mapping[str, Any]


def refuse_foreign(directory: Path, *, resume: bool) -> None:
    """Refuse a directory that is not this command's to fill, before anything is made there.

    A bundle has a config.json and sums up every file beside it: in a directory of something else
    it would write over the one and vouch for the other.

    Args:
        directory: Of the report.
        resume: A run is to be gone on with.

    Raises:
        UsageError: BR001, a bundle is there, a run to go on with, or files of something else.
        ResumeError: HN102, there is no run to go on with.
    """
    if (directory / SUMS_NAME).exists():
        raise UsageError(
            "a finished bundle is there already",
            where=str(directory),
            hint="give --report another directory; `qualify --check` looks at what is there",
        )
    if (directory / JOURNAL_NAME).is_file():
        if not resume:
            raise UsageError(
                "an unfinished run is there, which would be started over",
                where=str(directory / JOURNAL_NAME),
                hint="go on with it by --resume, or give --report another directory",
            )
        return
    if _holds_something(directory):
        raise UsageError(
            "the directory holds something else, which a bundle would write over and sum up",
            where=str(directory),
            hint="give --report a directory that is empty, or that is not there yet",
        )
    if resume:
        raise ResumeError(
            "there is no run to resume",
            where=str(directory / JOURNAL_NAME),
            hint="leave --resume away, or give the --report directory of the earlier run",
        )


def _holds_something(directory: Path) -> bool:
    """Whether anything is there but what a run leaves that was killed before it had a journal."""
    if not os.path.lexists(directory):
        return False
    with writing_into(directory):
        return any(
            not (path.name == RANK_LOGS and path.is_dir() and not any(path.iterdir()))
            for path in directory.iterdir()
        )


def refuse_other_config(directory: Path, config: bytes) -> None:
    """Refuse a directory whose config.json is not the one that a bundle would put there.

    Args:
        directory: Of the report.
        config: What is qualified.

    Raises:
        UsageError: BR001, there is another.
    """
    path = directory / CONFIG_NAME
    if path.exists() and path.read_bytes() != config:
        raise UsageError(
            "another configuration is there, which a bundle would write over",
            where=str(path),
            hint="give --report another directory",
        )


def write_bundle(
    directory: Path, scope: Scope, origin: Origin, matrix: Data, *, config: bytes
) -> dict[str, Any]:
    """Complete the reports that a run has left there; the evidence as it now is.

    Args:
        directory: With the evidence of the cases.
        scope: What was run.
        origin: Whose weights, by which code.
        matrix: The kill matrix.
        config: The configuration, as it lay there.
    """
    data = qualified(read_evidence(directory), scope, origin, matrix)
    write_atomically(directory / CONFIG_NAME, config)
    for name, text in texts(data, scope.twin_config, matrix).items():
        write_atomically(directory / name, text)
    with contextlib.suppress(OSError):  # sums are of files: no sum would be of an empty folder
        (directory / RANK_LOGS).rmdir()
    write_atomically(directory / SUMS_NAME, sums(directory))
    return data


def qualified(cases: Data, scope: Scope, origin: Origin, matrix: Data) -> dict[str, Any]:
    """Evidence of the cases with all that makes it a qualification's.

    Args:
        cases: Evidence of the cases.
        scope: What was run.
        origin: Whose weights, by which code.
        matrix: The kill matrix.
    """
    data: dict[str, Any] = strict(
        {
            **cases,
            "qualification": {
                "architecture": architecture_name(scope),
                "scope": scope.as_data(),
                "origin": origin.as_data(),
                "faults": fault_counts(matrix),
            },
        }
    )
    data["verdict"] = overall(data, matrix)[0]
    validate(data)
    return data


def texts(data: Data, twin_config: Data, matrix: Data) -> dict[str, str]:
    """Every file that follows from the evidence, the twin and the matrix, by name."""
    return {
        FILE_NAME: to_json(data),
        MATRIX_NAME: json.dumps(matrix, indent=1) + "\n",
        TWIN_NAME: json.dumps(twin_config, indent=2) + "\n",
        "junit.xml": junit(data),
        "report.md": markdown(data, kill_matrix=matrix),
        "report.html": html(data, kill_matrix=matrix),
        card.FILE_NAME: card.to_yaml(card.card(data)),
    }


def files_of(directory: Path) -> list[str]:
    """Every file of a bundle but its sums, by its path below the directory."""
    return sorted(
        path.relative_to(directory).as_posix()
        for path in directory.rglob("*")
        if path.is_file() and path != directory / SUMS_NAME
    )


def sums(directory: Path) -> str:
    """As `sha256sum` writes them, so that `sha256sum --check` reads them."""
    return "".join(f"{sha256_of(directory / name)}  {name}\n" for name in files_of(directory))


def architecture_name(scope: Scope) -> str:
    """What the configuration calls its model, which the twin has kept."""
    return str(scope.twin_config["architectures"][0])
