"""Evidence for the record: what a repository keeps of a run for good.

    python -m harness.report.keep REPORT DIRECTORY [--no-details]

`evidence.json`, one case a line, and `report.md`. Where the run worked and reported is left out of
the command; with `--no-details`, what was measured of cases that passed beyond value and limit.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bridge.outputs import write_atomically
from harness.report.evidence import FILE_NAME, read_evidence, validate
from harness.report.markdown import markdown


def kept(data: Mapping[str, Any], *, details: bool = True) -> dict[str, Any]:
    """The evidence as it is kept; valid by the same schema.

    Args:
        data: Of a run.
        details: Keep those of cases that passed, too.
    """
    command = list(data["command"])
    for flag in ("--report", "--workdir"):
        while flag in command:
            place = command.index(flag)
            del command[place : place + 2]
        command = [word for word in command if not word.startswith(f"{flag}=")]
    cases = [dict(case) for case in data["cases"]]
    for case in cases:
        if case["status"] == "passed" and not details and "details" in case:
            case["details"] = {}
    found = {**data, "command": command, "cases": cases}
    validate(found)
    return found


def lines(data: Mapping[str, Any]) -> str:
    """Evidence as JSON with a case a line, so that two runs can be told apart by any diff."""
    head = {name: value for name, value in data.items() if name != "cases"}
    cases = ",\n".join(json.dumps(case, separators=(",", ":")) for case in data["cases"])
    return f'{json.dumps(head, indent=1)[:-2]},\n "cases": [\n{cases}\n]}}\n'


def main(arguments: Sequence[str] | None = None) -> None:
    """Keep one run's evidence."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("report", type=Path, help="what --report named")
    parser.add_argument("directory", type=Path, help="where it is kept")
    parser.add_argument("--no-details", action="store_true")
    options = parser.parse_args(arguments)
    data = kept(read_evidence(options.report), details=not options.no_details)
    options.directory.mkdir(parents=True, exist_ok=True)
    write_atomically(options.directory / FILE_NAME, lines(data))
    write_atomically(options.directory / "report.md", markdown(data))


if __name__ == "__main__":
    main()
