"""The search keeps what it promises: what it offers fits, what it names would do, and no less."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest

from bridge.convert import read_spec
from bridge.errors import NoLayoutFitsError, UsageError
from bridge.layout_search import Machine, Suggestion, _Search, suggest_layouts
from bridge.memory import rank_memory
from bridge.pipeline import parse_layout
from bridge.spec import BlockSpec, GroupedQueryAttention, Linear, ModelSpec, SwiGLU
from bridge.workload import Workload

VARIANTS = Path(__file__).parents[2] / "suites" / "variants"
GIB = 1 << 30


def model(name: str) -> ModelSpec:
    """A published one."""
    return read_spec(VARIANTS / f"{name}.json")


def search(spec: ModelSpec, num_gpus: int, memory: float = 80, **work: object) -> list[Suggestion]:
    """Layouts for GPUs of so many GiB."""
    machine = Machine(num_gpus=num_gpus, memory=int(memory * GIB))
    return suggest_layouts(spec, Workload(**work), machine)  # type: ignore[arg-type]


def tensor_sizes(spec: ModelSpec, machine: Machine) -> set[int]:
    """TP of everything that is offered."""
    found = suggest_layouts(spec, Workload(), machine)
    return {one.layout.tensor_model_parallel_size for one in found}


def test_known_clusters_get_the_layouts_people_use() -> None:
    """Ultra in bfloat16 on one node of eight 80 GiB GPUs; Super on two; Nano-8B on one of 24."""
    ultra = search(model("Llama-3_1-Nemotron-Ultra-253B-v1"), 8)
    assert [one.layout.name for one in ultra][:2] == ["tp8-pp1", "tp4-pp2"]
    super_49b = search(model("Llama-3_3-Nemotron-Super-49B-v1"), 2)
    assert super_49b[0].layout.name == "tp2-pp1"
    assert search(model("Llama-3.1-Nemotron-Nano-8B-v1"), 1, 24)[0].layout.name == "tp1-pp1"


@pytest.mark.parametrize("purpose", ["inference", "training"])
def test_what_is_offered_fits_and_uses_every_gpu(purpose: str) -> None:
    """TP within a node, sizes that divide, memory counted anew; nothing that fits is left out."""
    spec = model("Llama-3_3-Nemotron-Super-49B-v1")
    found = search(spec, 32, purpose=purpose)
    names = set()
    for one in found:
        layout, replicas = one.layout, one.work.data_parallel_size
        assert layout.world_size * replicas == 32
        again = parse_layout(layout.name, spec)
        assert again == layout
        work = Workload(purpose=purpose, data_parallel_size=replicas)  # type: ignore[arg-type]
        assert rank_memory(spec, again, work) == one.ranks
        assert all(rank.total <= 0.9 * 80 * GIB for rank in one.ranks)
        names.add(layout.name)
    sequence = "-sp" if purpose == "training" else ""
    for tp in (1, 2, 4, 8):
        for pp in (1, 2, 4, 8, 16, 32):
            if tp * pp > 32:
                continue
            name = f"tp{tp}-pp{pp}{sequence if tp > 1 else ''}"
            work = Workload(purpose=purpose, data_parallel_size=32 // tp // pp)  # type: ignore[arg-type]
            ranks = rank_memory(spec, parse_layout(name, spec), work)
            fits = max(rank.total for rank in ranks) <= int(80 * GIB * 0.9)
            assert fits == (name in names), name
    orders = [one.order for one in found]
    assert orders == sorted(orders)
    sizes = [one.layout.world_size for one in found]
    assert sizes == sorted(sizes)


def test_tensor_parallelism_stays_within_a_node_and_divides_the_model() -> None:
    """Nodes of 4 allow no TP=8; 12 heads in 4 groups allow neither 3, 6 nor 8 anywhere."""
    spec = model("Llama-3.1-Nemotron-Nano-8B-v1")
    small = Machine(num_gpus=8, memory=80 * GIB, gpus_per_node=4)
    assert tensor_sizes(spec, small) == {1, 2, 4}
    block = BlockSpec(
        attention=GroupedQueryAttention(num_query_groups=4), ffn=SwiGLU(ffn_hidden_size=14400)
    )
    odd = dataclasses.replace(spec, num_attention_heads=12, kv_channels=96, blocks=(block,) * 4)
    machine = Machine(num_gpus=24, memory=80 * GIB, gpus_per_node=24)
    assert tensor_sizes(odd, machine) == {1, 2, 4, 12}
    block = dataclasses.replace(block, attention=GroupedQueryAttention(num_query_groups=12))
    even = dataclasses.replace(odd, blocks=(block,) * 4)
    assert tensor_sizes(even, machine) == {1, 2, 3, 4, 6, 12}
    # A node of 8 has no room for whole groups of 3.
    assert tensor_sizes(even, dataclasses.replace(machine, gpus_per_node=8)) == {1, 2, 4}


def test_a_model_that_megatron_cannot_run_sequence_parallel_is_not_offered_so() -> None:
    """Linear replacements: TP without it."""
    spec = model("Llama-3.1-Nemotron-Nano-8B-v1")
    linear = BlockSpec(attention=Linear(), ffn=spec.blocks[0].ffn)
    mixed = dataclasses.replace(
        spec, heterogeneous_block_specs=True, blocks=(*spec.blocks[:3], linear)
    )
    names = {one.layout.name for one in search(mixed, 2, purpose="training", sequence_length=512)}
    assert "tp2-pp1" in names
    assert not any(name.endswith("-sp") for name in names)


@pytest.mark.parametrize("purpose", ["inference", "training"])
def test_what_an_error_names_would_do_and_no_less(purpose: str) -> None:
    """The memory, but no GiB less; the number of GPUs, but no smaller one."""
    spec = model("Llama-3.1-Nemotron-Nano-8B-v1")
    with pytest.raises(NoLayoutFitsError) as error:
        search(spec, 1, 15, purpose=purpose)
    found = re.search(r"--memory (\d+)GiB .*--gpus (\d+) ", error.value.hint or "")
    assert found is not None
    memory, gpus = int(found[1]), int(found[2])
    assert search(spec, 1, memory, purpose=purpose)
    with pytest.raises(NoLayoutFitsError):
        search(spec, 1, memory - 1, purpose=purpose)
    assert search(spec, gpus, 15, purpose=purpose)
    for fewer in range(1, gpus):
        with pytest.raises(NoLayoutFitsError):
            search(spec, fewer, 15, purpose=purpose)


def test_replicas_that_share_the_optimizer_are_counted_among_what_would_do() -> None:
    """One GPU per replica, several replicas: the state is what does not fit."""
    spec = model("Llama-3.1-Nemotron-Nano-4B-v1.1")
    work = {"purpose": "training", "sequence_length": 128}
    with pytest.raises(NoLayoutFitsError) as error:
        search(spec, 1, 60, **work)
    # 4.51e9 parameters: 6 bytes each are 25.2 GiB, 12 more are 50.4 GiB; 54 GiB may be filled.
    assert "--gpus 2 " in str(error.value)
    assert search(spec, 2, 60, **work)
    with pytest.raises(NoLayoutFitsError, match="--gpus 2 "):
        search(spec, 1, 60, **work, distributed_optimizer=False)
    names = {one.layout.name for one in search(spec, 2, 60, **work, distributed_optimizer=False)}
    assert "tp1-pp1" not in names


def test_an_optimizer_that_is_not_shared_is_no_smaller_with_more_replicas() -> None:
    """One layer, no TP: nothing can be cut, and only what is shared grows smaller."""
    spec = model("Llama-3.1-Nemotron-Nano-8B-v1")
    one = dataclasses.replace(spec, blocks=spec.blocks[:1])
    machine = Machine(num_gpus=1, memory=12 * GIB, gpus_per_node=1)
    for distributed, says in ((True, "--gpus "), (False, "no number of such GPUs is enough")):
        work = Workload(purpose="training", sequence_length=64, distributed_optimizer=distributed)
        with pytest.raises(NoLayoutFitsError, match=says):
            suggest_layouts(one, work, machine)


def test_a_block_too_large_for_any_number_of_gpus_is_said_so() -> None:
    """Only memory would do: Ultra's widest FFN, 20.9 B parameters, is 4.9 GiB on 8 ranks."""
    with pytest.raises(NoLayoutFitsError) as error:
        search(model("Llama-3_1-Nemotron-Ultra-253B-v1"), 1, 5)
    assert "no number of such GPUs is enough" in str(error.value)
    assert "--gpus" not in (error.value.hint or "")


