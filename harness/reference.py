"""The Hugging Face side: its model, quietly loaded, and its logits."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]

_EAGER_UP_TO: Final = 32_768
"""Tokens of a sequence; eager attention stores each score: at 131,072, four heads' fill 128 GiB."""


def attention_for(length: int) -> str:
    """Which attention the reference computes a sequence of so many tokens with.

    `eager`, which is written out in float32 softmax and all, as long as its scores fit a GPU;
    then `sdpa`, transformers' own default, whose kernels store none.
    """
    return "eager" if length <= _EAGER_UP_TO else "sdpa"


def load_hf_model(
    path: Path,
    *,
    dtype: str,
    trust_remote_code: bool = False,
    carry: Collection[str] = (),
    attention: str = "eager",
) -> Any:  # noqa: ANN401 - transformers is not typed
    """The reference model of a checkpoint, without transformers' own progress bars."""
    import torch
    from transformers.utils import logging as transformers_logging

    from bridge.decilm import load_reference

    transformers_logging.disable_progress_bar()
    return load_reference(
        path,
        dtype=getattr(torch, dtype),
        trust_remote_code=trust_remote_code,
        attn_implementation=attention,
        carry=carry,
    )


def hf_logits(model: Any, input_ids: Array, position_ids: Array) -> Array:  # noqa: ANN401 - transformers is not typed
    """Logits of a transformers model, (batch, seq, vocab_size), float32 or float64."""
    import torch

    positions = torch.from_numpy(np.broadcast_to(position_ids, input_ids.shape).copy())
    with torch.no_grad():
        found = model(
            input_ids=torch.from_numpy(input_ids).to(model.device),
            position_ids=positions.to(model.device),
            # Without a mask transformers takes positions with gaps for packed sequences.
            attention_mask=torch.ones(input_ids.shape, dtype=torch.int64, device=model.device),
            use_cache=False,
        ).logits
    logits: Array = (found if found.dtype == torch.float64 else found.float()).cpu().numpy()
    del found
    if model.device.type == "cuda":
        torch.cuda.empty_cache()  # ranks are other processes
    return logits


def hf_inv_freq(model: Any) -> Array | None:  # noqa: ANN401 - transformers is not typed
    """The rotary frequencies of a transformers model, (kv_channels / 2,), float32; None without.

    They belong to the model or, in some checkpoints' own code, to each attention.
    """
    import torch

    tables = (getattr(module, "inv_freq", None) for module in model.modules())
    found = next((one for one in tables if isinstance(one, torch.Tensor)), None)
    # A table that was rounded to bfloat16 keeps its wrong values in float32.
    return None if found is None else found.detach().float().cpu().numpy()


def implementation_of(model: Any, checkpoint: Path, config: Mapping[str, Any]) -> str:  # noqa: ANN401 - as above
    """Whose code a reference model runs: transformers', ours, or the checkpoint's, which one."""
    kind = type(model)
    if not kind.__module__.startswith("transformers_modules"):
        return f"{kind.__module__}.{kind.__qualname__}"
    named = config["auto_map"]["AutoModelForCausalLM"]
    revision = getattr(model.config, "_commit_hash", None)
    if revision is None:  # a directory: its code is what it holds
        code = hashlib.sha256()
        for path in sorted(checkpoint.glob("*.py")):
            code.update(f"{path.name}\0".encode() + path.read_bytes() + b"\0")
        revision = f"sha256 {code.hexdigest()}"
    return f"the checkpoint's own code: {named}, revision {revision}"


def float32_powers(base: float, kv_channels: int) -> tuple[float, ...] | None:
    """The powers of RoPE's base as torch computes them in float32, where they are not exact.

    Args:
        base: `rope_theta`.
        kv_channels: Size of a head.

    Returns:
        (kv_channels / 2) numbers; None where each is the float64 power rounded once, as the oracle
        has it by itself. From the library alone: a model that was loaded wrongly has no say.
    """
    import torch

    exponents = np.arange(0, kv_channels, 2, dtype=np.float32) / np.float32(kv_channels)
    exact = np.float64(np.float32(base)) ** exponents.astype(np.float64)
    powers: Array = torch.pow(base, torch.from_numpy(exponents)).numpy()
    if (powers == exact.astype(np.float32)).all():
        return None
    return tuple(powers.tolist())
