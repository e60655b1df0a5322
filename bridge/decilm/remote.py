"""Load a Hugging Face reference model: ours, transformers' Llama, or the checkpoint's own code.

A reference that is quietly wrong is worse than none, so a checkpoint's own code runs only by
opt-in, never where it is known to compute wrong results, and a tensor that was not loaded is an
error rather than a line in a log.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Final

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers import __version__ as transformers_version
from transformers.dynamic_module_utils import get_class_from_dynamic_module

from bridge.decilm.configuration import DeciLMConfig
from bridge.decilm.own_code import CLASSES, announce
from bridge.errors import AccountingError, RemoteCodeError, UnsupportedArchitectureError
from bridge.hf_config import load_hf_config
from bridge.hub import resolve_here

_LOCAL_MODEL_TYPES: Final = ("llama", DeciLMConfig.model_type)
_REFUSED_FROM: Final = (5, 0)
_TROUBLES: Final[tuple[tuple[tuple[int, int], str], ...]] = (
    ((5, 2), "computes wrong logits: its rotary frequencies are left uninitialised on loading"),
    ((5, 0), "computes wrong logits"),
    (
        (4, 56),
        "does not import as published, and with that patched generates wrong tokens with a cache",
    ),
    ((4, 54), "cannot generate with a cache"),
)
"""What the published DeciLM code does from which transformers on, newest first.

Measured with the code of Super-49B-v1 on a CPU; 4.44 to 4.53.3 are right, generation included.
"""
_WORKS_WITH: Final = (
    "transformers 4.44 to 4.53.3 (4.48.3 is what the checkpoints were written with)"
)
_FAILURES: Final = (
    ImportError,
    AttributeError,
    KeyError,
    NameError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
)


class RemoteCodeWarning(UserWarning):
    """The checkpoint's own code runs, and is known to fail at some of what a model does."""


def explain_remote_code_failure(checkpoint: str | Path, error: BaseException) -> RemoteCodeError:
    """Say why the checkpoint's own code did not run, and what works instead.

    Args:
        checkpoint: Directory or Hub id.
        error: What the import, construction or loading raised.

    Returns:
        BR105, to be raised from `error`.
    """
    reason = str(error).strip().splitlines()
    return RemoteCodeError(
        "the checkpoint's own code does not run under transformers "
        f"{transformers_version}: {type(error).__name__}" + (f": {reason[0]}" if reason else ""),
        where=str(checkpoint),
        hint=_what_works(checkpoint),
    )


def load_reference(
    path: str | Path,
    *,
    trust_remote_code: bool = False,
    dtype: torch.dtype = torch.float32,
    attn_implementation: str = "eager",
    carry: Collection[str] = (),
) -> PreTrainedModel:
    """Load the Hugging Face model that a conversion is judged against, ready for inference.

    Args:
        path: Checkpoint directory or Hub id.
        trust_remote_code: Run the code that the checkpoint's `auto_map` names, if it names any,
            in place of ours. Whose it is and which version, commit and sha256, is logged before.
            Nothing is registered: later loads are not affected.
        dtype: Of the weights in memory.
        attn_implementation: `eager`, `sdpa`, or another that transformers knows. The published
            DeciLM code knows `eager` and `flash_attention_2` only.
        carry: Unknown fields of the configuration that DeciLM may let through unread.

    Returns:
        The model in evaluation mode.

    Raises:
        RemoteCodeError: BR105, the checkpoint needs its own code and that is not allowed, does
            not import, or is known to be wrong under the installed transformers.
        UnsupportedArchitectureError: BR101, neither Llama, DeciLM nor a model with its own code.
        ConfigError: BR1xx, the configuration cannot be honoured.
        AccountingError: BR301, weights are missing, unexpected or of another shape.

    Warns:
        RemoteCodeWarning: The checkpoint's own code runs, with a known fault in generation.
    """
    fields = _read_config(path)
    model_type = fields.get("model_type")
    own_code: Mapping[str, str] = fields.get("auto_map") or {}
    options = {_DTYPE_ARGUMENT: dtype, "attn_implementation": attn_implementation}
    if trust_remote_code and "AutoModelForCausalLM" in own_code:
        return _load_own_code(path, own_code, is_decilm=_is_decilm(fields), options=options)
    if model_type not in _LOCAL_MODEL_TYPES:
        if "AutoModelForCausalLM" in own_code:
            raise RemoteCodeError(
                f"model type {model_type!r} needs the checkpoint's own code",
                where=str(path),
                hint="read that code, then pass --trust-remote-code",
            )
        raise UnsupportedArchitectureError(
            f"model type {model_type!r} is not one of this family", where=f"{path}: config.json"
        )
    config = AutoConfig.from_pretrained(str(path), trust_remote_code=False)
    if isinstance(config, DeciLMConfig):
        config.carry_fields(carry)
    return _complete(
        path,
        AutoModelForCausalLM.from_pretrained(
            str(path),
            config=config,
            trust_remote_code=False,
            output_loading_info=True,
            **options,
        ),
    )


