"""The smallest model that still fails: fewer blocks, fewer ranks, smaller sizes, plainer values.

Hypothesis shrinks the choices behind a draw; this shrinks the model itself, so it works on any
configuration and spends its tries, each of which runs real ranks, on what a reader wants gone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from bridge.errors import BridgeError
from bridge.spec import (
    BlockSpec,
    GroupedQueryAttention,
    ModelSpec,
    NoOp,
    ParallelLayout,
    SwiGLU,
)
from harness.config_forms import WIDTH_STEP, write_config
from harness.errors import SuiteError
from harness.layouts import runs
from harness.replay import Replay, save_replay
from harness.samples import Sample, spell

DEFAULT_TRIES: Final = 200
_LEAST_VOCAB: Final = 3
_LEAST_POSITIONS: Final = 2048

Fails = Callable[[Sample], bool]
_Cut = tuple[ModelSpec, ParallelLayout]
_Pass = Callable[[ModelSpec, ParallelLayout], Iterator[_Cut]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Shrunk:
    """What is left, and how many smaller models were tried on the way."""

    sample: Sample
    tries: int


def shrink(sample: Sample, fails: Fails, *, max_tries: int = DEFAULT_TRIES) -> Shrunk:
    """Make a failing sample as small as it gets while it goes on failing.

    Args:
        sample: It must fail.
        fails: Whether a sample shows the failure in question; one that cannot be run does not.
        max_tries: Calls of `fails` at most; what was reached by then is the answer.

    Raises:
        SuiteError: HN101, the sample does not fail, so nothing can be held on to.
    """
    if not fails(sample):
        raise SuiteError("the sample does not fail when it is run again", where=sample.describe())
    current, tries = sample, 0
    seen = {_key(sample)}
    changed = True
    while changed:
        changed = False
        for one in _PASSES:
            smaller = True
            while smaller:
                smaller = False
                for candidate in _candidates(current, one):
                    if _key(candidate) in seen:
                        continue
                    if tries == max_tries:
                        return Shrunk(sample=current, tries=tries)
                    seen.add(_key(candidate))
                    tries += 1
                    if fails(candidate):
                        current, smaller, changed = candidate, True, True
                        break
    return Shrunk(sample=current, tries=tries)


def report(shrunk: Sample, directory: Path, replay: Replay, *, summary: str = "") -> str:
    """Write the smallest failing model down; the command that runs it again."""
    layout = None if replay.layout is None else shrunk.layout
    return save_replay(
        directory,
        shrunk.config,
        replace(replay, layout=layout, seed=shrunk.seed),
        summary=summary,
    )


def _key(sample: Sample) -> tuple[object, ...]:
    return sample.spec, sample.layout


def _candidates(sample: Sample, one: _Pass) -> Iterator[Sample]:
    """The valid smaller samples of one pass."""
    stated = "head_dim" in sample.config
    for spec, layout in one(sample.spec, sample.parallel_layout):
        if _sayable(spec, sample.schema, stated_head_dim=stated) and runs(spec, spell(layout)):
            config: dict[str, Any] = write_config(
                spec,
                schema=sample.schema,
                rope_style=sample.rope_style,
                state_head_dim=stated,
            )
            yield replace(sample, config=config, spec=spec, layout=spell(layout))


def _sayable(spec: ModelSpec, schema: str | None, *, stated_head_dim: bool) -> bool:
    """Whether the sample's own form of configuration can state this model."""
    if not stated_head_dim and spec.hidden_size != spec.num_attention_heads * spec.kv_channels:
        return False
    widths = [b.ffn.ffn_hidden_size for b in spec.blocks if isinstance(b.ffn, SwiGLU)]
    return schema != "released" or all(width % WIDTH_STEP == 0 for width in widths)


def _fewer_blocks(spec: ModelSpec, layout: ParallelLayout) -> Iterator[_Cut]:
    """Without a stretch of blocks: long ones first."""
    size = spec.num_layers // 2 or 1
    while size and spec.num_layers > 1:
        for start in range(spec.num_layers - size + 1):
            gone = range(start, start + size)
            blocks = tuple(b for i, b in enumerate(spec.blocks) if i not in gone)
            stages = tuple(
                sum(layer not in gone for layer in stage.layers) for stage in layout.stages()
            )
            yield replace(spec, blocks=blocks), replace(layout, num_layers_per_stage=stages)
        size //= 2


def _fewer_ranks(spec: ModelSpec, layout: ParallelLayout) -> Iterator[_Cut]:
    """On one rank; with less TP; with fewer stages; without virtual ones."""
    whole = (spec.num_layers,)
    tp, stages = layout.tensor_model_parallel_size, layout.num_layers_per_stage
    one_stage = replace(
        layout,
        pipeline_model_parallel_size=1,
        virtual_pipeline_model_parallel_size=None,
        num_layers_per_stage=whole,
    )
    yield spec, replace(one_stage, tensor_model_parallel_size=1, sequence_parallel=False)
    for smaller in (n for n in (1, 2, 4) if n < tp):
        yield (
            spec,
            replace(
                layout,
                tensor_model_parallel_size=smaller,
                sequence_parallel=layout.sequence_parallel and smaller > 1,
            ),
        )
    yield spec, one_stage
    for pp in range(2, len(stages)):
        for start in range(len(stages) - pp + 1):
            merged = (*stages[:start], sum(stages[start : len(stages) - pp + start + 1]))
            merged += stages[len(stages) - pp + start + 1 :]
            yield (
                spec,
                replace(
                    layout,
                    pipeline_model_parallel_size=pp,
                    virtual_pipeline_model_parallel_size=None,
                    num_layers_per_stage=merged,
                ),
            )
    yield spec, replace(layout, sequence_parallel=False)


