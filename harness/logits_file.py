"""Logits on request: token ids in, logits out with an account of what they were made from."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from bridge import __version__ as bridge_version
from bridge.agreement import described_model
from bridge.console import RichProgress
from bridge.errors import (
    CheckpointError,
    InconsistentConfigError,
)
from bridge.hf_config import load_hf_config
from bridge.pipeline import plan_layout
from bridge.platform import describe, forbid_tf32, refuse_missing_gpu
from bridge.spec import ModelSpec
from bridge.storage.megatron import MegatronSource
from bridge.storage.safetensors import SafetensorsSource
from harness import live
from harness.detached import DetachedReference, Provenance
from harness.identity import (
    config_sha256,
    hf_weights_sha256,
    inputs_sha256,
    megatron_weights_sha256,
    spec_sha256,
)
from harness.inputs import account_for_hf, account_for_megatron
from harness.launcher import RankPool
from harness.live import ModelRequest
from harness.probes import INPUT_PROBE, Probe, probe_named
from harness.reference import Array, hf_inv_freq, hf_logits, implementation_of, load_hf_model

ProbeName = Literal["short", "long"]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Tokens:
    """What to run a model on.

    Args:
        input_ids: (batch, seq), int64.
        position_ids: (seq,) or (batch, seq), int64.
        where: The file they are from.
    """

    input_ids: Array
    position_ids: Array
    where: str


def read_input(path: Path) -> Tokens:
    """Read `input_ids` and, if there, `position_ids`; without them positions count from 0.

    Raises:
        CheckpointError: BR300, not such a file.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        tensors = load_file(path)
    except (OSError, ValueError, SafetensorError) as error:  # ValueError: dimensions numpy lacks
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
    return Tokens(
        input_ids=ids.astype(np.int64), position_ids=positions.astype(np.int64), where=str(path)
    )


def check_tokens(tokens: Tokens, spec: ModelSpec) -> None:
    """Refuse ids and positions that the model does not have.

    transformers fails on such an id with an IndexError, or on a GPU with a broken context, and
    Megatron's sharded embedding gives it a zero vector.

    Raises:
        InconsistentConfigError: BR104, with every range that is left.
    """
    ranges = (
        ("input_ids", tokens.input_ids, spec.vocab_size),
        ("position_ids", tokens.position_ids, spec.max_position_embeddings),
    )
    wrong = [
        f"{tokens.where}: {name} must lie in [0, {stop}); they are {values.min()} to {values.max()}"
        for name, values, stop in ranges
        if values.min() < 0 or values.max() >= stop
    ]
    if wrong:
        raise InconsistentConfigError("the model cannot run on this input", where=wrong)


def tokens_for(given: Tokens | ProbeName, spec: ModelSpec) -> Tokens:
    """What to run this model on: the user's tokens, which it must have, or a probe of `verify`.

    Raises:
        InconsistentConfigError: BR104, as `check_tokens`.
    """
    if isinstance(given, Tokens):
        check_tokens(given, spec)
        return given
    probe = probe_named(
        given, spec.vocab_size, max_position_embeddings=spec.max_position_embeddings
    )
    return Tokens(
        input_ids=probe.input_ids, position_ids=probe.position_ids, where=f"the {given} probe"
    )


def as_probe(tokens: Tokens, spec: ModelSpec) -> Probe:
    """A user's tokens as a probe of `verify`.

    Raises:
        InconsistentConfigError: BR104, tokens the model does not have, or positions that differ
            between sequences or do not increase.
    """
    check_tokens(tokens, spec)
    positions = np.broadcast_to(tokens.position_ids, tokens.input_ids.shape)
    if (positions != positions[:1]).any() or (np.diff(positions[0]) <= 0).any():
        raise InconsistentConfigError(
            "positions must increase and be the same for every sequence",
            where=tokens.where,
            hint="give position_ids as (seq,), or leave them away to count from 0",
        )
    return Probe(name=INPUT_PROBE, input_ids=tokens.input_ids, position_ids=positions[0].copy())


