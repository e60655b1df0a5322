"""Logits on request: token ids in, logits out, both as safetensors files."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import numpy as np

from bridge.convert import read_spec
from bridge.errors import CheckpointError, ConfigError
from bridge.megatron_args import spec_from_checkpoint_args
from bridge.pipeline import plan_layout
from bridge.record import SIDE_DIRECTORY
from bridge.spec import ModelSpec
from bridge.storage.megatron import MegatronSource
from harness import live
from harness.launcher import RankPool
from harness.live import ModelRequest
from harness.reference import Array, hf_logits, load_hf_model


class Tokens:
    """What to run a model on: `input_ids` (batch, seq), `position_ids` (seq,) or (batch, seq)."""

    def __init__(self, input_ids: Array, position_ids: Array) -> None:
        self.input_ids = input_ids
        self.position_ids = position_ids


def read_input(path: Path) -> Tokens:
    """Read `input_ids` and, if there, `position_ids`; without them positions count from 0.

    Raises:
        CheckpointError: BR300, not such a file.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"cannot read the input: {error}", where=str(path)) from None
    hint = "input_ids is (batch, seq), position_ids (seq) or (batch, seq), both integers"
    unknown = sorted(tensors.keys() - {"input_ids", "position_ids"})
    if "input_ids" not in tensors or unknown:
        held = ", ".join(tensors) or "nothing"
        raise CheckpointError(f"the input holds {held}", where=str(path), hint=hint)
    ids = tensors["input_ids"]
    if ids.ndim != 2 or not ids.size or ids.dtype.kind not in "iu":
        raise CheckpointError(
            f"input_ids is {ids.dtype} of shape {ids.shape}", where=str(path), hint=hint
        )
    positions = tensors.get("position_ids", np.arange(ids.shape[1]))
    if positions.dtype.kind not in "iu" or positions.shape not in (ids.shape, ids.shape[1:]):
        raise CheckpointError(
            f"position_ids is {positions.dtype} of shape {positions.shape} for input_ids of shape "
            f"{ids.shape}",
            where=str(path),
            hint=hint,
        )
    return Tokens(ids.astype(np.int64), positions.astype(np.int64))


def write_output(path: Path, found: Array) -> None:
    """Write `logits`, (batch, seq, vocab_size), float32."""
    from safetensors.numpy import save_file

    save_file({"logits": np.ascontiguousarray(found, dtype=np.float32)}, path)


def compute_hf(
    hf: Path, tokens: Tokens, *, dtype: str, device: str, trust_remote_code: bool
) -> Array:
    """Logits of the Hugging Face model."""
    model = load_hf_model(hf, dtype=dtype, trust_remote_code=trust_remote_code)
    return hf_logits(model.to(device), tokens.input_ids, tokens.position_ids)


def compute_megatron(
    megatron: Path,
    tokens: Tokens,
    *,
    hf_model: Path | None,
    tp: int,
    pp: int,
    vp: int | None,
    dtype: str,
    device: Literal["cpu", "cuda"],
    timeout: float,
) -> Array:
    """Logits of a Megatron checkpoint, by Megatron-Core over the layout's ranks."""
    spec = megatron_spec(megatron, hf_model=hf_model)
    layout = plan_layout(
        spec,
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        virtual_pipeline_model_parallel_size=vp,
    )
    request = ModelRequest(
        spec=spec,
        layout=layout,
        params_dtype=dtype,
        kind="megatron",
        path=megatron,
        device=device,
    )
    with RankPool(device=device, timeout=timeout) as pool:
        found: list[Array] = pool.run(
            layout, live.logits, request, tokens.input_ids, tokens.position_ids
        )
    return found[0]


def megatron_spec(megatron: Path, *, hf_model: Path | None = None) -> ModelSpec:
    """The model of a Megatron checkpoint: by `hf_model`, the record of its import, or its args.

    Raises:
        ConfigError: BR100, none of them is there.
    """
    if hf_model is not None:
        return read_spec(hf_model)
    with MegatronSource(megatron) as source:
        kept = source.root / SIDE_DIRECTORY
        if kept.is_dir():
            return read_spec(kept)
        if source.args is None:
            raise ConfigError(
                "the checkpoint says nothing of its model: common.pt holds no args",
                where=str(source.root),
                hint="pass --hf-model with the directory or config.json of the original model",
            )
        return spec_from_checkpoint_args(source.args, where=source.args_where)
