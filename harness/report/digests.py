"""What a run depended on, as sha256: the files it read and the code that judged them."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Final

from bridge.convert import read_spec
from bridge.drawing.architecture import architecture
from bridge.errors import ConfigError
from bridge.hf_config import config_file
from harness.locations import suites_dir

_CHUNK: Final = 1 << 22
_CODE: Final = ("*.py", "*.j2", "*.css", "*.json", "*.toml")


def sha256_of(path: Path, advance: Callable[[int], None] = lambda _nbytes: None) -> str:
    """The digest of a file, read in pieces; `advance` is told how many bytes were."""
    found = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(_CHUNK):
            found.update(piece)
            advance(len(piece))
    return found.hexdigest()


def digest_of(data: object) -> str:
    """The digest of plain data, whatever the order of its keys."""
    text = json.dumps(data, sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def code_sha256() -> str:
    """The digest of the bridge, the harness and their suites, as installed.

    A version number stands for many working trees; a resumed run must be of one.
    """
    package = Path(__file__).parents[1]
    folders = {
        "bridge": package.parent / "bridge",
        "harness": package,
        "suites": suites_dir(),
    }
    found = hashlib.sha256()
    for name, folder in folders.items():
        for path in sorted({path for kind in _CODE for path in folder.rglob(kind)}):
            found.update(f"{name}/{path.relative_to(folder).as_posix()}\0".encode())
            found.update(path.read_bytes() + b"\0")
    return found.hexdigest()


def weight_files(hf: Path) -> list[Path]:
    """What is hashed of a Hugging Face checkpoint besides its configuration."""
    return sorted(hf.glob("*.safetensors"))


def megatron_files(megatron: Path | None) -> list[Path]:
    """What is hashed of a Megatron checkpoint: every file of it."""
    if megatron is None:
        return []
    return sorted(path for path in megatron.rglob("*") if path.is_file())


def identity(
    hf: Path,
    megatron: Path | None = None,
    *,
    advance: Callable[[int], None] = lambda _nbytes: None,
) -> dict[str, Any]:
    """What identifies a model under test: sha256 of its configuration and of every weight file.

    And what it is made of, for pictures, where the bridge can read the configuration by itself.

    Args:
        hf: Its Hugging Face checkpoint.
        megatron: The Megatron checkpoint held against it, where there is one.
        advance: Told how many bytes of weights were read, for a progress bar.
    """
    config = config_file(hf)  # alone where weights are drawn from a seed
    found: dict[str, Any] = {
        "config_sha256": sha256_of(config),
        "weight_files": _files(hf, weight_files(hf), advance),
    }
    with contextlib.suppress(ConfigError):  # one that needs --carry-field: the run knows, we do not
        spec = read_spec(hf)
        found["architecture"] = architecture(spec, None, name="").as_data()
    if megatron is not None:
        found["megatron_files"] = _files(megatron, megatron_files(megatron), advance)
    return found


def _files(
    root: Path, paths: Iterable[Path], advance: Callable[[int], None]
) -> dict[str, dict[str, Any]]:
    return {
        path.relative_to(root).as_posix(): {
            "bytes": path.stat().st_size,
            "sha256": sha256_of(path, advance),
        }
        for path in paths
    }