def outcome(spec: ModelSpec, work: Workload, memory: int) -> str:
    """What is offered on one GPU, or the whole error."""
    try:
        found = suggest_layouts(spec, work, Machine(num_gpus=1, memory=memory))
    except NoLayoutFitsError as error:
        return str(error)
    return " ".join(one.layout.name for one in found)


@pytest.mark.parametrize("purpose", ["inference", "training"])
@pytest.mark.parametrize("recompute", ["none", "full"])
@pytest.mark.parametrize("tied", [False, True])
def test_what_is_skipped_would_not_have_fitted(
    purpose: str, recompute: str, monkeypatch: pytest.MonkeyPatch, *, tied: bool
) -> None:
    """With every number of stages tried at every TP the answers are the same, word for word."""
    spec = model("Llama-3.1-Nemotron-Nano-8B-v1")
    wide = dataclasses.replace(spec.blocks[0], ffn=SwiGLU(ffn_hidden_size=4 * 4096))
    linear = BlockSpec(attention=Linear(), ffn=spec.blocks[0].ffn)
    small = dataclasses.replace(
        spec, heterogeneous_block_specs=True, vocab_size=8192,
        share_embeddings_and_output_weights=tied, blocks=(*spec.blocks[:3], linear, wide, linear),
    )  # fmt: skip
    works = [
        Workload(purpose=purpose, recompute=recompute, sequence_length=length)  # type: ignore[arg-type]
        for length in (64, 4096, 32768)
    ]
    sizes = [int(GIB * 1.3**step / 16) for step in range(24)]
    asked = [(work, size) for work in works for size in sizes]
    found = [outcome(small, work, size) for work, size in asked]
    monkeypatch.setattr(_Search, "_least", lambda _self, _tp: 0)
    assert found == [outcome(small, work, size) for work, size in asked]
    assert len(set(found)) > len(asked) // 4


