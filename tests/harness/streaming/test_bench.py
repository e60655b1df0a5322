"""A streamed proof is the whole one: the same states and verdicts, the same mistakes found."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bridge.convert import import_checkpoint
from bridge.errors import AccountingError, UsageError
from bridge.storage.synthetic import synthesize
from bridge.transfer import TransferLimits
from harness.bench import Bench, Subject
from harness.block_states import judge_block
from harness.checks import CHECKS
from harness.faults import fault_named
from harness.streaming import walk
from harness.streaming.bench import StreamingBench
from harness.streaming.reading import ReadAhead
from harness.streaming.record import FILE_NAME, Store
from harness.streaming.segments import segments_of
from harness.toys import toy_named
from tests.harness.streaming.conftest import MakeBench, case_of

pytestmark = pytest.mark.ranks
Array = np.ndarray[Any, np.dtype[Any]]
Toys = Callable[[str], Path]
TOYS = ("nano-4b", "51b", "ultra-253b", "tied")
WHOLE = 1 << 30
PROBES = ("short", "long")


@dataclass
class Seen:
    """States after the embedding and each block that was judged, probe by probe."""

    layers: list[int] = field(default_factory=list)
    reference: list[Array] = field(default_factory=list)
    truth: list[tuple[Array, Array]] = field(default_factory=list)
    ours: list[tuple[Array, Array]] = field(default_factory=list)


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Seen:
    """What the walk hands to the judge; the judgement itself goes on as it is."""
    found, judge = Seen(), judge_block

    def watch(layer_idx: int, kind: str, **given: Any) -> Any:  # noqa: ANN401 - the function's own
        found.layers.append(layer_idx)
        found.reference.append(given["reference"].copy())
        found.truth.append((given["forced"][1].copy(), given["free"][1].copy()))
        found.ours.append((given["forced"][0][0][1].copy(), given["free"][0][0][1].copy()))
        return judge(layer_idx, kind, **given)

    monkeypatch.setattr(walk, "judge_block", watch)
    return found


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, toys: Toys) -> Iterator[Bench]:
    """The bench that has models as a whole, on ranks."""
    subjects = {name: Subject(name=name, hf=toys(name)) for name in TOYS}
    with Bench(tmp_path_factory.mktemp("whole"), subjects=subjects) as bench:
        yield bench


def small_budget(name: str, most_slices: int) -> int:
    """A budget that cuts the widest feed-forward of a toy into so many slices."""
    model, budget = toy_named(name).architecture, 1 << 26
    while True:
        found, _ = segments_of(model, [0], memory_budget=budget, word=4, element=4)
        if max(one.num_slices for one in found if one.part == "ffn") == most_slices:
            return budget
        budget = budget * 31 // 32


def smallest_budget(name: str) -> int:
    """A budget with room for little more than the largest piece that cannot be cut."""
    model, budget = toy_named(name).architecture, 1 << 26
    while True:
        smaller = budget * 31 // 32
        try:
            segments_of(model, [0], memory_budget=smaller, word=4, element=4)
        except UsageError:
            return budget
        budget = smaller


def whole_states(whole: Bench, name: str, dtype: str) -> tuple[Any, Any, Any]:
    """Witnesses, Megatron's states and logits of the whole model."""
    case = replace(case_of(dtype=dtype), model=name)
    return whole.witnesses(case), whole.block_states(case), whole.megatron_logits(case)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", TOYS)
def test_in_one_slice_every_state_is_the_whole_models_to_the_last_bit(
    name: str, dtype: str, seen: Seen, whole: Bench, toys: Toys, make_bench: MakeBench
) -> None:
    """Reference and Megatron, free and forced, and the logits; the oracle to float64 rounding."""
    bench, case = make_bench(toys(name), budget=WHOLE), case_of(dtype=dtype)
    outcome = bench.outcome(case)
    by, found, logits = whole_states(whole, name, dtype)
    assert [-1, *range(len(by.model.blocks))] == seen.layers
    for entry, layer_idx in enumerate(seen.layers):
        forced, free = seen.ours[entry]
        assert np.array_equal(by.reference[entry], seen.reference[entry]), layer_idx
        assert np.array_equal(found.free[layer_idx][0][1], free), layer_idx
        if layer_idx >= 0:
            assert np.array_equal(found.forced[layer_idx][0][1], forced), layer_idx
        np.testing.assert_allclose(seen.truth[entry][0], by.forced[entry], rtol=0, atol=1e-11)
        np.testing.assert_allclose(seen.truth[entry][1], by.free[entry], rtol=0, atol=1e-11)
    assert np.array_equal(by.reference_logits, outcome.logits["long"].reference)
    assert np.array_equal(logits, outcome.logits["long"].ours)
    assert np.array_equal(found.logits, outcome.logits["long"].ours_forced)
    truth = outcome.logits["long"].truth_forced
    np.testing.assert_allclose(by.forced_logits, truth, rtol=0, atol=1e-10)


