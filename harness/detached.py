"""Logits that say what they were made from, so that they can be a reference somewhere else.

`logits` writes them, wherever the reference runs: in an environment with the transformers that a
checkpoint's own code needs, or on a cluster. `verify --reference-logits` reads them and refuses
those of another configuration, other weights, other inputs or another dtype.

A file is safetensors: `logits` (batch, seq, vocab_size), float32, and in its metadata the fields
of `Provenance` as text.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np

from bridge.errors import CheckpointError
from bridge.outputs import new_output
from bridge.spec import ModelSpec
from harness.errors import DetachedReferenceError
from harness.identity import config_sha256, inputs_sha256, spec_sha256
from harness.probes import Probe

Array = np.ndarray[Any, np.dtype[Any]]

FORMAT_VERSION: Final = "1"
_VERSION_KEY: Final = "nemotron_bridge_logits"
_TEXTS: Final = (
    "spec_sha256",
    "weights_sha256",
    "inputs_sha256",
    "dtype",
    "device",
    "implementation",
)
_HINT: Final = "make one with nemotron-bridge logits --probe short (or long, or --input)"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Provenance:
    """What logits were made from, and by what.

    Args:
        config_sha256: Of the parsed `config.json`; None for a Megatron checkpoint without one.
        spec_sha256: Of the model as the bridge understands it.
        weights_sha256: See `harness.identity`.
        inputs_sha256: Likewise.
        dtype: What the model computed in.
        device: Where.
        implementation: Whose code ran.
        versions: Package to version.
        inv_freq: The rotary frequencies of a Hugging Face model, (kv_channels / 2,), float32.
    """

    config_sha256: str | None
    spec_sha256: str
    weights_sha256: str
    inputs_sha256: str
    dtype: str
    device: str
    implementation: str
    versions: Mapping[str, str | None] = field(default_factory=dict)
    inv_freq: Array | None = None

    def to_metadata(self) -> dict[str, str]:
        """As safetensors keeps it: text by text."""
        found = {_VERSION_KEY: FORMAT_VERSION} | {name: getattr(self, name) for name in _TEXTS}
        found["versions"] = json.dumps(dict(self.versions), sort_keys=True)
        if self.config_sha256 is not None:
            found["config_sha256"] = self.config_sha256
        if self.inv_freq is not None:
            little = np.ascontiguousarray(self.inv_freq, dtype="<f4")
            found["inv_freq_float32"] = base64.b64encode(little.tobytes()).decode()
        return found

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, str], *, where: str) -> Provenance:
        """Read it back.

        Raises:
            DetachedReferenceError: HN104, there is none, or it is not ours.
        """
        version = metadata.get(_VERSION_KEY)
        if version is None:
            raise DetachedReferenceError(
                "the logits do not say what they were made from", where=where, hint=_HINT
            )
        if version != FORMAT_VERSION:
            raise DetachedReferenceError(
                f"logits in format {version}, this version reads {FORMAT_VERSION}",
                where=where,
                hint=_HINT,
            )
        try:
            encoded = metadata.get("inv_freq_float32")
            raw = None if encoded is None else base64.b64decode(encoded, validate=True)
            texts = {name: metadata[name] for name in _TEXTS}
            return cls(
                config_sha256=metadata.get("config_sha256"),
                versions=dict(json.loads(metadata["versions"])),
                inv_freq=None if raw is None else np.frombuffer(raw, "<f4").astype(np.float32),
                **texts,
            )
        except (KeyError, ValueError, TypeError, binascii.Error) as error:
            raise DetachedReferenceError(
                f"the account of what the logits were made from is damaged: {error}",
                where=where,
                hint=_HINT,
            ) from None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class DetachedReference:
    """Logits and what they were made from."""

    logits: Array
    provenance: Provenance
    where: str = ""

    def __repr__(self) -> str:
        """All that tells one from another, in a line."""
        digest = hashlib.sha256(np.ascontiguousarray(self.logits).tobytes()).hexdigest()
        return f"logits {digest} of {self.provenance.to_metadata()}"


def write_reference(path: Path, found: DetachedReference, *, overwrite: bool = False) -> None:
    """Write a file that `read_reference` reads.

    Raises:
        TargetExistsError: BR304, it is there, and not to be replaced.
        CheckpointError: BR300, the system refuses: the disk is full, say.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import save_file

    logits = np.ascontiguousarray(found.logits, dtype=np.float32)
    try:
        with new_output(path, overwrite=overwrite) as partial:
            save_file({"logits": logits}, partial, metadata=found.provenance.to_metadata())
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"cannot write the logits: {error}", where=str(path)) from None


