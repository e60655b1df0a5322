"""Configurations that the bridge understands in another way than they are meant."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, Final

from bridge.spec import (
    BlockSpec,
    GroupedQueryAttention,
    Linear,
    ModelSpec,
    NoOp,
    RopeSpec,
    SwiGLU,
)
from harness.faults import traits
from harness.faults.seams import Replaced
from harness.hooks import Fault


def scaling(field: str, value: float, other: float, spec: ModelSpec) -> ModelSpec:
    """One value of llama3 scaling is `value`, or `other` where it was that already."""
    if spec.rope.scaling is None:
        return spec
    wanted = other if getattr(spec.rope.scaling, field) == value else value
    changes: dict[str, Any] = {field: wanted}
    changed = dataclasses.replace(spec.rope.scaling, **changes)
    return dataclasses.replace(spec, rope=dataclasses.replace(spec.rope, scaling=changed))


def plain_rope(spec: ModelSpec) -> ModelSpec:
    """No scaling at all."""
    return dataclasses.replace(spec, rope=RopeSpec(rotary_base=spec.rope.rotary_base))


def theta(value: float, other: float, spec: ModelSpec) -> ModelSpec:
    """The base is `value`, or `other` where it was that already."""
    wanted = other if spec.rope.rotary_base == value else value
    return dataclasses.replace(spec, rope=dataclasses.replace(spec.rope, rotary_base=wanted))


def epsilon(value: float, other: float, spec: ModelSpec) -> ModelSpec:
    """The norm epsilon is `value`, or `other` where it was that already."""
    wanted = other if spec.layernorm_epsilon == value else value
    return dataclasses.replace(spec, layernorm_epsilon=wanted)


def untie(spec: ModelSpec) -> ModelSpec:
    """`tie_word_embeddings` the other way."""
    tied = spec.share_embeddings_and_output_weights
    return dataclasses.replace(spec, share_embeddings_and_output_weights=not tied)


def _blocks(spec: ModelSpec, change: Callable[[BlockSpec], BlockSpec]) -> ModelSpec:
    return dataclasses.replace(spec, blocks=tuple(map(change, spec.blocks)))


def _with_groups(groups: int, block: BlockSpec) -> BlockSpec:
    if not isinstance(block.attention, GroupedQueryAttention):
        return block
    return dataclasses.replace(block, attention=GroupedQueryAttention(num_query_groups=groups))


def groups_of_the_first(spec: ModelSpec) -> ModelSpec:
    """Every block has the groups of the first that has attention."""
    first = next(
        block.attention.num_query_groups
        for block in spec.blocks
        if isinstance(block.attention, GroupedQueryAttention)
    )
    return _blocks(spec, partial(_with_groups, first))


def groups_for_heads(spec: ModelSpec) -> ModelSpec:
    """`n_heads_in_group` taken for the number of groups."""

    def change(block: BlockSpec) -> BlockSpec:
        if not isinstance(block.attention, GroupedQueryAttention):
            return block
        return _with_groups(spec.num_attention_heads // block.attention.num_query_groups, block)

    return _blocks(spec, change)


def narrower(spec: ModelSpec) -> ModelSpec:
    """Widths rounded down where they are rounded up."""

    def change(block: BlockSpec) -> BlockSpec:
        if not isinstance(block.ffn, SwiGLU):
            return block
        width = max(4, block.ffn.ffn_hidden_size - 256)
        return dataclasses.replace(block, ffn=SwiGLU(ffn_hidden_size=width))

    return _blocks(spec, change)


def linear_for_no_op(spec: ModelSpec) -> ModelSpec:
    """A no-op attention read as a linear one."""

    def change(block: BlockSpec) -> BlockSpec:
        return (
            dataclasses.replace(block, attention=Linear()) if block.attention == NoOp() else block
        )

    return _blocks(spec, change)


def no_op_for_linear(spec: ModelSpec) -> ModelSpec:
    """`replace_with_linear` dropped: the sub-block is taken for a no-op."""

    def change(block: BlockSpec) -> BlockSpec:
        attention = NoOp() if block.attention == Linear() else block.attention
        ffn = NoOp() if block.ffn == Linear() else block.ffn
        return BlockSpec(attention=attention, ffn=ffn)

    return _blocks(spec, change)


def one_layer_less(spec: ModelSpec) -> ModelSpec:
    """`range(1, num_layers)`."""
    return dataclasses.replace(spec, blocks=spec.blocks[:-1])


def without_scaling(healthy: Callable[..., dict[str, Any]]) -> Callable[..., dict[str, Any]]:
    """A configuration written without `rope_scaling`."""

    def write(*args: Any, **kwargs: Any) -> dict[str, Any]:  # noqa: ANN401 - the function's own
        return healthy(*args, **kwargs) | {"rope_scaling": None}

    return write


def newer_keys_ignored(healthy: Callable[..., RopeSpec]) -> Callable[..., RopeSpec]:
    """A transformers 4 reader of a transformers 5 configuration: plain RoPE, theta 10000."""

    def read(config: dict[str, Any], findings: Any) -> RopeSpec:  # noqa: ANN401 - Findings
        if "rope_parameters" in config and "rope_scaling" not in config:
            return RopeSpec(rotary_base=10000.0)
        return healthy(config, findings)

    return read


def args_without_scaling(healthy: Callable[..., dict[str, Any]]) -> Callable[..., dict[str, Any]]:
    """`args` with three of RoPE's four values at Megatron's defaults: what its own flags say."""

    def write(*args: Any, **kwargs: Any) -> dict[str, Any]:  # noqa: ANN401 - the function's own
        found = healthy(*args, **kwargs)
        return found | {"rope_scaling_factor": 8.5} if "rope_scaling_factor" in found else found

    return write


_config = partial(Fault, family="configuration")

FAULTS: Final = (
    _config(name="rope-factor", stands_for="Super v1's RoPE factor for v1.5 and Ultra",
            applies=traits.is_scaled, spec=partial(scaling, "factor", 8.0, 16.0)),
    _config(name="rope-low-freq-factor", stands_for="low_freq_factor at another model's value",
            applies=traits.is_scaled, spec=partial(scaling, "low_freq_factor", 2.0, 1.0)),
    _config(name="rope-high-freq-factor", stands_for="high_freq_factor at another model's value",
            applies=traits.is_scaled, spec=partial(scaling, "high_freq_factor", 8.0, 4.0)),
    _config(name="rope-original-length", stands_for="the long context taken for the original one",
            applies=traits.is_scaled,
            spec=partial(scaling, "original_max_position_embeddings", 4096, 8192)),
    _config(name="rope-plain", stands_for="rope_scaling dropped: a transformers 5 file read by 4",
            applies=traits.is_scaled, spec=plain_rope),
    _config(name="rope-theta", stands_for="rope_theta at transformers' default of 10000",
            applies=traits.has_attention, spec=partial(theta, 10000.0, 500000.0)),
    _config(name="norm-eps", stands_for="rms_norm_eps at another framework's default of 1e-6",
            spec=partial(epsilon, 1e-6, 1e-5)),
    _config(name="tie-inverted", stands_for="tie_word_embeddings defaulting to the other value",
            spec=untie),
    _config(name="groups-of-first-block", stands_for="num_query_groups taken from block 0 for all",
            applies=traits.has_unequal_groups, spec=groups_of_the_first),
    _config(name="groups-for-group-size", stands_for="n_heads_in_group read as a number of groups",
            applies=traits.has_groups, spec=groups_for_heads),
    _config(name="ffn-width-rounded-down", stands_for="ffn_mult rounded down in place of up to 256",
            applies=traits.has_swiglu, spec=narrower),
    _config(name="no-op-read-as-linear", stands_for="no_op and replace_with_linear confused",
            applies=traits.has_no_op, spec=linear_for_no_op),
    _config(name="linear-read-as-no-op", stands_for="replace_with_linear silently dropped",
            applies=traits.has_linear, spec=no_op_for_linear),
    _config(name="last-layer-dropped", stands_for="a layer loop that is one short",
            spec=one_layer_less),
    _config(name="config-written-without-scaling",
            stands_for="an export that forgets rope_scaling",
            applies=traits.is_scaled,
            code=Replaced("bridge.hf_config", "hf_config_from_spec", without_scaling)),
    _config(name="rope-parameters-ignored",
            stands_for="transformers 5 keys read by a transformers 4 reader",
            code=Replaced("bridge.hf_config", "read_rope", newer_keys_ignored)),
    _config(name="args-with-other-scaling",
            stands_for="a checkpoint whose args say another RoPE factor than its weights need",
            applies=traits.is_scaled,
            code=Replaced("bridge.convert", "checkpoint_args", args_without_scaling)),
)  # fmt: skip
