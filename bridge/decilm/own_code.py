"""Saying whose code is about to run, and which of its versions, before it does."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from transformers.dynamic_module_utils import get_relative_import_files

from bridge.errors import RemoteCodeError
from bridge.hub import commit_of
from bridge.storage.input_files import read_input
from bridge.visible import visible_line

logger = logging.getLogger(__name__)

CLASSES: Final = ("AutoConfig", "AutoModelForCausalLM")
"""The entries of `auto_map` that a reference is made of."""
_CACHED: Final = "models--"  # of the Hub's cache, `models--ORG--NAME/snapshots/COMMIT`


def announce(checkpoint: Path, auto_map: Mapping[str, str]) -> str:
    """Log, as a warning, whose code runs next: its origin, commit, files and their sha256.

    Args:
        checkpoint: The directory, in the Hub's cache or any other.
        auto_map: Of its configuration.

    Returns:
        What was logged.

    Raises:
        RemoteCodeError: BR105, the configuration names code that is not in the directory. Fetching
            it would ask the network for something that nobody named.
        UnsafeFileError: BR307, its code is a link to somewhere else.
    """
    digests: dict[str, str] = {}
    for name in CLASSES:
        reference = auto_map.get(name)
        module, _, found = str(reference).rpartition(".")
        path = checkpoint / f"{module}.py"
        if "--" in module or not found or not module.isidentifier() or not path.is_file():
            raise RemoteCodeError(
                f"auto_map says that {name} is {reference!r}, which is not in the checkpoint",
                where=str(checkpoint),
                hint="read that code, put it into the directory, and name it in config.json as "
                "MODULE.CLASS",
            )
        for file in (path, *map(Path, get_relative_import_files(str(path)))):
            data = read_input(file)
            digests[file.name] = hashlib.sha256(data).hexdigest()
    files = ", ".join(f"{name} (sha256 {digests[name]})" for name in sorted(digests))
    said = f"--trust-remote-code: running the code of {_origin(checkpoint)}: {files}"
    logger.warning("%s", visible_line(said))
    return said


def _origin(checkpoint: Path) -> str:
    commit, cached = commit_of(checkpoint), checkpoint.parent.parent.name
    if commit is None or not cached.startswith(_CACHED):
        return f"the directory {checkpoint.resolve()}"
    return f"{cached.removeprefix(_CACHED).replace('--', '/')} at commit {commit}"
