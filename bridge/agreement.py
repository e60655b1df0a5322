"""Which model a Megatron checkpoint holds: do a configuration and its own `args` agree?"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from itertools import zip_longest
from typing import Any, Final, TypeGuard

from bridge.describe import block_label
from bridge.errors import ConfigError, InconsistentConfigError
from bridge.hf_config import config_file, load_hf_config, spec_from_hf_config
from bridge.hf_fields import is_number
from bridge.megatron_args import spec_from_checkpoint_args
from bridge.record import SIDE_DIRECTORY, read_record
from bridge.spec import BlockSpec, ModelSpec, RopeSpec
from bridge.storage.megatron import MegatronSource
from bridge.storage.remote import Location

# Training may change these without changing what the weights mean.
_FREE: Final = frozenset({"params_dtype", "max_position_embeddings"})
_TP_WITHIN_A_NODE: Final = (1, 2, 4, 8)


def spec_of_args(source: MegatronSource, spec: ModelSpec) -> ModelSpec | None:
    """The model that a checkpoint's `args` describe, None when it has none.

    What most training runs do not record (the exact vocabulary size, whether RoPE is scaled) is
    taken from `spec`; whatever the args do say is theirs.

    Raises:
        ConfigError: BR1xx, args of another architecture, or contradictory ones.
    """
    args = source.args
    if args is None:
        return None
    return spec_from_checkpoint_args(
        args,
        vocab_size=spec.vocab_size if args.get("vocab_size") is None else None,
        rope=_rope_of_args(args, spec) if args.get("use_rope_scaling") is None else None,
        where=source.args_where,
    )


def _rope_of_args(args: Mapping[str, Any], spec: ModelSpec) -> RopeSpec:
    """The scaling is the configuration's; a base that the args state is theirs."""
    base = args.get("rotary_base")
    return replace(spec.rope, rotary_base=float(base)) if is_number(base) else spec.rope


def spec_differences(
    ours: ModelSpec,
    theirs: ModelSpec,
    *,
    names: tuple[str, str],
    free: Sequence[str] | frozenset[str] = _FREE,
) -> list[str]:
    """Every field and every block in which two models differ, one line each.

    Args:
        ours: One model.
        theirs: The other.
        names: What to call them.
        free: Fields that may differ.
    """
    wrong = [
        f"{name}: {getattr(ours, name)} in {names[0]}, {getattr(theirs, name)} in {names[1]}"
        for name in ModelSpec.__dataclass_fields__
        if name not in free and name != "blocks" and getattr(ours, name) != getattr(theirs, name)
    ]
    pairs = enumerate(zip_longest(ours.blocks, theirs.blocks))
    return wrong + [
        f"block {layer_idx}: {_block(one)} in {names[0]}, {_block(other)} in {names[1]}"
        for layer_idx, (one, other) in pairs
        if one != other
    ]


def _block(block: BlockSpec | None) -> str:
    if block is None:
        return "none"
    attention, ffn = (label.replace("-", "nothing") for label in block_label(block))
    return f"attention {attention} and FFN {ffn}"


def check_agreement(source: MegatronSource, spec: ModelSpec, *, where: str) -> None:
    """Refuse a configuration that is not that of the checkpoint.

    Args:
        source: The checkpoint.
        spec: The model of the configuration.
        where: The configuration, for the error.

    Raises:
        InconsistentConfigError: BR104, every difference at once.
    """
    said = spec_of_args(source, spec)
    if said is None:
        return
    wrong = spec_differences(spec, said, names=(where, "the checkpoint"))
    wrong += _padded_too_far(source.args or {}, spec.vocab_size, where)
    if wrong:
        raise InconsistentConfigError(
            "the configuration is not that of the checkpoint",
            where=wrong,
            hint="give the configuration of the model that was trained",
        )


def _padded_too_far(args: Mapping[str, Any], vocab_size: int, where: str) -> list[str]:
    """Say that no run pads a vocabulary of this size so far, where the args hold only the padded.

    Training that began with an import keeps the size to which that was padded, perhaps for
    another TP than its own: those within a node are tried as well.
    """
    padded, divisor, tp = (
        args.get(name)
        for name in (
            "padded_vocab_size",
            "make_vocab_size_divisible_by",
            "tensor_model_parallel_size",
        )
    )
    told = args.get("vocab_size") is None and _is_count(padded)
    if not (told and _is_count(divisor) and _is_count(tp)):
        return []
    sizes = (divisor * one for one in {*_TP_WITHIN_A_NODE, tp})
    if any(-(-vocab_size // size) * size == padded for size in sizes):
        return []
    wrong = (
        f"vocab_size: {vocab_size} in {where}, padded to {padded} in the checkpoint, which "
        f"make_vocab_size_divisible_by={divisor} does not make of it"
    )
    return [wrong]


def _is_count(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def described_model(
    source: MegatronSource, hf_model: Location | None = None, *, carry: Collection[str] = ()
) -> tuple[ModelSpec, Location | None]:
    """The model of a Megatron checkpoint: by `hf_model`, the record of its import, or its args.

    A configuration says more than args do, yet where both say something they must agree.

    Args:
        source: The checkpoint.
        hf_model: Directory or `config.json` of the original model.
        carry: Unknown fields of the configuration to let through, besides those that the import
            let through.

    Returns:
        The model, and where its configuration is: `hf_model`, what the import kept, or None.

    Raises:
        ConfigError: BR100, none of them is there; BR103 or BR104, the args are of another model.
    """
    found = hf_model
    if found is None and (kept := source.root / SIDE_DIRECTORY).is_dir():
        found = kept
        record = read_record(source.root)
        carry = {*carry, *(record.carried_fields if record is not None else ())}
    if found is not None:
        spec = spec_from_hf_config(
            load_hf_config(found), where=str(config_file(found)), carry=carry
        )
        check_agreement(source, spec, where=str(found))
        return spec, found
    if source.args is None:
        raise ConfigError(
            "the checkpoint says nothing of its model: common.pt holds no args",
            where=str(source.root),
            hint="pass --hf-model with the directory or config.json of the original model",
        )
    return spec_from_checkpoint_args(source.args, where=source.args_where), None