def _read_config(path: str | Path) -> Mapping[str, Any]:
    if Path(path).is_dir():
        return load_hf_config(Path(path))
    fields: Mapping[str, Any] = PretrainedConfig.get_config_dict(str(path))[0]
    return fields


def _is_decilm(fields: Mapping[str, Any]) -> bool:
    return fields.get("model_type") == DeciLMConfig.model_type or fields.get("architectures") == [
        "DeciLMForCausalLM"
    ]


def _load_own_code(
    path: str | Path, own_code: Mapping[str, str], *, is_decilm: bool, options: Mapping[str, object]
) -> PreTrainedModel:
    trouble = _known_trouble() if is_decilm else None
    if trouble and _release(transformers_version) >= _REFUSED_FROM:
        raise RemoteCodeError(
            f"under transformers {transformers_version} the checkpoint's own code {trouble}",
            where=str(path),
            hint=_what_works(path),
        )
    # The snapshot of one commit, so that what runs is what was announced.
    directory = resolve_here(str(path), weights=True)
    announce(directory, own_code)
    try:
        config_class, model_class = (
            get_class_from_dynamic_module(own_code[name], str(directory)) for name in CLASSES
        )
        loaded = model_class.from_pretrained(
            str(directory),
            config=config_class.from_pretrained(str(directory)),
            output_loading_info=True,
            **options,
        )
    except _FAILURES as error:
        raise explain_remote_code_failure(path, error) from error
    if trouble:
        warnings.warn(
            f"under transformers {transformers_version} the checkpoint's own code {trouble}; "
            f"it works with {_WORKS_WITH}",
            RemoteCodeWarning,
            stacklevel=3,
        )
    return _complete(path, loaded)


def _complete(path: str | Path, loaded: tuple[PreTrainedModel, Mapping[str, Any]]) -> Any:  # noqa: ANN401  # transformers is not typed for mypy
    model, info = loaded
    faults = [
        f"{kind.removesuffix('_keys')}: {name}"
        for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")
        for name in sorted(map(str, info.get(kind, ())))
    ]
    if faults:
        raise AccountingError(
            f"{len(faults)} tensors of the model and of the checkpoint do not match",
            where=[f"{path}: {fault}" for fault in faults],
            hint="the checkpoint is incomplete or its config.json belongs to another model",
        )
    return model.eval()


def _what_works(checkpoint: str | Path) -> str:
    return (
        f"leave --trust-remote-code away: bridge.decilm loads {checkpoint} in any supported "
        f"transformers; the published DeciLM code itself works with {_WORKS_WITH}"
    )


def _known_trouble() -> str | None:
    release = _release(transformers_version)
    return next((trouble for since, trouble in _TROUBLES if release >= since), None)


def _release(version: str) -> tuple[int, int]:
    major, minor = version.split(".")[:2]
    return int(major), int(minor)


_DTYPE_ARGUMENT: Final = "dtype" if _release(transformers_version) >= (4, 56) else "torch_dtype"