def _plainer_kinds(spec: ModelSpec, layout: ParallelLayout) -> Iterator[_Cut]:
    """A no-op for any sub-block that does something."""
    if not spec.heterogeneous_block_specs:
        return
    for index, block in enumerate(spec.blocks):
        for smaller in (replace(block, attention=NoOp()), replace(block, ffn=NoOp())):
            if smaller != block:
                yield _with_block(spec, index, smaller), layout


def _fewer_groups(spec: ModelSpec, layout: ParallelLayout) -> Iterator[_Cut]:
    for index, block in _distinct_blocks(spec):
        if isinstance(block.attention, GroupedQueryAttention):
            for groups in range(1, block.attention.num_query_groups):
                if spec.num_attention_heads % groups == 0:
                    attention = GroupedQueryAttention(num_query_groups=groups)
                    yield _with_block(spec, index, replace(block, attention=attention)), layout


def _narrower(spec: ModelSpec, layout: ParallelLayout) -> Iterator[_Cut]:
    for index, block in _distinct_blocks(spec):
        if isinstance(block.ffn, SwiGLU):
            for width in _smaller(block.ffn.ffn_hidden_size, (1, 2, 3, 4, 8, WIDTH_STEP)):
                ffn = SwiGLU(ffn_hidden_size=width)
                yield _with_block(spec, index, replace(block, ffn=ffn)), layout


def _smaller_heads(spec: ModelSpec, layout: ParallelLayout) -> Iterator[_Cut]:
    """Fewer heads, smaller heads, a smaller hidden size; the last follows where it must."""
    for heads in range(1, spec.num_attention_heads):
        fewer = _with(spec, num_attention_heads=heads)
        if fewer is not None:
            yield from _both_sizes(spec, fewer, layout)
    for channels in _smaller(spec.kv_channels, (2, 4, 8)):
        smaller = _with(spec, kv_channels=channels)
        if channels % 2 == 0 and smaller is not None:
            yield from _both_sizes(spec, smaller, layout)
    for hidden in _smaller(spec.hidden_size, (1, 2, 4, 8)):
        changed = _with(spec, hidden_size=hidden)
        if changed is not None:
            yield changed, layout


def _both_sizes(before: ModelSpec, spec: ModelSpec, layout: ParallelLayout) -> Iterator[_Cut]:
    tied = _with(spec, hidden_size=spec.num_attention_heads * spec.kv_channels)
    if tied is not None and tied.hidden_size <= before.hidden_size:
        yield tied, layout
    yield spec, layout


def _plainer_rest(spec: ModelSpec, layout: ParallelLayout) -> Iterator[_Cut]:
    for vocab in _smaller(spec.vocab_size, (_LEAST_VOCAB, 8, 64)):
        if vocab >= _LEAST_VOCAB:
            yield replace(spec, vocab_size=vocab), layout
    if spec.rope.scaling is not None:
        yield replace(spec, rope=replace(spec.rope, scaling=None)), layout
    if spec.max_position_embeddings > _LEAST_POSITIONS:
        yield replace(spec, max_position_embeddings=_LEAST_POSITIONS), layout


_PASSES: Final[tuple[_Pass, ...]] = (
    _fewer_blocks,
    _fewer_ranks,
    _plainer_kinds,
    _fewer_groups,
    _narrower,
    _smaller_heads,
    _plainer_rest,
)


def _smaller(value: int, least: tuple[int, ...]) -> list[int]:
    """The least values below this one, then its halves."""
    halves = [value // 2] if value % 2 == 0 else [value - 1]
    return sorted({n for n in (*least, *halves) if 0 < n < value})


def _distinct_blocks(spec: ModelSpec) -> Iterator[tuple[int | None, BlockSpec]]:
    """Each block and its place; a homogeneous model has one, in every place."""
    if spec.heterogeneous_block_specs:
        yield from enumerate(spec.blocks)
    else:
        yield None, spec.blocks[0]


def _with_block(spec: ModelSpec, index: int | None, block: BlockSpec) -> ModelSpec:
    return replace(
        spec, blocks=tuple(block if index in (None, i) else b for i, b in enumerate(spec.blocks))
    )


def _with(spec: ModelSpec, **changes: Any) -> ModelSpec | None:  # noqa: ANN401 - fields of the spec
    """The model with other sizes; None where they contradict one another."""
    try:
        return replace(spec, **changes)
    except BridgeError:
        return None