def compute_hf(
    hf: Path,
    given: Tokens | ProbeName,
    *,
    dtype: str,
    device: str,
    trust_remote_code: bool = False,
    carry: Collection[str] = (),
) -> DetachedReference:
    """Logits of the Hugging Face model.

    Raises:
        BridgeError: BR104, tokens it does not have; BR500, no such device; or what is wrong with
            the checkpoint.
    """
    spec = account_for_hf(hf, carry=carry)
    tokens = tokens_for(given, spec)
    refuse_missing_gpu(device)
    if device == "cuda":
        forbid_tf32()
    model = load_hf_model(hf, dtype=dtype, trust_remote_code=trust_remote_code, carry=carry)
    logits = hf_logits(model.to(device), tokens.input_ids, tokens.position_ids)
    config = load_hf_config(hf)
    return DetachedReference(
        logits=logits,
        provenance=Provenance(
            config_sha256=config_sha256(config),
            spec_sha256=spec_sha256(spec),
            weights_sha256=hash_hf_weights(hf),
            inputs_sha256=inputs_sha256(tokens.input_ids, tokens.position_ids),
            dtype=dtype,
            device=device,
            implementation=implementation_of(model, hf, config),
            versions=_versions(),
            inv_freq=hf_inv_freq(model),
        ),
    )


def hash_hf_weights(hf: Path) -> str:
    """The weights' digest, with a progress bar: a large model takes minutes."""
    with SafetensorsSource(hf) as source:
        total = sum(info.nbytes for info in source.tensors.values())
        with RichProgress().phase("hash weights", total) as advance:
            return hf_weights_sha256(source, advance=advance)


def _hash_megatron_weights(megatron: Path, spec: ModelSpec) -> str:
    with MegatronSource(megatron) as source:
        total = sum(info.nbytes for info in source.tensors.values())
        with RichProgress().phase("hash weights", total) as advance:
            return megatron_weights_sha256(source, spec, advance=advance)


def _versions() -> dict[str, str | None]:
    """Of whatever the numbers may depend on."""
    found = describe()
    return {
        "nemotron-bridge": bridge_version,
        "python": found["python"],
        "machine": found["machine"],
        **found["versions"],
    }


def compute_megatron(
    megatron: Path,
    given: Tokens | ProbeName,
    *,
    hf_model: Path | None,
    tp: int,
    pp: int,
    vp: int | None,
    dtype: str,
    device: Literal["cpu", "cuda"],
    layers: str = "local",
    timeout: float,
    carry: Collection[str] = (),
) -> DetachedReference:
    """Logits of a Megatron checkpoint, by Megatron-Core over the layout's ranks.

    Raises:
        BridgeError: BR104, tokens it does not have; BR2xx, a layout it cannot be cut into; HN2xx,
            ranks that could not run; or what is wrong with the checkpoint.
    """
    with MegatronSource(megatron) as source:
        spec, kept = described_model(source, hf_model, carry=carry)
    tokens = tokens_for(given, spec)
    account_for_megatron(megatron, spec)
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
        layers=layers,
    )
    with RankPool(device=device, timeout=timeout) as pool:
        found: list[Array] = pool.run(
            layout, live.logits, request, tokens.input_ids, tokens.position_ids
        )
    return DetachedReference(
        logits=found[0],
        provenance=Provenance(
            config_sha256=None if kept is None else config_sha256(load_hf_config(kept)),
            spec_sha256=spec_sha256(spec),
            weights_sha256=_hash_megatron_weights(megatron, spec),
            inputs_sha256=inputs_sha256(tokens.input_ids, tokens.position_ids),
            dtype=dtype,
            device=device,
            implementation=f"megatron-core, {layers} layers, {layout.name}",
            versions=_versions(),
        ),
    )