def read_reference(path: Path) -> DetachedReference:
    """Read what `logits` has written.

    Raises:
        DetachedReferenceError: HN104, not such a file, or one that does not say what it is of.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            names = list(file.keys())
            if names != ["logits"]:
                raise DetachedReferenceError(
                    f"the file holds {', '.join(names) or 'nothing'}, not logits",
                    where=str(path),
                    hint=_HINT,
                )
            provenance = Provenance.from_metadata(file.metadata() or {}, where=str(path))
            logits = file.get_tensor("logits")
    # TypeError: a dtype that numpy lacks; ValueError: as many dimensions.
    except (OSError, SafetensorError, TypeError, ValueError) as error:
        raise DetachedReferenceError(
            f"cannot read the reference: {error}", where=str(path), hint=_HINT
        ) from None
    return DetachedReference(logits=logits, provenance=provenance, where=str(path))


def match_references(
    files: Sequence[DetachedReference],
    *,
    spec: ModelSpec,
    config: Mapping[str, Any],
    dtype: str,
    probes: Sequence[Probe],
) -> dict[str, DetachedReference]:
    """Say which probe each file is the reference of.

    The weights are left to `check_weights`: hashing them reads the whole checkpoint.

    Raises:
        DetachedReferenceError: HN104, with everything in which any file is of something else.
    """
    by_inputs = {inputs_sha256(one.input_ids, one.position_ids): one for one in probes}
    found: dict[str, DetachedReference] = {}
    wrong: list[str] = []
    for file in files:
        probe = by_inputs.get(file.provenance.inputs_sha256)
        problems = _problems(file, spec, config, dtype, probe)
        if probe is None:
            names = ", ".join(one.name for one in probes)
            problems.append(f"other inputs: none of the probes {names}")
        elif probe.name in found:
            problems.append(f"the {probe.name} probe again, as in {found[probe.name].where}")
        else:
            found[probe.name] = file
        wrong += [f"{file.where}: {problem}" for problem in problems]
    wrong += _disagreement(files)
    if wrong:
        raise DetachedReferenceError(
            "these logits are no reference for this model",
            where=wrong,
            hint="make them anew from the same checkpoint, with the --dtype of this run and "
            "--probe short, --probe long or the file given as --input",
        )
    return found


def check_weights(files: Sequence[DetachedReference], weights_sha256: str) -> None:
    """Refuse files that were made from other weights.

    Raises:
        DetachedReferenceError: HN104, each of them.
    """
    wrong = [
        f"{file.where}: other weights: sha256 {file.provenance.weights_sha256[:16]}, this "
        f"checkpoint's {weights_sha256[:16]}"
        for file in files
        if file.provenance.weights_sha256 != weights_sha256
    ]
    if wrong:
        raise DetachedReferenceError(
            "these logits are no reference for this model",
            where=wrong,
            hint="make them anew from the same checkpoint; if they are right, it has changed",
        )


def _problems(
    file: DetachedReference,
    spec: ModelSpec,
    config: Mapping[str, Any],
    dtype: str,
    probe: Probe | None,
) -> list[str]:
    told, logits = file.provenance, file.logits
    found = []
    if told.spec_sha256 != spec_sha256(spec):
        found.append("other configuration: of another model")
    elif told.config_sha256 not in (None, config_sha256(config)):
        found.append("other configuration: the model is the same, another value differs")
    if told.dtype != dtype:
        found.append(f"other dtype: computed in {told.dtype}, this run is in {dtype}")
    if logits.dtype != np.float32:
        found.append(f"logits are {logits.dtype}, not float32")
    if probe is not None and logits.shape != (*probe.input_ids.shape, spec.vocab_size):
        wanted = (*probe.input_ids.shape, spec.vocab_size)
        found.append(f"logits have shape {logits.shape}, the {probe.name} probe's {wanted}")
    if not logits.size or not np.isfinite(logits).all():
        found.append("logits are not finite numbers")
    frequencies = told.inv_freq
    if frequencies is not None and (
        frequencies.shape != (spec.kv_channels // 2,) or not np.isfinite(frequencies).all()
    ):
        found.append(f"inv_freq is not {spec.kv_channels // 2} finite numbers")
    return found


def _disagreement(files: Sequence[DetachedReference]) -> list[str]:
    """Files of one model rotate by the same frequencies, to the last bit."""
    known = [file for file in files if file.provenance.inv_freq is not None]
    return [
        f"{file.where}: another inv_freq than in {known[0].where}"
        for file in known[1:]
        if _bytes(file) != _bytes(known[0])
    ]


def _bytes(file: DetachedReference) -> bytes:
    frequencies = file.provenance.inv_freq
    return b"" if frequencies is None else frequencies.tobytes()
