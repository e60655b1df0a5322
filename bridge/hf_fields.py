"""The fate of every configuration field, and typed access that gathers what is wrong."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, TypeGuard

from bridge.dtypes import dtype_named
from bridge.errors import (
    BridgeError,
    InconsistentConfigError,
    UnmappedFieldError,
    UnsupportedFieldError,
)

MAPPED: Final = frozenset(
    {
        "architectures", "model_type", "hidden_size", "num_attention_heads", "num_key_value_heads",
        "head_dim", "intermediate_size", "num_hidden_layers", "vocab_size",
        "max_position_embeddings", "rms_norm_eps", "rope_theta", "rope_scaling", "rope_parameters",
        "tie_word_embeddings", "torch_dtype", "dtype", "block_configs",
    }
)  # fmt: skip

# What Megatron's GPTModel computes, or what an absent field means. Anything else is refused.
FIXED: Final[Mapping[str, tuple[object, ...]]] = {
    "hidden_act": ("silu", None),
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "attention_dropout": (0.0, None),
    "pretraining_tp": (1, None),
    "partial_rotary_factor": (1.0, None),
    "rope_interleaved": (False, None),
    "sliding_window": (None,),
    "use_sliding_window": (False, None),
    "attention_chunk_size": (None,),
    "num_experts": (None,),
    "num_local_experts": (None, 0),
    "logit_scale": (None, 1.0),
    "embedding_multiplier": (None, 1.0),
    "residual_multiplier": (None, 1.0),
    "final_logit_softcapping": (None,),
    "attn_logit_softcapping": (None,),
    "quantization_config": (None,),
    "is_encoder_decoder": (False, None),
    "add_cross_attention": (False, None),
    "cross_attention_hidden_size": (None,),
    "is_decoder": (False, True, None),
    "pruned_heads": ({}, None),
    "tie_encoder_decoder": (False, None),
    "use_qk_norm": (False, None),
    "torchscript": (False, None),
    "use_bfloat16": (False, None),
    "chunk_size_feed_forward": (0, None),
}

_MAX_LABELS: Final = 100_000

CARRIED: Final = frozenset(
    {
        "_name_or_path", "auto_map", "bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id",
        "unk_token_id", "decoder_start_token_id", "initializer_range", "transformers_version",
        "use_cache", "return_dict", "output_hidden_states", "output_attentions", "id2label",
        "label2id", "num_labels", "problem_type", "task_specific_params", "finetuning_task",
        "tokenizer_class", "prefix", "max_length", "min_length", "do_sample", "early_stopping",
        "num_beams", "num_beam_groups", "diversity_penalty", "temperature", "top_k", "top_p",
        "typical_p", "repetition_penalty", "length_penalty", "no_repeat_ngram_size",
        "encoder_no_repeat_ngram_size", "bad_words_ids", "num_return_sequences", "output_scores",
        "return_dict_in_generate", "forced_bos_token_id", "forced_eos_token_id", "suppress_tokens",
        "begin_suppress_tokens", "exponential_decay_length_penalty", "remove_invalid_values",
        "tf_legacy_loss", "_attn_implementation_autoset", "architectures_list",
        "attn_implementation", "_attn_implementation", "unsloth_version", "base_model_tp_plan",
        "base_model_pp_plan",
    }
)  # fmt: skip


@dataclass(slots=True)
class Findings:
    """Everything wrong with one configuration, gathered before anything is raised."""

    unmapped: list[str] = field(default_factory=list)
    unsupported: list[str] = field(default_factory=list)
    inconsistent: list[str] = field(default_factory=list)

    def raise_if_any(self, where: str) -> None:
        """Raise one error that lists every offender; the class is that of the gravest kind."""
        groups = (
            (UnsupportedFieldError, "not supported", self.unsupported),
            (InconsistentConfigError, "missing or contradictory", self.inconsistent),
            (UnmappedFieldError, "not known to the bridge", self.unmapped),
        )
        kinds = [(kind, what, found) for kind, what, found in groups if found]
        if not kinds:
            return
        places = [f"{where}: {entry} ({what})" for _, what, found in kinds for entry in found]
        hint = None
        if any("." not in name for name in self.unmapped):
            hint = (
                "a top-level field that does not change the computation can be let through by name "
                "with --carry-field; the others describe another model"
            )
        count = len(places)
        raise kinds[0][0](
            f"{count} field{'s' if count > 1 else ''} of the configuration cannot be honoured",
            where=places,
            hint=hint,
        )


def check_fates(config: Mapping[str, Any], carry: Collection[str], findings: Findings) -> None:
    """Sort every top-level field by its fate."""
    for name, value in config.items():
        if name in FIXED:
            if not any(same_value(value, allowed) for allowed in FIXED[name]):
                findings.unsupported.append(f"{name}={value!r}")
        elif name == "layer_types":
            kinds = value if isinstance(value, list) else [] if value is None else [value]
            odd = sorted({str(kind) for kind in kinds} - {"full_attention"})
            if odd:
                findings.unsupported.append(f"layer_types holds {', '.join(odd)}")
            elif kinds and len(kinds) != config.get("num_hidden_layers"):
                findings.inconsistent.append(f"layer_types has {len(kinds)} entries")
        elif name not in MAPPED and name not in CARRIED and name not in carry:
            findings.unmapped.append(name)
    _check_carried(config, findings)


def _check_carried(config: Mapping[str, Any], findings: Findings) -> None:
    """Of the fields that are carried, see to those that transformers builds something of."""

    def wrong(name: str, what: str) -> None:
        findings.inconsistent.append(f"{name}={config[name]!r:.99} {what}")

    labels = config.get("num_labels")
    if labels is not None and (type(labels) is not int or not 0 <= labels <= _MAX_LABELS):
        wrong("num_labels", f"must be at most {_MAX_LABELS}")
    for name in ("id2label", "label2id", "auto_map", "task_specific_params"):
        value = config.get(name)
        if value is not None and not isinstance(value, dict):
            wrong(name, "must be an object")
    auto_map = config.get("auto_map")
    if isinstance(auto_map, dict) and not all(map(_is_class_name, auto_map.values())):
        wrong("auto_map", "must name classes")
    padding, size = config.get("pad_token_id"), config.get("vocab_size")
    is_token = type(size) is not int or (type(padding) is int and -size <= padding < size)
    if padding is not None and not is_token:
        wrong("pad_token_id", "must be a token id")


def _is_class_name(value: object) -> bool:
    return isinstance(value, str) or (
        isinstance(value, list) and all(one is None or isinstance(one, str) for one in value)
    )


def same_value(value: object, allowed: object) -> bool:
    """Equality as JSON means it."""
    # bool is an int in Python: `true` must not pass where 1 is meant, nor 0.0 for false.
    if isinstance(value, bool) or isinstance(allowed, bool):
        return value is allowed
    return value == allowed


@dataclass(slots=True)
class FieldReader:
    """Typed access to top-level fields; problems go to `findings`, a stand-in comes back."""

    config: Mapping[str, Any]
    findings: Findings

    def count(self, name: str, *, default: Callable[[], int] | None = None) -> int:
        """A positive integer, bounded so that no later arithmetic can explode."""
        value = self.config.get(name)
        if value is None and default is not None:
            return default()
        if isinstance(value, bool) or not isinstance(value, int) or not 0 < value < 2**40:
            self.findings.inconsistent.append(f"{name}={value!r} must be a positive integer")
            return 1
        return value

    def number(self, name: str) -> float:
        """A finite number."""
        value = self.config.get(name)
        if not is_number(value):
            self.findings.inconsistent.append(f"{name}={value!r} must be a number")
            return 1e-5
        return float(value)

    def flag(self, name: str) -> bool:
        """A truth value; absent is false."""
        value = self.config.get(name, False)
        if not isinstance(value, bool):
            self.findings.inconsistent.append(f"{name}={value!r} must be true or false")
            return False
        return value

    def dtype(self) -> str:
        """The dtype under either of its keys, as torch names it."""
        names = {
            name: self.config[name]
            for name in ("torch_dtype", "dtype")
            if self.config.get(name) is not None
        }
        if len(set(map(str, names.values()))) > 1:
            self.findings.inconsistent.append("torch_dtype and dtype disagree")
        if not names:
            return "float32"  # what transformers 4 loads when a configuration names none
        try:
            dtype = dtype_named(str(next(iter(names.values()))))
        except BridgeError as error:
            self.findings.unsupported.append(error.message)
            return "float32"
        if not dtype.is_floating:
            self.findings.unsupported.append(f"{next(iter(names))}={dtype.name!r}")
        return dtype.name


def is_number(value: object) -> TypeGuard[float]:
    """A finite JSON number, within the range of a float; `true` is not one."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return math.isfinite(value) if isinstance(value, float) else abs(value) < 2**1023
