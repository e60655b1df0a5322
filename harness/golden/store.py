"""The records on disk: `cases/NAME.json`, and the `index.json` that answers for them.

The index says of every file what its bytes must be, which recording made it, why, and with what.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from bridge.strict_json import parse_json
from harness.errors import GoldenFormatError

VERSION: Final = 1
"""Of the format. A record of another version is refused, never half understood."""
INDEX: Final = "index.json"
PLANS: Final = "plans"
_HEADER: Final = frozenset({"version", "name", "model", "dtype", "seed", "traits"})
_WIDTH: Final = 110


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """What is on record of one model: `fields` by name, `header` what identifies it."""

    header: Mapping[str, Any]
    fields: Mapping[str, Any]


@dataclass(slots=True, kw_only=True)
class Index:
    """What answers for the files.

    Args:
        recordings: Every one there ever was: date, reason and versions; never shortened.
        entries: By name: `file`, `sha256`, and in `recording` the number of the one that made it.
    """

    recordings: list[dict[str, Any]] = field(default_factory=list)
    entries: dict[str, dict[str, Any]] = field(default_factory=dict)


def file_of(name: str) -> str:
    """Where an entry is kept, relative to the folder of goldens."""
    return "plans.json" if name == PLANS else f"cases/{name}.json"


def load_index(root: Path) -> Index:
    """Read the index; an empty one where there is none yet.

    Raises:
        GoldenFormatError: HN302, not an index, or one of another version.
    """
    path = root / INDEX
    if not path.is_file():
        return Index()
    document = _versioned(path)
    recordings, entries = document.get("recordings"), document.get("entries")
    if (
        not isinstance(recordings, list)
        or not isinstance(entries, dict)
        or not all(isinstance(entry, dict) for entry in entries.values())
    ):
        raise GoldenFormatError("not an index of goldens", where=str(path), hint=_HINT)
    return Index(recordings=recordings, entries=entries)


def load_record(root: Path, name: str) -> Record | None:
    """Read what is on record under a name; None where nothing is.

    Raises:
        GoldenFormatError: HN302, of another version, no record at all, or not the bytes that were
            recorded.
    """
    path = root / file_of(name)
    if not path.is_file():
        return None
    document = _versioned(path)
    entry = load_index(root).entries.get(name, {})
    if entry.get("sha256") != sha256_of(path):
        raise GoldenFormatError(
            f"the golden {name} is not what was recorded",
            where=f"{path}: sha256 is not that of {INDEX}",
            hint="goldens are not edited; restore the file, or record it anew with a reason",
        )
    return Record(
        header={key: value for key, value in document.items() if key in _HEADER},
        fields={key: value for key, value in document.items() if key not in _HEADER},
    )


def sha256_of(path: Path) -> str:
    """Of a file's bytes."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def record_text(header: Mapping[str, Any], fields: Mapping[str, Any]) -> str:
    """A record as a file; stable, and a line for each thing that can change."""
    return _pretty({"version": VERSION, **header, **fields}) + "\n"


def index_text(index: Index) -> str:
    """The index as a file."""
    entries = dict(sorted(index.entries.items()))
    document = {"version": VERSION, "entries": entries, "recordings": index.recordings}
    return _pretty(document) + "\n"


_HINT: Final = 'nemotron-bridge golden record --reason "..." writes it anew; look at the difference'


def _versioned(path: Path) -> dict[str, Any]:
    try:
        document = parse_json(path.read_bytes())
    except (OSError, ValueError) as error:
        raise GoldenFormatError(f"not a golden: {error}", where=str(path), hint=_HINT) from None
    version = document.get("version") if isinstance(document, dict) else None
    if version != VERSION:
        raise GoldenFormatError(
            f"a golden of format {version!r}, this release reads format {VERSION}",
            where=str(path),
            hint=_HINT,
        )
    found: dict[str, Any] = document
    return found


def _pretty(value: Any, indent: str = "") -> str:  # noqa: ANN401 - JSON
    """JSON in which what fits on a line is on one: diffs of records are read by people."""
    line = json.dumps(value, ensure_ascii=False, allow_nan=False)
    if not isinstance(value, dict | list) or not value or len(indent) + len(line) <= _WIDTH:
        return line
    inner = indent + " "
    if isinstance(value, dict):
        parts = [f"{json.dumps(key)}: {_pretty(one, inner)}" for key, one in value.items()]
        opening, closing = "{", "}"
    else:
        parts = [_pretty(one, inner) for one in value]
        if all(isinstance(one, int | float) for one in value):
            return line  # one row of numbers
        opening, closing = "[", "]"
    body = ",\n".join(inner + part for part in parts)
    return f"{opening}\n{body}\n{indent}{closing}"
