"""The configuration of a DeciLM model, every field of its `config.json` kept as it was written.

transformers rewrites configurations: it renames `rope_scaling` and `torch_dtype`, drops keys that
equal a default, adds its own. A reader of another version then silently takes other values. This
class gives back what it was given, changed only where somebody changed an attribute.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping
from typing import Final, cast

import torch
from transformers import PretrainedConfig

from bridge.spec import ModelSpec

_DEFAULTS: Final[Mapping[str, object]] = {
    "attention_dropout": 0.0,
    "block_configs": None,
    "bos_token_id": None,
    "eos_token_id": None,
    "initializer_range": 0.02,
    "pad_token_id": None,
    "tie_word_embeddings": False,
    "use_cache": True,
}
"""Attributes that the machinery of transformers reads, and which a `config.json` may leave out."""

_DEFAULT_ROPE_THETA: Final = 10000.0
_ROPE_KEYS: Final = ("rope_parameters", "rope_scaling", "rope_theta")
_DTYPE_KEYS: Final = ("torch_dtype", "dtype")
_DTYPE_ATTRIBUTE: Final = (
    "dtype"  # from transformers 4.56 on
    if isinstance(getattr(PretrainedConfig, "torch_dtype", None), property)
    else "torch_dtype"
)
_CALL_ARGUMENTS: Final = frozenset(
    {
        "_commit_hash",
        "_from_auto",
        "attn_implementation",
        "experts_implementation",
        "name_or_path",
        "trust_remote_code",
    }
)
"""What `from_pretrained` mixes into the fields: arguments of the call, not of the model."""

_WRITTEN_BY: Final = frozenset({"_name_or_path", "model_type", "transformers_version"})
"""Fields that say who wrote the file; transformers overwrites the attributes on every load."""


class DeciLMConfig(PretrainedConfig):  # type: ignore[misc]  # transformers is not typed for mypy
    """A DeciLM (`nemotron-nas`) configuration.

    All arguments are fields of `config.json` and become attributes. RoPE is one attribute in
    every version of transformers, `rope_parameters`, holding `rope_theta` too; `rope_theta` and
    `rope_scaling` are views of it.

    Attributes:
        spec: What the fields mean, by the one parser the bridge has.
    """

    model_type = "nemotron-nas"
    keys_to_ignore_at_inference = ("past_key_values",)
    has_no_defaults_at_init = True

    def __init__(self, **kwargs: object) -> None:
        source = {key: value for key, value in kwargs.items() if key not in _CALL_ARGUMENTS}
        self._carried_fields: frozenset[str] = frozenset()
        dtypes = [source.pop(key) for key in ("dtype", "torch_dtype") if key in source]
        self._dtype_key = next((key for key in _DTYPE_KEYS if key in kwargs), "torch_dtype")
        if dtypes:  # a dtype argument of the call outranks the file's torch_dtype
            source[self._dtype_key] = next((d for d in dtypes if d is not None), None)
        self._source = {
            key: _dtype_name(value) if key in _DTYPE_KEYS else copy.deepcopy(value)
            for key, value in source.items()
        }

        fields = {**_DEFAULTS, **copy.deepcopy(kwargs)}
        for key in (*_ROPE_KEYS, *_DTYPE_KEYS):
            fields.pop(key, None)
        if fields.get("num_hidden_layers") is None and isinstance(fields["block_configs"], list):
            fields["num_hidden_layers"] = len(fields["block_configs"])
        super().__init__(**{_DTYPE_ATTRIBUTE: self._source.get(self._dtype_key)}, **fields)
        # Which of these the base class takes, and which it only sets when they are given, changes
        # from version to version.
        for key, value in _DEFAULTS.items():
            setattr(self, key, fields.get(key, value))
        self.rope_parameters = _merged_rope(source)
        self._as_loaded = self._snapshot()

    def carry_fields(self, names: Collection[str]) -> None:
        """Let these unknown fields through unread, by the caller's word."""
        self._carried_fields = frozenset(names)

    @property
    def rope_theta(self) -> object:
        """The base of the rotary frequencies."""
        return self.rope_parameters["rope_theta"]

    @rope_theta.setter
    def rope_theta(self, value: object) -> None:
        self.rope_parameters["rope_theta"] = value

    @property
    def rope_scaling(self) -> dict[str, object]:
        """`rope_parameters`, as in transformers 5."""
        return self.rope_parameters

    @rope_scaling.setter
    def rope_scaling(self, value: Mapping[str, object] | None) -> None:
        self.rope_parameters = {"rope_theta": self.rope_theta, **(value or {})}

    @property
    def spec(self) -> ModelSpec:
        """What the fields say, parsed afresh: changed attributes count.

        Raises:
            ConfigError: BR1xx, a field that is unknown, contradicts another, or that no
                implementation of ours honours (biases, windows, another activation, ...).
        """
        from bridge.hf_config import spec_from_hf_config

        # A bare DeciLMModel saves its own name as the architecture.
        return spec_from_hf_config(
            {**self.to_diff_dict(), "architectures": ["DeciLMForCausalLM"]},
            carry=self._carried_fields,
        )

    def to_diff_dict(self) -> dict[str, object]:
        """What `save_pretrained` writes: the fields given, and whatever was changed since.

        Unchanged fields come back as they were written, nulls, key names, `transformers_version`
        and `_name_or_path` included.
        """
        current = self._snapshot()
        changed = {
            key: value
            for key, value in current.items()
            if key not in self._as_loaded or self._as_loaded[key] != value
        }
        written = copy.deepcopy(self._source)
        rope = cast("dict[str, object] | None", changed.pop("rope_parameters", None))
        if rope is not None:
            written.update(_split_rope(rope, as_one="rope_parameters" in written))
        if _DTYPE_ATTRIBUTE in changed:
            written[self._dtype_key] = changed.pop(_DTYPE_ATTRIBUTE)
        written.update({key: changed[key] for key in changed if key not in _WRITTEN_BY})
        written["model_type"] = self.model_type
        return written

    def to_dict(self) -> dict[str, object]:
        """Every attribute under its public name; the fields given as `to_diff_dict` has them."""
        attributes = self._snapshot()
        for key in ("rope_parameters", *_DTYPE_KEYS):
            attributes.pop(key, None)
        return {**attributes, **self.to_diff_dict()}

    def _snapshot(self) -> dict[str, object]:
        """A copy of the public attributes, dtypes by name."""
        attributes = {
            key: _dtype_name(value)
            for key, value in self.__dict__.items()
            if not key.startswith("_")
        }
        quantization = attributes.get("quantization_config")
        if hasattr(quantization, "to_dict"):
            attributes["quantization_config"] = quantization.to_dict()
        return copy.deepcopy(attributes)


def _dtype_name(value: object) -> object:
    return str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else value


def _merged_rope(source: Mapping[str, object]) -> dict[str, object]:
    """The RoPE fields in the form of transformers 5: one mapping, `rope_theta` inside."""
    values = source.get("rope_parameters") or source.get("rope_scaling") or {}
    values = dict(values) if isinstance(values, Mapping) else {}
    theta = values.get("rope_theta", source.get("rope_theta", _DEFAULT_ROPE_THETA))
    kind = values.get("rope_type", values.get("type", "default"))
    return {**copy.deepcopy(values), "rope_type": kind, "rope_theta": theta}


def _split_rope(rope: Mapping[str, object], *, as_one: bool) -> dict[str, object]:
    """The RoPE fields in the form of the file they came from, that of transformers 4 otherwise."""
    if as_one:
        return {"rope_parameters": dict(rope)}
    values = {key: value for key, value in rope.items() if key != "rope_theta"}
    plain = values.keys() <= {"rope_type"} and values.get("rope_type", "default") == "default"
    return {"rope_theta": rope["rope_theta"], "rope_scaling": None if plain else values}
