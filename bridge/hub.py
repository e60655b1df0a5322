"""Where a model named on the command line is: a directory, a bare config, the Hub, or a URL."""

from __future__ import annotations

import atexit
import errno
import re
import shutil
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Final
from urllib.parse import unquote

from bridge.errors import CheckpointError, EnvironmentMissingError, UsageError
from bridge.scratch import held_directory
from bridge.storage.remote import (
    Location,
    RemotePath,
    backend_errors,
    is_url,
    parse_location,
    reason,
)

_HUB_ID: Final = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_HUB_URL: Final = re.compile(rf"hf://(?P<id>{_HUB_ID.pattern})(?:@(?P<revision>[^/@]+))?/?")
_WEIGHTS: Final = ("*.safetensors", "*.safetensors.index.json")
OTHER_WEIGHTS: Final = (
    "*.bin",
    "*.pt",
    "*.pth",
    "*.gguf",
    "*.h5",
    "*.msgpack",
    "*.onnx",
    "*.nemo",
)


_DOWNLOADS: Final = 8
"""Files fetched together."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HubAccess:
    """How the Hub is asked, in the words of huggingface_hub.

    Args:
        revision: Branch, tag or commit.
        cache_dir: Where downloads are kept; None takes HF_HUB_CACHE's place.
        token: For gated models; None takes the one of `hf auth login`.
        local_files_only: Take what the cache holds, as HF_HUB_OFFLINE=1 does.
        force_download: Fetch again what the cache holds.
    """

    revision: str | None = None
    cache_dir: str | Path | None = None
    token: str | bool | None = None
    local_files_only: bool = False
    force_download: bool = False


def is_hub_id(model: str) -> bool:
    """Whether this names a model on the Hub, and nothing that is here."""
    return _HUB_ID.fullmatch(model) is not None and not _is_here(model)


def _is_here(model: str) -> bool:
    try:
        return Path(model).exists()
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:  # no file can be called that
            return False
        raise CheckpointError(f"cannot read it: {error.strerror}", where=model) from None


def resolve_model(
    model: str,
    *,
    weights: bool,
    revision: str | None = None,
    access: HubAccess | None = None,
) -> Location:
    """Turn `M` of the commands into a place to read, downloading from the Hub if it is an id.

    Args:
        model: A directory, a `config.json`, a URL that fsspec knows, or a Hub id `org/name`. A
            local path wins. What a URL names is not downloaded: its tensors are read there.
        weights: Whether the safetensors files are needed; without them nothing big is downloaded.
        revision: Branch, tag or commit on the Hub.
        access: Says that and more.

    Raises:
        CheckpointError: BR300, neither a path nor an id nor a URL of something, or the Hub does
            not give it.
        EnvironmentMissingError: BR500, the URL's protocol needs a package.
    """
    access = access or HubAccess(revision=revision)
    revision = access.revision
    if is_url(model):
        return _resolve_url(model, revision)
    if _is_here(model):
        if revision is not None:
            raise UsageError(
                "--revision is for models on the Hub, and this one is here", where=model
            )
        return Path(model)
    if not _HUB_ID.fullmatch(model):
        raise CheckpointError(
            "no such file or directory",
            where=model,
            hint="give a checkpoint directory, a config.json, a URL, or a Hub id such as "
            "nvidia/Llama-3_3-Nemotron-Super-49B-v1",
        )
    return _snapshot(model, access, weights=weights)


def resolve_here(model: str, *, weights: bool, revision: str | None = None) -> Path:
    """`resolve_model` for what can read nothing but files of this machine.

    A model behind a URL is downloaded: one on the Hub into the Hub's cache, any other into the
    system's temporary directory (TMPDIR), where it stays until this process ends.

    Raises:
        CheckpointError: BR300, as `resolve_model` and `local_copy`.
    """
    on_hub = _HUB_URL.fullmatch(model)
    if on_hub is not None and revision is None:
        found = on_hub["revision"]
        access = HubAccess(revision=None if found is None else unquote(found))
        return _snapshot(on_hub["id"], access, weights=weights)
    location = resolve_model(model, weights=weights, revision=revision)
    if isinstance(location, Path):
        return location
    copies = ExitStack()
    atexit.register(copies.close)
    return copies.enter_context(local_copy(location, without=_unneeded(weights=weights)))


def _unneeded(*, weights: bool) -> tuple[str, ...]:
    return OTHER_WEIGHTS if weights else (*OTHER_WEIGHTS, *_WEIGHTS)


def commit_of(snapshot: Location) -> str | None:
    """The commit of a directory in the Hub's cache, None of any other."""
    return snapshot.name if snapshot.parent.name == "snapshots" else None


def _snapshot(model: str, access: HubAccess, *, weights: bool) -> Path:
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise EnvironmentMissingError(
            f"a Hub id needs huggingface_hub: {error}",
            where=model,
            hint="pip install huggingface_hub",
        ) from None
    ignored = list(_unneeded(weights=weights))
    try:
        # A download that was cut short goes on where it stopped, and what is there is not fetched.
        found = snapshot_download(model, ignore_patterns=ignored, **asdict(access))
        return Path(found)
    # Ids that the Hub cannot have are ValueErrors, and the network's errors are those of whichever
    # client huggingface_hub has: requests until its 1.0, httpx since.
    except Exception as error:
        raise CheckpointError(
            f"neither a path here nor a model that the Hub gives: {reason(error)}",
            where=model,
            hint="check the path, or the id and the network; log in with `hf auth login` if it is "
            "gated, or download it elsewhere and give the directory",
        ) from error


def _resolve_url(model: str, revision: str | None) -> Location:
    if revision is not None:
        raise UsageError(
            "--revision is for Hub ids",
            where=model,
            hint="a URL says it itself: hf://ORG/NAME@REVISION",
        )
    location = parse_location(model)
    if not location.exists():
        raise CheckpointError(
            "no such file or directory",
            where=model,
            hint="check the URL; a directory exists while there is a file below it",
        )
    return location


@contextmanager
def local_copy(location: Location, *, without: Sequence[str] = ()) -> Iterator[Path]:
    """A checkpoint as files of this machine, for code that can read nothing else.

    A local path is given as it is. What a URL names is downloaded to the system's temporary
    directory (TMPDIR) for as long as the block runs.

    Args:
        location: A directory, or a bare file.
        without: Patterns of names that are not needed, such as `OTHER_WEIGHTS`.

    Raises:
        CheckpointError: BR300, no room for it, or the backend fails.
    """
    if isinstance(location, Path):
        yield location
        return
    with held_directory() as directory:
        yield _download(location, directory, without)


def _download(location: RemotePath, directory: Path, without: Sequence[str]) -> Path:
    base = location.parent
    found = [location] if location.is_file() else list(location.rglob("*"))
    files = [file for file in found if not any(fnmatchcase(file.name, one) for one in without)]
    needed = sum(file.stat().st_size for file in files)
    free = shutil.disk_usage(directory).free
    if free < needed:
        raise CheckpointError(
            f"{needed / 1e9:.3g} GB have to be downloaded, {free / 1e9:.3g} GB are free",
            where=[str(location), str(directory)],
            hint="set TMPDIR to a directory with more room",
        )

    def fetch(file: RemotePath) -> None:
        target = directory / file.relative_to(base)
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            with backend_errors(str(file)):
                file.fs.get_file(file.path, str(target))
        except OSError as error:
            raise CheckpointError(
                f"cannot download the file: {error.strerror}", where=str(file)
            ) from None

    with ThreadPoolExecutor(_DOWNLOADS) as pool:
        list(pool.map(fetch, files))
    return directory / location.name
