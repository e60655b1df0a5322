"""Evidence for the record: what a repository keeps of a run for good.

    python -m harness.report.keep REPORT DIRECTORY [--no-details]

`evidence.json`, one case a line, and `report.md`. Where the run worked and reported is left out of
the command, and so are the beginnings of other absolute paths; with `--no-details`, what was
measured of cases that passed beyond value and limit. Of `faults` it is `faults.jsonl`, a unit a
line, and `report.md`, judged anew.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bridge.outputs import write_atomically
from harness.faults.journal import FILE_NAME as UNITS
from harness.faults.journal import read_matrix
from harness.report.evidence import FILE_NAME, read_evidence, validate
from harness.report.files import report_directory
from harness.report.markdown import markdown, matrix_markdown


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
    command = [_shortened(word) for word in command]
    cases = [dict(case) for case in data["cases"]]
    for case in cases:
        if case["status"] == "passed" and not details and "details" in case:
            case["details"] = {}
    found = {**data, "command": command, "cases": cases}
    validate(found)
    return found


def _shortened(word: str) -> str:
    """Of an absolute path its end: where it lay says nothing to others."""
    flag, equals, value = word.rpartition("=")
    path = Path(value)
    return flag + equals + "/".join(path.parts[-2:]) if path.is_absolute() else word


def lines(data: Mapping[str, Any]) -> str:
    """Evidence as JSON with a case a line, so that two runs can be told apart by any diff."""
    head = {name: value for name, value in data.items() if name != "cases"}
    cases = ",\n".join(json.dumps(case, separators=(",", ":")) for case in data["cases"])
    return f'{json.dumps(head, indent=1)[:-2]},\n "cases": [\n{cases}\n]}}\n'


def units_kept(path: Path) -> str:
    """A journal of `faults`; of what killed a fault first, which case it was."""
    header, *units = (json.loads(line) for line in path.read_text("utf-8").splitlines())
    units = [{**one, "first": one["first"].partition(": ")[0]} for one in units]
    return "".join(json.dumps(one) + "\n" for one in (header, *units))


def main(arguments: Sequence[str] | None = None) -> None:
    """Keep one run's evidence."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("report", type=Path, help="what --report named")
    parser.add_argument("directory", type=Path, help="where it is kept")
    parser.add_argument("--no-details", action="store_true")
    options = parser.parse_args(arguments)
    units = options.report / UNITS
    if units.is_file():
        name, text = UNITS, units_kept(units)
        report = matrix_markdown(read_matrix(units).to_dict())
    else:
        data = kept(read_evidence(options.report), details=not options.no_details)
        name, text, report = FILE_NAME, lines(data), markdown(data)
    report_directory(options.directory)
    write_atomically(options.directory / name, text)
    write_atomically(options.directory / "report.md", report)


if __name__ == "__main__":
    main()
