"""Bytes per rank: published tables, figures by hand. test_model.py has the live ranks."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from bridge.activations import groups_per_rank, most_in_flight, saved_by_block
from bridge.convert import read_spec
from bridge.errors import UsageError
from bridge.memory import RankMemory, rank_memory
from bridge.pipeline import parse_layout
from bridge.spec import BlockSpec, GroupedQueryAttention, Linear, ModelSpec, NoOp
from bridge.workload import Workload

VARIANTS = Path(__file__).parents[2] / "suites" / "variants"


@pytest.fixture(scope="module")
def llama_70b() -> ModelSpec:
    """80 layers, 64 heads of 128 channels, 8 groups."""
    return read_spec(VARIANTS / "Llama-3.1-Nemotron-70B-Instruct-HF.json")


def only(spec: ModelSpec, layout: str, **work: object) -> RankMemory:
    """The memory of pipeline rank 0."""
    return rank_memory(spec, parse_layout(layout, spec), Workload(**work))[0]  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("dtype", "whole", "parts", "shared"),
    [("float16", 20, 4, 16), ("bfloat16", 18, 6, 12), ("float32", 16, 8, 8)],
)
def test_training_takes_the_bytes_of_megatrons_table(
    llama_70b: ModelSpec, dtype: str, whole: int, parts: int, shared: int
) -> None:
    """Megatron-Core, docs dist_optimizer: 20, 18, 16 bytes; 4 + 16/d, 6 + 12/d, 8 + 8/d."""

    def bytes_per_parameter(replicas: int, *, distributed: bool) -> float:
        found = only(
            llama_70b, "tp1-pp1", purpose="training", params_dtype=dtype,
            data_parallel_size=replicas, distributed_optimizer=distributed,
        )  # fmt: skip
        return (found.total - found.activations) / found.num_parameters

    assert bytes_per_parameter(4, distributed=False) == whole
    assert bytes_per_parameter(1, distributed=True) == whole
    assert bytes_per_parameter(4, distributed=True) == pytest.approx(parts + shared / 4, rel=1e-9)


def test_a_kv_cache_of_llama_70b_takes_320_kib_per_token(llama_70b: ModelSpec) -> None:
    """2 x 8 groups x 128 channels x 80 layers x 2 bytes; TP=16 has a copy of each group twice."""
    tokens = {"sequence_length": 1024, "micro_batch_size": 3}
    assert only(llama_70b, "tp1-pp1", **tokens).kv_cache == 3 * 1024 * 320 * 1024
    assert only(llama_70b, "tp8-pp1", **tokens).kv_cache == 3 * 1024 * 40 * 1024
    assert only(llama_70b, "tp16-pp1", **tokens).kv_cache == 3 * 1024 * 40 * 1024
    assert only(llama_70b, "tp1-pp4", **tokens).kv_cache == 3 * 1024 * 80 * 1024
    assert [groups_per_rank(*one) for one in ((8, 1), (8, 8), (8, 16), (4, 2))] == [8, 1, 1, 2]


def test_blocks_without_attention_have_no_cache() -> None:
    """Super-49B: 49 of 80 blocks have one; inference keeps no gradients and no optimizer."""
    spec = read_spec(VARIANTS / "Llama-3_3-Nemotron-Super-49B-v1.json")
    found = only(spec, "tp1-pp1", sequence_length=1)
    assert found.kv_cache == 49 * 2 * 8 * 128 * 2
    assert (found.gradients, found.optimizer) == (0, 0)
    assert found.total == found.weights + found.activations + found.kv_cache


def test_a_prompt_takes_the_widest_block_and_the_residual(llama_70b: ModelSpec) -> None:
    """3 hidden states and gate, up, product of 28672, in bfloat16; TP divides the latter."""
    assert only(llama_70b, "tp1-pp1", sequence_length=7).activations == 7 * 2 * 3 * (8192 + 28672)
    tp4 = only(llama_70b, "tp4-pp1", sequence_length=7).activations
    assert tp4 == 7 * 2 * 3 * (8192 + 28672 // 4)
    queries = dataclasses.replace(
        llama_70b,
        heterogeneous_block_specs=True,
        blocks=(BlockSpec(attention=GroupedQueryAttention(num_query_groups=8), ffn=NoOp()),),
    )
    found = only(queries, "tp1-pp1", sequence_length=7).activations
    assert found == 7 * 2 * (3 * 8192 + (2 * 64 + 2 * 8) * 128)


def test_a_block_keeps_what_the_list_says(llama_70b: ModelSpec) -> None:
    """Fused layers, bfloat16, by hand: norms 8 h, attention 4 (a + g) d + 4 a, SwiGLU 6 f."""
    block = llama_70b.blocks[0]
    work = Workload(purpose="training", sequence_length=10, micro_batch_size=2)
    tokens, norms, core, ffn = 20, 2 * (4 * 8192 + 4), 4 * (64 + 8) * 128 + 4 * 64, 6 * 28672
    for name, outside, tp in (("tp1-pp1", 1, 1), ("tp4-pp1", 1, 4), ("tp4-pp1-sp", 4, 4)):
        expected = tokens * (norms // outside + core // tp + ffn // tp)
        assert saved_by_block(llama_70b, parse_layout(name, llama_70b), work, block) == expected
    layout = parse_layout("tp1-pp1", llama_70b)
    for block, expected in (
        (BlockSpec(attention=NoOp(), ffn=NoOp()), 0),
        (BlockSpec(attention=Linear(), ffn=NoOp()), tokens * norms // 2),
        (BlockSpec(attention=NoOp(), ffn=Linear()), tokens * norms // 2),
    ):
        assert saved_by_block(llama_70b, layout, work, block) == expected


def test_full_recomputation_keeps_inputs_and_one_block(llama_70b: ModelSpec) -> None:
    """80 inputs of 2 h, the last norm and loss, one block; a pipeline keeps more of the first."""
    work = {"purpose": "training", "sequence_length": 10, "recompute": "full"}
    block = 10 * (2 * (4 * 8192 + 4) + 4 * (64 + 8) * 128 + 4 * 64 + 6 * 28672)
    ends = 10 * (8 + 4 * 8192 + 4 + 4 * 128256 + 9)
    assert only(llama_70b, "tp1-pp1", **work).activations == 80 * 10 * 2 * 8192 + ends + block
    first = only(llama_70b, "tp1-pp2", **work).activations
    assert first == 2 * (40 * 10 * 2 * 8192 + 10 * 8) + block


def test_earlier_pipeline_ranks_hold_more_micro_batches() -> None:
    """1F1B: rank r of p holds p - r. Interleaved: by hand, for two ranks of two parts."""
    assert [most_in_flight([1], rank, 4) for rank in range(4)] == [4, 3, 2, 1]
    # Korthikanti et al. 2022, section 4.2.3: L (1 + (p - 1) / (p m)) layers on the first rank.
    assert most_in_flight([1, 1], 0, 4) == 4 * 2 + 4 - 1
    # Rank 0 of 2: forward 0 0 1 1 | 0, back 1 | 0: four of part 0 and one of part 1.
    assert most_in_flight([100, 1], 0, 2) == 401
    assert most_in_flight([1, 100], 0, 2) == 203  # at the first bar
    # Rank 1: forward 0 0 | 1, back 1 | 1, back 1 | 0: three of part 0.
    assert most_in_flight([100, 1], 1, 2) == 300


@pytest.mark.parametrize(
    "wrong",
    [
        {"sequence_length": 0},
        {"micro_batch_size": -1},
        {"data_parallel_size": 0},
        {"purpose": "training", "params_dtype": "float64"},
    ],
)
def test_impossible_workloads_are_refused(wrong: dict[str, object]) -> None:
    """Each with the value that is wrong."""
    with pytest.raises(UsageError) as error:
        Workload(**wrong)  # type: ignore[arg-type]
    assert str(next(reversed(wrong.values()))) in str(error.value)