@pytest.mark.parametrize(("name", "num_slices"), [("nano-4b", 3), ("ultra-253b", 3), ("51b", 2)])
def test_in_slices_every_state_is_the_whole_models_within_rounding(
    name: str, num_slices: int, seen: Seen, whole: Bench, toys: Toys, make_bench: MakeBench
) -> None:
    """A few ulp of float32 from the whole model's; the oracle exact but for float64 rounding."""
    bench = make_bench(toys(name), budget=small_budget(name, num_slices))
    outcome = bench.outcome(case_of())
    by, found, logits = whole_states(whole, name, "float32")
    for entry, layer_idx in enumerate(seen.layers):
        scale = float(np.abs(by.free[entry]).max())
        atol = 2e-5 * scale
        forced, free = seen.ours[entry]
        np.testing.assert_allclose(seen.reference[entry], by.reference[entry], rtol=0, atol=atol)
        np.testing.assert_allclose(free, found.free[layer_idx][0][1], rtol=0, atol=atol)
        if layer_idx >= 0:
            np.testing.assert_allclose(forced, found.forced[layer_idx][0][1], rtol=0, atol=atol)
        np.testing.assert_allclose(seen.truth[entry][1], by.free[entry], rtol=0, atol=1e-11)
    np.testing.assert_allclose(outcome.logits["long"].ours, logits, rtol=0, atol=1e-4)


def test_each_segment_is_of_the_kind_of_its_part_of_the_block(
    toys: Toys, make_bench: MakeBench
) -> None:
    """A block's two kinds, in order; every slice of a feed-forward has that of the whole."""
    record = make_bench(toys("51b"), budget=small_budget("51b", 3)).outcome(case_of()).record
    blocks = [one for one in record.judgements["long"] if one.layer_idx >= 0]
    assert blocks
    for block in blocks:
        attention, *slices = [one.kind for one in record.parts["long"][block.layer_idx]]
        assert {f"{attention} + {kind}" for kind in slices} == {block.kind}
    assert max(len(parts) for parts in record.parts["long"].values()) == 1 + 3


@pytest.mark.parametrize("num_slices", [1, 3])
def test_both_checks_pass_on_both_probes_from_one_walk(
    num_slices: int, seen: Seen, toys: Toys, make_bench: MakeBench
) -> None:
    """Each block is walked through once for all of them."""
    bench = make_bench(toys("51b"), budget=WHOLE if num_slices == 1 else small_budget("51b", 3))
    cases = [case_of(check, probe=probe) for check in ("blocks", "logits") for probe in PROBES]
    bench.prepare(cases)
    for case in cases:
        found = CHECKS[case.check].run(case, bench)
        assert found.passed, found.summary
    assert len(seen.layers) == len(PROBES) * 9


def test_the_three_sources_give_the_same(tmp_path: Path, toys: Toys, make_bench: MakeBench) -> None:
    """Synthetic weights, the same written to files, and those converted to Megatron's."""
    config = toys("51b") / "config.json"
    synthesize(
        config, tmp_path / "hf", seed=5, max_shard_size=100_000,
        limits=TransferLimits(),
    )  # fmt: skip
    import_checkpoint(tmp_path / "hf", tmp_path / "megatron", tensor_model_parallel_size=2)
    budget = 2 * small_budget("51b", 2)
    outcomes = [
        bench.outcome(case_of())
        for bench in (
            make_bench(config, budget=budget, seed=5),
            make_bench(tmp_path / "hf", budget=budget),
        )
    ]
    pair = make_bench(tmp_path / "hf", budget=2 * budget, megatron=tmp_path / "megatron")
    outcomes.append(pair.outcome(case_of()))
    first, second, third = outcomes
    for other in (second, third):
        for name in ("reference", "ours", "truth"):
            one, two = getattr(first.logits["long"], name), getattr(other.logits["long"], name)
            np.testing.assert_allclose(one, two, rtol=0, atol=1e-4 if other is third else 0)
    assert [one.to_dict() for one in first.record.judgements["long"]] == [
        one.to_dict() for one in second.record.judgements["long"]
    ]
    other_seed = make_bench(config, budget=budget, seed=6).outcome(case_of())
    assert not np.array_equal(other_seed.logits["long"].truth, first.logits["long"].truth)


