"""The bundle of a qualification: what a release manager files, and what `--check` reads again.

evidence.json  junit.xml  report.md  report.html    as of any run, the faults included
faults.json    the kill matrix of the twin
config.json    what was qualified, byte for byte
twin.json      the configuration of its twin
card.yaml      the verification card
SHA256SUMS     of every file in the directory, journals and rank logs included; written last
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from bridge.errors import UsageError
from bridge.outputs import write_atomically
from harness.qualify.origin import Origin
from harness.qualify.scope import Scope
from harness.qualify.verdict import fault_counts, overall
from harness.report import card
from harness.report.digests import sha256_of
from harness.report.evidence import FILE_NAME, read_evidence, strict, to_json, validate
from harness.report.html import html
from harness.report.junit import junit
from harness.report.markdown import markdown
from harness.report.write import MATRIX_NAME

SUMS_NAME: Final = "SHA256SUMS"
CONFIG_NAME: Final = "config.json"
TWIN_NAME: Final = "twin.json"

Data = Mapping[str, Any]


def refuse_finished(directory: Path) -> None:
    """Refuse to write over a bundle.

    Raises:
        UsageError: BR001, there is one.
    """
    if (directory / SUMS_NAME).exists():
        raise UsageError(
            "a finished bundle is there already",
            where=str(directory),
            hint="give --report another directory; `qualify --check` looks at what is there",
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
    (directory / CONFIG_NAME).write_bytes(config)
    for name, text in texts(data, scope.twin_config, matrix).items():
        write_atomically(directory / name, text)
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
                "architecture": _architecture(scope),
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


def _architecture(scope: Scope) -> str:
    return str(scope.twin_config["architectures"][0])
