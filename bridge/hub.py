"""Where a model named on the command line is: a local directory, a bare config, or the Hub."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final

from bridge.errors import CheckpointError, EnvironmentMissingError, UsageError

_HUB_ID: Final = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_WEIGHTS: Final = ("*.safetensors", "*.safetensors.index.json")
_OTHER_WEIGHTS: Final = (
    "*.bin",
    "*.pt",
    "*.pth",
    "*.gguf",
    "*.h5",
    "*.msgpack",
    "*.onnx",
    "*.nemo",
)


def resolve_model(model: str, *, weights: bool, revision: str | None = None) -> Path:
    """Turn `M` of the commands into a local path, downloading from the Hub if it is an id.

    Args:
        model: A directory, a `config.json`, or a Hub id `org/name`. A local path wins.
        weights: Whether the safetensors files are needed; without them nothing big is downloaded.
        revision: Branch, tag or commit on the Hub.

    Raises:
        CheckpointError: BR300, neither a path nor an id, or the Hub does not give it.
    """
    path = Path(model)
    if path.exists():
        if revision is not None:
            raise UsageError(
                "--revision is for models on the Hub, and this one is here", where=model
            )
        return path
    if not _HUB_ID.fullmatch(model):
        raise CheckpointError(
            "no such file or directory",
            where=model,
            hint="give a checkpoint directory, a config.json, or a Hub id such as "
            "nvidia/Llama-3_3-Nemotron-Super-49B-v1",
        )
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
    except ImportError as error:
        raise EnvironmentMissingError(
            f"a Hub id needs huggingface_hub: {error}",
            where=model,
            hint="pip install huggingface_hub",
        ) from None
    ignored = list(_OTHER_WEIGHTS if weights else (*_OTHER_WEIGHTS, *_WEIGHTS))
    try:
        return Path(snapshot_download(model, revision=revision, ignore_patterns=ignored))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise CheckpointError(
            f"neither a path here nor a model that the Hub gives: {reason}",
            where=model,
            hint="check the path, or the id and the network; log in with `hf auth login` if it is "
            "gated, or download it elsewhere and give the directory",
        ) from None
