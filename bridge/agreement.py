"""Do a configuration and a Megatron checkpoint's own `args` describe one model?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import zip_longest
from typing import Any, Final

from bridge.describe import block_label
from bridge.errors import InconsistentConfigError
from bridge.hf_fields import is_number
from bridge.megatron_args import spec_from_checkpoint_args
from bridge.spec import BlockSpec, ModelSpec, RopeSpec
from bridge.storage.megatron import MegatronSource

# Training may change these without changing what the weights mean.
_FREE: Final = frozenset({"params_dtype", "max_position_embeddings"})


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
    if wrong:
        raise InconsistentConfigError(
            "the configuration is not that of the checkpoint",
            where=wrong,
            hint="give the configuration of the model that was trained",
        )