def test_a_micro_batch_that_nothing_fits_is_refused_without_a_search(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Ultra has 162 layers: no number of stages of any TP is tried for its sake."""
    tried = []
    usual = _Search._suggestion

    def counted(self: _Search, tp: int, pp: int, dp: int) -> Suggestion:
        tried.append((tp, pp, dp))
        return usual(self, tp, pp, dp)

    monkeypatch.setattr(_Search, "_suggestion", counted)
    for purpose in ("inference", "training"):
        with pytest.raises(NoLayoutFitsError):
            search(
                model("Llama-3_1-Nemotron-Ultra-253B-v1"), 8, purpose=purpose, micro_batch_size=64
            )
    assert len(tried) == 2 * 10  # those of all eight GPUs, for each purpose


def test_impossible_machines_are_refused() -> None:
    """No GPU, no memory, no fraction of it."""
    for wrong in (
        {"num_gpus": 0},
        {"memory": 0},
        {"gpus_per_node": 0},
        {"memory_fraction": 0.0},
        {"memory_fraction": 1.1},
    ):
        with pytest.raises(UsageError):
            Machine(**{"num_gpus": 1, "memory": 1, **wrong})  # type: ignore[arg-type]


def test_what_passes_by_is_named_where_it_is_what_does_not_fit() -> None:
    """A long sequence: its cache, and a shorter one as a way out; of training, recomputation."""
    spec = model("Llama-3.1-Nemotron-Nano-8B-v1")
    with pytest.raises(NoLayoutFitsError) as error:
        search(spec, 1, 24, sequence_length=131072)
    assert re.search(r"the rest would fit: .* of activations and 16.0 GiB of KV", str(error.value))
    assert "smaller --sequence-length or --micro-batch-size" in str(error.value)
    with pytest.raises(NoLayoutFitsError, match="--recompute-granularity full") as error:
        search(spec, 1, 1, purpose="training", sequence_length=131072)
    assert "some block needs more" not in str(error.value)


def test_little_memory_is_named_in_mebibytes() -> None:
    """A toy: no whole GiB where less would do."""
    spec = model("Llama-3.1-Nemotron-Nano-8B-v1")
    toy = dataclasses.replace(
        spec, hidden_size=64, num_attention_heads=2, kv_channels=32, vocab_size=512,
        blocks=(BlockSpec(attention=GroupedQueryAttention(num_query_groups=1),
                          ffn=SwiGLU(ffn_hidden_size=64)),) * 2,
    )  # fmt: skip
    with pytest.raises(NoLayoutFitsError, match=r"fits 1 GPU of 0\.\d MiB") as error:
        search(toy, 1, 1 / 4096, sequence_length=16)
    found = re.search(r"--memory (\d+)MiB", error.value.hint or "")
    assert found is not None
    assert search(toy, 1, int(found[1]) / 1024, sequence_length=16)
