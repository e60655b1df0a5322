"""Whose weights are qualified, and by which commit of this code: what a card must pin down."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from bridge.errors import UsageError

_HUB_ID: Final = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
_IMAGE: Final = re.compile(r"[A-Za-z0-9][\w.-]*([/:][\w.-]+)*(@sha256:[0-9a-f]{64})?", re.ASCII)
_COMMIT: Final = re.compile(r"[0-9a-f]{40}")
_PACKAGE: Final = Path(__file__).parents[1]


@dataclass(frozen=True, slots=True, kw_only=True)
class Origin:
    """Where things come from; None where nobody has said.

    Args:
        hf_id: Of the model on the Hub, `org/name`.
        hf_revision: Its commit there, 40 hexadecimal digits.
        bridge_commit: Of this code, where it runs from a checkout without changes of its own.
        base_container: Image that it ran in, in the words of whoever ran it.
    """

    hf_id: str | None = None
    hf_revision: str | None = None
    bridge_commit: str | None = None
    base_container: str | None = None

    def as_data(self) -> dict[str, str | None]:
        """Plain data for the evidence."""
        return asdict(self)


def origin_of(
    model: str | None,
    path: Path,
    *,
    hf_id: str | None,
    hf_revision: str | None,
    base_container: str | None,
) -> Origin:
    """Take from the Hub id and its snapshot what the user has not given.

    Args:
        model: As the user named it; None for a configuration alone.
        path: Where it is.
        hf_id: By the user's word.
        hf_revision: By the user's word.
        base_container: By the user's word.

    Raises:
        UsageError: BR001, an id, a revision or an image that is none.
    """
    given = {"hf_id": hf_id, "hf_revision": hf_revision, "base_container": base_container}
    wrong = [
        f"--{name.replace('_', '-')} {given[name]}: {expected} is expected"
        for name, expected in origin_problems(given).items()
    ]
    if wrong:
        raise UsageError(
            "what the card is to say of the model is not pinned down",
            where=wrong,
            hint="the Hub shows the commit under `Files and versions`; a branch or tag can move",
        )
    on_hub = model is not None and not Path(model).exists() and _HUB_ID.fullmatch(model)
    if on_hub and hf_id is None:
        hf_id = model
    if on_hub and hf_revision is None and _COMMIT.fullmatch(path.name):
        hf_revision = path.name  # the Hub's cache names a snapshot by its commit
    return Origin(
        hf_id=hf_id,
        hf_revision=hf_revision,
        bridge_commit=bridge_commit(),
        base_container=base_container,
    )


def origin_problems(said: Mapping[str, Any]) -> dict[str, str]:
    """What an origin should have where it has something else, by its field.

    Args:
        said: An origin, or part of one, as plain data.
    """
    kinds = {
        "hf_id": (_HUB_ID, "org/name"),
        "hf_revision": (_COMMIT, "a commit of 40 hexadecimal digits"),
        "bridge_commit": (_COMMIT, "a commit of 40 hexadecimal digits"),
        "base_container": (_IMAGE, "an image's name and tag, as `docker pull` takes them,"),
    }
    return {
        name: expected
        for name, (pattern, expected) in kinds.items()
        if (value := said.get(name)) is not None
        and not (isinstance(value, str) and pattern.fullmatch(value))
    }


def bridge_commit(package: Path = _PACKAGE) -> str | None:
    """The commit of a checkout that this code is, to the byte; None of any other installation."""
    git = shutil.which("git")
    if git is None:
        return None

    def ask(*words: str) -> str | None:
        done = subprocess.run(  # noqa: S603 - git, and our own words
            [git, "-C", str(package), *words], capture_output=True, text=True, check=False
        )
        return done.stdout.strip() if done.returncode == 0 else None

    tracked = ask("ls-files", "--error-unmatch", "cli.py")  # not somebody's who has a venv there
    changed = ask("status", "--porcelain", "--", str(package.parent))
    commit = ask("rev-parse", "HEAD")
    if tracked is None or changed or commit is None or not _COMMIT.fullmatch(commit):
        return None
    return commit
