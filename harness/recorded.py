"""What an import has kept of its source, held against the source as it is now.

Weights alone do not make a model: with another `low_freq_factor` in either configuration every
tensor is still right, and every logit wrong.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Final

from bridge import hf_config
from bridge.convert import read_spec
from bridge.errors import BridgeError
from bridge.record import SIDE_DIRECTORY, SourceRecord, sha256_of
from bridge.spec import ModelSpec
from bridge.storage.megatron import MegatronSource
from harness.bench import Bench
from harness.suite import Case

_CONFIG: Final = "config.json"


def record_differences(
    case: Case, bench: Bench, megatron: MegatronSource, record: SourceRecord | None
) -> list[str]:
    """How the configuration kept beside a Megatron checkpoint is not the model's any more.

    The bridge reads it, so a fault in its code has to be in force already.

    Args:
        case: Names the model.
        bench: Knows its configuration, and what the fault makes of one.
        megatron: The checkpoint.
        record: Of its import; None where there is none.
    """
    kept = megatron.root / SIDE_DIRECTORY
    if not (kept / _CONFIG).is_file():
        return []
    carry = {
        *bench.subject(case.model).carry,
        *(record.carried_fields if record is not None else ()),
    }
    name = f"{SIDE_DIRECTORY}/{_CONFIG}"
    try:
        theirs = read_spec(kept, carry=carry)
        if bench.fault.spec is not None:
            theirs = bench.fault.spec(theirs)
        pairs = list(differing_fields(bench.spec(case), theirs))
    except BridgeError as error:
        return [f"{name} cannot be read: {error.message}", *error.where]
    return [
        f"{_CONFIG}: {field}: {ours!r} is not {other!r}, which the Megatron checkpoint's {name} has"
        for field, ours, other in pairs
    ]


def changed_since_import(megatron: MegatronSource, record: SourceRecord | None) -> list[str]:
    """Files kept at the import that are gone, or not by their recorded sha256 what they were."""
    if record is None:
        return []
    kept = megatron.root / SIDE_DIRECTORY
    return [
        f"{SIDE_DIRECTORY}/{name}: "
        + ("lost" if not (kept / name).is_file() else "not the file that was imported, by sha256")
        for name, digest in sorted(record.side_file_sha256.items())
        if not (kept / name).is_file() or sha256_of((kept / name).read_bytes()) != digest
    ]


def differing_fields(ours: ModelSpec, theirs: ModelSpec) -> Iterator[tuple[str, object, object]]:
    """Fields in which two models differ, in the words of one Hugging Face configuration.

    `rope_scaling.low_freq_factor`, `block_configs[3].ffn.no_op`: however either file spells it.
    """
    if ours == theirs:
        return
    yield from _differing(
        hf_config.hf_config_from_spec(ours), hf_config.hf_config_from_spec(theirs), ""
    )


def _differing(ours: Any, theirs: Any, path: str) -> Iterator[tuple[str, object, object]]:  # noqa: ANN401 - JSON
    if isinstance(ours, Mapping) and isinstance(theirs, Mapping):
        for key in dict.fromkeys([*ours, *theirs]):
            place = f"{path}.{key}" if path else key
            yield from _differing(ours.get(key), theirs.get(key), place)
    elif isinstance(ours, list) and isinstance(theirs, list) and len(ours) == len(theirs):
        for index, (one, other) in enumerate(zip(ours, theirs, strict=True)):
            yield from _differing(one, other, f"{path}[{index}]")
    elif ours != theirs:
        yield path, ours, theirs
