"""The names of a `torch_dist` checkpoint's files, and the one that says which backends wrote it."""

from __future__ import annotations

import json
from typing import Final

from bridge.errors import CheckpointError, CorruptFileError
from bridge.storage.input_files import MAX_JSON, read_input
from bridge.storage.remote import Location
from bridge.strict_json import parse_json

TRACKER_NAME: Final = "latest_checkpointed_iteration.txt"
CONFIG_NAME: Final = "metadata.json"
METADATA_NAME: Final = ".metadata"
COMMON_NAME: Final = "common.pt"
COMMON_KEY: Final = "common_state/shard_0_1"
"""Where Megatron-Core 0.17 and later keep what was in `common.pt`."""
SUFFIX: Final = ".distcp"

_BACKENDS: Final = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}


def config_bytes() -> bytes:
    """The contents of `metadata.json`, all four fields of it, as Megatron-Core 0.16 writes them."""
    return json.dumps(_BACKENDS).encode()


def check_config(directory: Location) -> None:
    """Refuse what is not a `torch_dist` checkpoint, by its `metadata.json`.

    Raises:
        CheckpointError: BR300, there is no such file.
        CorruptFileError: BR302, it is not JSON, or names another backend or version.
    """
    path = directory / CONFIG_NAME
    try:
        config = parse_json(read_input(path, most=MAX_JSON))
    except OSError as error:
        raise CheckpointError(
            f"no Megatron torch_dist checkpoint: cannot read {CONFIG_NAME}: {error.strerror}",
            where=str(path),
            hint="name the directory that holds the tracker file, or an iteration's own directory",
        ) from None
    except ValueError as error:
        raise CorruptFileError(f"not JSON: {error}", where=str(path)) from None
    backend = config.get("sharded_backend") if isinstance(config, dict) else config
    if backend != "torch_dist":
        raise CorruptFileError(
            f"the checkpoint's sharded_backend is {backend!r}; only 'torch_dist' can be read",
            where=str(path),
            hint="convert it with Megatron-LM: --ckpt-convert-format torch_dist",
        )
    # Megatron-Core 0.17 and later write the first two fields only.
    other = [f"{name}={config[name]!r}" for name in _BACKENDS if name in config]
    known = [f"{name}={value!r}" for name, value in _BACKENDS.items() if name in config]
    if other != known:
        raise CorruptFileError(
            f"unknown versions of the format: {', '.join(other)}",
            where=str(path),
            hint=f"known: {', '.join(known)}",
        )
