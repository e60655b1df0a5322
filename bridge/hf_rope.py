"""RoPE in a Hugging Face configuration: the keys of transformers 4 and those of 5."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from bridge.errors import InconsistentConfigError
from bridge.hf_fields import Findings, is_number, same_value
from bridge.spec import Llama3Scaling, RopeSpec


def read_rope(config: Mapping[str, Any], findings: Findings) -> RopeSpec:
    """Read `rope_parameters`, or `rope_scaling` with `rope_theta`, or both where they agree."""
    newer = config.get("rope_parameters")
    older = config.get("rope_scaling")
    found = []
    for name, values in (("rope_parameters", newer), ("rope_scaling", older)):
        if values is None:
            continue
        if not isinstance(values, Mapping):
            findings.inconsistent.append(f"{name} must be an object")
            continue
        theta = values.get("rope_theta", config.get("rope_theta"))
        found.append(_read_rope_values(name, values, theta, findings))
    if not found:
        found.append(_read_rope_values("rope_theta", {}, config.get("rope_theta"), findings))
    if len(set(found)) > 1:
        findings.inconsistent.append("rope_parameters and rope_scaling disagree")
    theta = config.get("rope_theta")
    if theta is not None and theta != found[0].rotary_base:
        findings.inconsistent.append("rope_theta and rope_parameters.rope_theta disagree")
    return found[0]


_LLAMA3_VALUES: Final = (
    "factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings",
)  # fmt: skip


def _read_rope_values(
    name: str, values: Mapping[str, Any], theta: object, findings: Findings
) -> RopeSpec:
    base = 10000.0
    if is_number(theta):
        base = float(theta)
    else:
        findings.inconsistent.append(f"rope_theta={theta!r} must be given as a number")
    kind = values.get("rope_type", values.get("type", "default"))
    if values.get("type") not in (None, kind):
        findings.inconsistent.append(f"{name}.type and {name}.rope_type disagree")
    known = {"rope_type", "type", "rope_theta", "partial_rotary_factor"}
    if not same_value(values.get("partial_rotary_factor", 1.0), 1.0):
        findings.unsupported.append(f"{name}.partial_rotary_factor")
    if kind == "default":
        extra = sorted(values.keys() - known)
        findings.unmapped.extend(f"{name}.{key}" for key in extra)
        return RopeSpec(rotary_base=base)
    if kind != "llama3":
        findings.unsupported.append(f"{name}.rope_type={kind!r}")
        return RopeSpec(rotary_base=base)
    findings.unmapped.extend(
        f"{name}.{key}" for key in sorted(values.keys() - known - {*_LLAMA3_VALUES})
    )
    bad = [key for key in _LLAMA3_VALUES if not is_number(values.get(key))]
    findings.inconsistent.extend(f"{name}.{key} must be given as a number" for key in bad)
    original = values.get("original_max_position_embeddings")
    if is_number(original) and original != int(original):
        findings.inconsistent.append(f"{name}.original_max_position_embeddings must be an integer")
    if bad:
        return RopeSpec(rotary_base=base)
    try:
        scaling = Llama3Scaling(
            factor=float(values["factor"]),
            low_freq_factor=float(values["low_freq_factor"]),
            high_freq_factor=float(values["high_freq_factor"]),
            original_max_position_embeddings=int(values["original_max_position_embeddings"]),
        )
    except InconsistentConfigError as error:
        findings.inconsistent.append(error.message)
        return RopeSpec(rotary_base=base)
    return RopeSpec(rotary_base=base, scaling=scaling)