def test_a_megatron_checkpoint_is_what_megatron_is_filled_from(
    tmp_path: Path, toys: Toys, make_bench: MakeBench
) -> None:
    """One of other weights is caught, and only Megatron is wrong."""
    config = toys("nano-4b") / "config.json"
    for seed in (1, 2):
        synthesize(config, tmp_path / f"hf{seed}", seed=seed, max_shard_size=1 << 30,
                   limits=TransferLimits())  # fmt: skip
    import_checkpoint(tmp_path / "hf2", tmp_path / "megatron")
    bench = make_bench(tmp_path / "hf1", megatron=tmp_path / "megatron")
    found = CHECKS["blocks"].run(case_of(), bench)
    assert not found.passed
    assert found.summary.startswith("the embedding")


FAULTS = (
    "gate-up-swapped",
    "k-heads-swapped",
    "fc2-halves-swapped",
    "proj-one-head-along",
    "layers-swapped",
    "embedding-shifted",
    "rope-factor",
    "norm-eps",
    "rope-frequencies-bfloat16",
    "groups-tiled",
    "gelu-for-silu",
)


@pytest.mark.parametrize("name", FAULTS)
def test_a_mistake_in_the_bridge_is_found(name: str, toys: Toys, make_bench: MakeBench) -> None:
    """In the mapping, the configuration or the arithmetic, cut or not."""
    toy = "super-49b-v1_5"
    budget = small_budget(toy, 3) if "swapped" in name or name == "norm-eps" else WHOLE
    bench = make_bench(toys(toy), budget=budget, fault=fault_named(name))
    found = CHECKS["blocks"].run(case_of(), bench)
    assert not found.passed
    assert found.places


def test_weights_that_the_bridge_expects_in_vain_are_an_error(
    toys: Toys, make_bench: MakeBench
) -> None:
    """As on ranks: a no-op taken for a linear wants a matrix that nobody has stored."""
    bench = make_bench(toys("ultra-253b"), fault=fault_named("no-op-read-as-linear"))
    bench.prepare([case_of()])
    with pytest.raises(AccountingError, match="BR301"):
        CHECKS["blocks"].run(case_of(), bench)


def test_a_failing_block_is_named_with_its_part_and_its_tiles(
    toys: Toys, make_bench: MakeBench
) -> None:
    """The kind, the slice that is wrong, Megatron's rows and those they were filled from."""
    bench = make_bench(
        toys("nano-4b"), budget=small_budget("nano-4b", 3), fault=fault_named("gate-up-swapped")
    )  # fmt: skip
    found = CHECKS["blocks"].run(case_of(), bench)
    text = "\n".join(found.places)
    assert "block 0 (attention with" in text
    assert "the FFN sub-block, units" in text
    assert re.search(
        r"decoder\.layers\.0\.mlp\.linear_fc1\.weight\[(\d+:\d+), 0:96\] <- "
        r"model\.layers\.0\.mlp\.up_proj\.weight\[\1, 0:96\]",
        text,
    )
    assert "suspected cause: gate-up-swapped" in text


def test_a_wrong_head_is_named(toys: Toys, make_bench: MakeBench) -> None:
    """The embedding for an output layer: every block is right, the head is not."""
    bench = make_bench(toys("super-49b-v1_5"), fault=fault_named("tie-inverted"))
    found = CHECKS["logits"].run(case_of("logits"), bench)
    text = "\n".join(found.places)
    assert not found.passed
    assert "the final norm and the output layer compute wrong from a right input" in text
    assert "embedding.word_embeddings.weight[0:" in text
    assert CHECKS["blocks"].run(case_of(), bench).passed


def test_memory_is_within_the_budget(
    monkeypatch: pytest.MonkeyPatch, toys: Toys, make_bench: MakeBench
) -> None:
    """What is held of the weights at once, both sources together, never exceeds its share."""
    made: list[ReadAhead] = []
    begin = ReadAhead.__init__

    def watched(self: ReadAhead, *args: Any, **options: Any) -> None:  # noqa: ANN401 - as above
        begin(self, *args, **options)
        made.append(self)

    monkeypatch.setattr(ReadAhead, "__init__", watched)
    budget = smallest_budget("51b")
    bench = make_bench(toys("51b"), budget=budget)
    bench.outcome(case_of())
    (ahead,) = made
    _, shares = bench._segments(case_of())
    assert 0 < ahead.most_held <= shares.words < budget
    assert shares.words + shares.module <= budget


@pytest.mark.parametrize("name", TOYS)
@pytest.mark.parametrize("threads", [2, 5])
def test_the_oracle_is_the_same_whatever_the_number_of_its_threads(
    name: str, threads: int, seen: Seen, toys: Toys, make_bench: MakeBench
) -> None:
    """Groups, widths and rows that they do not divide included; but for float64 rounding."""
    one, many = (make_bench(toys(name), threads=count).outcome(case_of()) for count in (1, threads))
    half = len(seen.truth) // 2
    for mine, theirs in zip(seen.truth[:half], seen.truth[half:], strict=True):
        np.testing.assert_allclose(np.stack(theirs), np.stack(mine), rtol=0, atol=1e-11)
    expected, found = one.logits["long"].truth, many.logits["long"].truth
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-10)


