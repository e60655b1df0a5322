"""A failing model gets as small as it can while it fails, and is left with its command."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bridge.hf_config import spec_from_hf_config
from bridge.spec import (
    BlockSpec,
    GroupedQueryAttention,
    Linear,
    ModelSpec,
    NoOp,
    RopeSpec,
    SwiGLU,
)
from harness.bench import Bench
from harness.config_forms import write_config
from harness.errors import SuiteError
from harness.faults import fault_named
from harness.replay import Replay, load_replay, replay_on, run_replay
from harness.samples import Sample
from harness.shrink import report, shrink


def groups_of(sample: Sample) -> list[int]:
    """Query groups of each block that has attention."""
    return [
        block.attention.num_query_groups
        for block in sample.spec.blocks
        if isinstance(block.attention, GroupedQueryAttention)
    ]


def large(schema: str | None, layout: str = "tp2-pp1") -> Sample:
    """Three layers, two query groups, everything larger than it needs to be."""
    block = BlockSpec(
        attention=GroupedQueryAttention(num_query_groups=2), ffn=SwiGLU(ffn_hidden_size=512)
    )
    other = BlockSpec(attention=NoOp(), ffn=Linear())
    spec = ModelSpec(
        hidden_size=16,
        num_attention_heads=4,
        kv_channels=4,
        vocab_size=131,
        max_position_embeddings=8192,
        layernorm_epsilon=1e-5,
        rope=RopeSpec(rotary_base=10000.0, scaling=None),
        share_embeddings_and_output_weights=False,
        params_dtype="float32",
        blocks=(block, block, block) if schema is None else (other, block, other),
        heterogeneous_block_specs=schema is not None,
    )
    config = write_config(
        spec, schema=schema, rope_style="transformers-4", state_head_dim=schema == "2025-11"
    )
    return Sample(
        config=config, spec=spec, schema=schema, rope_style="transformers-4", layout=layout
    )


def test_what_needs_two_groups_becomes_one_block_of_two_heads() -> None:
    """One attention, two groups, nothing else, on one rank."""
    found = shrink(large("2025-11"), lambda one: max(groups_of(one), default=0) > 1).sample
    spec = found.spec
    block = BlockSpec(attention=GroupedQueryAttention(num_query_groups=2), ffn=NoOp())
    assert spec.blocks == (block,)
    assert (spec.num_attention_heads, spec.kv_channels, spec.hidden_size) == (2, 2, 1)
    assert (spec.vocab_size, spec.rope.scaling, found.layout) == (3, None, "tp1-pp1")
    assert spec_from_hf_config(dict(found.config)) == spec


def test_a_model_stays_what_its_schema_can_say() -> None:
    """`ffn_mult` has no widths but multiples of 256, and a Llama no other blocks."""

    def has_ffn(sample: Sample) -> bool:
        return any(isinstance(block.ffn, SwiGLU) for block in sample.spec.blocks)

    for schema, width in ((None, 1), ("released", 256)):
        found = shrink(large(schema), has_ffn).sample
        assert spec_from_hf_config(dict(found.config)) == found.spec
        (block,) = found.spec.blocks
        assert block.ffn == SwiGLU(ffn_hidden_size=width)


def test_a_failure_of_two_stages_keeps_two_stages() -> None:
    """Ranks are dropped only as far as the failure lets them."""
    sample = large("puzzletron", "tp1-pp3-l1.1.1")
    found = shrink(sample, lambda one: one.parallel_layout.pipeline_model_parallel_size > 1).sample
    assert found.parallel_layout.pipeline_model_parallel_size == 2
    assert found.spec.num_layers == 1


def test_tries_are_limited_and_a_sample_that_passes_is_refused() -> None:
    """What was reached by then is the answer; nothing to shrink is an error."""
    tried: list[Sample] = []

    def fails(sample: Sample) -> bool:
        tried.append(sample)
        return True

    assert shrink(large("2025-11"), fails, max_tries=3).tries == 3
    assert len(tried) == 1 + 3
    with pytest.raises(SuiteError, match="HN101"):
        shrink(large("2025-11"), lambda _one: False)


@pytest.mark.ranks
def test_a_swapped_key_head_is_shrunk_and_replayed(tmp_path: Path) -> None:
    """A real fault: found by placement on ranks, shrunk, read back and seen again."""
    (tmp_path / "work").mkdir()
    with Bench(tmp_path / "work", fault=fault_named("k-heads-swapped"), timeout=120) as bench:

        def fails(sample: Sample) -> bool:
            replay = replay_on(sample.layout, "placement", seed=sample.seed)
            return run_replay(sample.config, replay, bench).status == "failed"

        start = large("2025-11")
        small = shrink(start, fails, max_tries=40).sample
        assert small.spec.num_layers == 1
        assert groups_of(small) == [2]
        replay = replay_on(small.layout, "placement", seed=small.seed)
        command = report(small, tmp_path / "found", replay)
        assert command == f"nemotron-bridge replay {tmp_path / 'found'}"
        config, again = load_replay(tmp_path / "found")
        assert run_replay(config, again, bench).status == "failed"
    with Bench(tmp_path / "work", timeout=120) as healthy:
        assert run_replay(config, again, healthy).status == "passed"


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"schema_version": 2}, "schema_version must be 1"),
        ({"check": "logitz"}, "no check is called 'logitz'"),
        ({"probe": None}, "logits needs a probe"),
        ({"seed": -1}, "seed=-1 is not a count"),
        ({"extra": 1}, "unexpected keyword argument 'extra'"),
    ],
)
def test_a_replay_that_makes_no_sense_is_refused(
    tmp_path: Path, change: dict[str, object], problem: str
) -> None:
    """One error that names the problem."""
    sample = large(None)
    report(sample, tmp_path, Replay(check="logits", layout="tp1-pp1", probe="long"))
    path = tmp_path / "replay.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(SuiteError) as caught:
        load_replay(tmp_path)
    assert problem in str(caught.value)