class KilledError(Exception):
    """Stands for a signal."""


def test_a_walk_that_was_killed_goes_on_after_the_last_finished_block(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, seen: Seen, toys: Toys, make_bench: MakeBench
) -> None:
    """Nothing before is walked through again, and every number is that of an unbroken walk."""
    budget = small_budget("51b", 3)
    unbroken = make_bench(toys("51b"), budget=budget).outcome(case_of())
    save, saved = Store.save, []

    def save_until_killed(self: Store, *args: Any) -> None:  # noqa: ANN401 - as above
        save(self, *args)
        saved.append(1)
        if len(saved) == 5:  # the embedding and four blocks
            raise KilledError

    monkeypatch.setattr(Store, "save", save_until_killed)
    with pytest.raises(KilledError):
        make_bench(toys("51b"), budget=budget, keep=tmp_path).outcome(case_of())
    monkeypatch.setattr(Store, "save", save)
    seen.layers.clear()
    resumed = make_bench(toys("51b"), budget=budget, keep=tmp_path, resume=True)
    outcome = resumed.outcome(case_of())
    assert seen.layers == [4, 5, 6, 7]
    for mine, theirs in zip(
        outcome.record.judgements["long"], unbroken.record.judgements["long"], strict=True
    ):
        assert mine.to_dict() == theirs.to_dict()
        assert [one.passed for one in mine.verdicts] == [one.passed for one in theirs.verdicts]
    assert outcome.record.parts == unbroken.record.parts
    assert np.array_equal(outcome.logits["long"].ours, unbroken.logits["long"].ours)
    assert np.array_equal(outcome.logits["long"].truth, unbroken.logits["long"].truth)


def test_states_of_a_finished_walk_are_kept_until_the_run_has_ended_well(
    tmp_path: Path, seen: Seen, toys: Toys, make_bench: MakeBench
) -> None:
    """One that is killed before its results are safe can be resumed; one that ends leaves none."""

    def walk_and_be_killed() -> None:
        with make_bench(toys("nano-4b"), keep=tmp_path) as killed:
            killed.outcome(case_of())
            raise KilledError

    with pytest.raises(KilledError):
        walk_and_be_killed()
    seen.layers.clear()
    with make_bench(toys("nano-4b"), keep=tmp_path, resume=True) as resumed:
        resumed.outcome(case_of())
        assert (tmp_path / FILE_NAME).exists()
    assert seen.layers == []
    assert not (tmp_path / FILE_NAME).exists()


def test_states_of_another_walk_are_left_aside(
    tmp_path: Path, seen: Seen, toys: Toys, make_bench: MakeBench
) -> None:
    """Of another dtype, and all without `resume`."""
    keep: dict[str, Any] = {"keep": tmp_path}
    make_bench(toys("nano-4b"), **keep).outcome(case_of())
    seen.layers.clear()
    make_bench(toys("nano-4b"), resume=True, **keep).outcome(case_of(dtype="bfloat16"))
    assert seen.layers == [-1, *range(6)]


def test_named_blocks_are_a_model_of_their_own(
    seen: Seen, toys: Toys, make_bench: MakeBench
) -> None:
    """Judged under their own numbers; the logits are those of these blocks alone."""
    bench: StreamingBench = make_bench(toys("51b"), blocks=(1, 4))
    found = CHECKS["blocks"].run(case_of(), bench)
    assert found.passed
    assert seen.layers == [-1, 1, 4]
    assert [one["layer_idx"] for one in found.details["blocks"]] == [-1, 1, 4]
    assert CHECKS["logits"].run(case_of("logits"), bench).passed


def test_the_config_check_needs_no_weights(toys: Toys, make_bench: MakeBench) -> None:
    """It passes on a configuration alone."""
    bench = make_bench(toys("ultra-253b") / "config.json")
    assert CHECKS["config"].run(case_of("config", probe=""), bench).passed


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", TOYS)
def test_on_a_gpu_both_checks_pass_and_a_mistake_is_found(
    name: str, dtype: str, toys: Toys, make_bench: MakeBench
) -> None:
    """From files and from a seed; the module is on the GPU, the oracle is not."""
    for hf in (toys(name), toys(name) / "config.json"):
        bench = make_bench(hf, budget=small_budget(name, 2) if name == "51b" else WHOLE)
        cases = [case_of(check, dtype=dtype, device="cuda") for check in ("blocks", "logits")]
        bench.prepare(cases)
        for case in cases:
            found = CHECKS[case.check].run(case, bench)
            assert found.passed, found.summary
    bench = make_bench(toys(name), fault=fault_named("gate-up-swapped"))
    assert not CHECKS["blocks"].run(case_of(dtype=dtype, device="cuda"), bench).passed
