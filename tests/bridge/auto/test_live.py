"""Live models of `AutoBridge`, on real ranks: what goes in comes out, at every layout."""

from __future__ import annotations

import filecmp
import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import bridge.decilm  # noqa: F401 - registers the model type
from bridge.convert import export_checkpoint, import_checkpoint, read_spec
from bridge.manifest import read_manifest
from bridge.manifest_check import check_manifest
from bridge.pipeline import plan_layout
from bridge.storage.target import MANIFEST_NAME
from harness.launcher import RankPool
from harness.toys import toy_named, write_checkpoint

if TYPE_CHECKING:
    from tests.bridge.auto import auto_ranks as ranks
else:  # a module beside this file: tests are not a package
    sys.path.append(str(Path(__file__).parent))
    import auto_ranks as ranks

pytestmark = pytest.mark.ranks

TOYS = {"nano-4b": "float32", "51b": "bfloat16", "super-49b-v1": "float32", "tied": "bfloat16"}
TP, PP, VP = (
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
    "virtual_pipeline_model_parallel_size",
)
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "linears-tp2": ("51b", {TP: 2}),
    "llama-pp2": ("nano-4b", {PP: 2, "num_layers_in_first_pipeline_stage": 1}),
    "tied-tp2-pp2": ("tied", {TP: 2, PP: 2}),
    "no-ops-tp2-pp2-vp2": ("super-49b-v1", {TP: 2, PP: 2, VP: 2}),
}
PADDED = {"padded": ("51b", {TP: 2, PP: 2, "should_pad_vocab": True})}


@pytest.fixture(scope="module")
def pool() -> Iterator[RankPool]:
    """One set of ranks for all."""
    with RankPool(timeout=120) as found:
        yield found


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A directory of each toy."""
    folder = tmp_path_factory.mktemp("toys")
    for name, dtype in TOYS.items():
        write_checkpoint(toy_named(name), folder / name, dtype=dtype)
    return {name: folder / name for name in TOYS}


def run(
    pool: RankPool, checkpoints: dict[str, Path], case: str, function: Any, *args: Any
) -> list[Any]:
    """A function on the ranks of a case."""
    toy, settings = (CASES | PADDED)[case]
    hf = checkpoints[toy]
    layout = plan_layout(
        read_spec(hf), **{name: settings[name] for name in (TP, PP, VP) if name in settings}
    )
    return pool.run(layout, function, hf, settings, *args)


def source_digests(hf: Path, dtype: torch.dtype | None = None) -> dict[str, Any]:
    """What safetensors itself reads."""
    return {
        name: ranks.digest(name, tensor if dtype is None else tensor.to(dtype))
        for file in sorted(hf.glob("*.safetensors"))
        for name, tensor in load_file(file).items()
    }


def same_files(left: Path, right: Path) -> list[str]:
    """Names of files that differ or are on one side only, but for a conversion's manifest."""
    names = {
        path.relative_to(side).as_posix()
        for side in (left, right)
        for path in side.rglob("*")
        if path.is_file() and path.name != MANIFEST_NAME
    }
    _, mismatch, errors = filecmp.cmpfiles(left, right, names, shallow=False)
    return sorted(mismatch + errors)


@pytest.mark.parametrize("case", CASES)
def test_every_rank_or_one_gets_the_source_s_tensors(
    pool: RankPool, checkpoints: dict[str, Path], case: str
) -> None:
    """All of them, once, with their bits; a part of them where tasks say so, rounded if asked."""
    hf = checkpoints[CASES[case][0]]
    expected = source_digests(hf)
    halves = source_digests(hf, torch.float16)
    wanted = [
        name
        for name in halves
        if name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight"))
    ]
    found = run(pool, checkpoints, case, ranks.stream)
    for rank, streams in enumerate(found):
        assert len(streams["all"]) == len(expected)
        assert {one[0]: one for one in streams["all"]} == expected
        is_last = rank == len(found) - 1
        assert streams["last"] == (streams["all"] if is_last else [])
        tasks = {one[0]: one for one in streams["tasks"]}
        assert tasks == {name: halves[name] for name in [*wanted, "model.norm.weight"]}


@pytest.mark.parametrize("case", CASES)
def test_a_saved_model_is_its_source_again(
    pool: RankPool, checkpoints: dict[str, Path], case: str, tmp_path: Path
) -> None:
    """Directly, file by file; through Megatron's checkpoint; and live from there."""
    hf = checkpoints[CASES[case][0]]
    assert all(run(pool, checkpoints, case, ranks.save, tmp_path))
    assert same_files(hf, tmp_path / "hf") == []
    weights = {path.name for path in (tmp_path / "weights").iterdir()}
    assert weights == {MANIFEST_NAME, *(path.name for path in hf.glob("model*"))}
    assert source_digests(hf) == source_digests(tmp_path / "weights")
    assert source_digests(hf, torch.float64) == source_digests(tmp_path / "wide")
    wide = AutoModelForCausalLM.from_pretrained(tmp_path / "wide", dtype="auto")
    assert wide.dtype == torch.float64
    export_checkpoint(tmp_path / "megatron", tmp_path / "exported")
    assert same_files(hf, tmp_path / "exported") == []


@pytest.mark.parametrize("saved", ["hf", "weights", "megatron"])
def test_a_saved_model_is_sealed(
    pool: RankPool, checkpoints: dict[str, Path], saved: str, tmp_path: Path
) -> None:
    """Every file is in its manifest, and what is flipped later is named with its tensor."""
    run(pool, checkpoints, "padded", ranks.save, tmp_path)
    report = check_manifest(tmp_path / saved)
    assert report.differences == report.not_listed == []
    manifest = read_manifest(tmp_path / saved)
    assert manifest is not None
    assert manifest.source == {}
    file, entry = max(manifest.target.items(), key=lambda one: one[1].nbytes)
    part = entry.parts[-1]
    raw = bytearray((tmp_path / saved / file).read_bytes())
    raw[part.offset] ^= 1
    (tmp_path / saved / file).write_bytes(raw)
    (found,) = check_manifest(tmp_path / saved).differences
    assert file in found
    assert str(part) in found


def test_each_rank_writes_the_very_files_of_an_import(
    pool: RankPool, checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    """Whose format Megatron-Core's own loader is held to elsewhere.

    Hashes are not known, and what Megatron-Bridge's training wants beside it is an import's alone.
    """
    hf = checkpoints["51b"]
    run(pool, checkpoints, "padded", ranks.save, tmp_path)
    import_checkpoint(
        hf, tmp_path / "imported", tensor_model_parallel_size=2, pipeline_model_parallel_size=2
    )
    assert same_files(tmp_path / "imported", tmp_path / "megatron") == [
        "iter_0000000/run_config.yaml",
        "iter_0000000/train_state.pt",
        "latest_train_state.pt",
        "nemotron_bridge.json",
    ]


def test_tasks_say_what_becomes_of_each_parameter(
    pool: RankPool, checkpoints: dict[str, Path]
) -> None:
    """The same on every rank, with the shards that are there."""
    first, last = run(pool, checkpoints, "llama-pp2", ranks.tasks_of)
    assert [one[:4] for one in first] == [one[:4] for one in last]
    assert all(
        (one[4] is None) == (other[4] is not None) for one, other in zip(first, last, strict=True)
    )
    by_name = {one[0]: one for one in first}
    assert by_name["decoder.layers.0.self_attention.linear_qkv.weight"] == (
        "decoder.layers.0.self_attention.linear_qkv.weight",
        {
            "q": "model.layers.0.self_attn.q_proj.weight",
            "k": "model.layers.0.self_attn.k_proj.weight",
            "v": "model.layers.0.self_attn.v_proj.weight",
        },
        0,
        0,
        (192, 96),
    )
    assert by_name["decoder.layers.5.mlp.linear_fc1.weight"][1:] == (
        {
            "gate": "model.layers.5.mlp.gate_proj.weight",
            "up": "model.layers.5.mlp.up_proj.weight",
        },
        1,
        0,
        None,
    )
    assert by_name["decoder.final_layernorm.weight"][1:3] == ("model.norm.weight", 1)


@pytest.mark.parametrize("case", ["linears-tp2", "llama-pp2", "no-ops-tp2-pp2-vp2"])
def test_megatron_s_schedules_run_without_a_gpu(
    pool: RankPool, checkpoints: dict[str, Path], case: str
) -> None:
    """Without a mask given, they give what the stages give one by one."""
    found = run(pool, checkpoints, case, ranks.schedule)
    assert set(found) <= {True, None}
    assert True in found


def test_replicas_stream_save_and_train(
    pool: RankPool, checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    """Each replica has a stream of its own, one of them saves, and gradients are averaged."""
    hf = checkpoints["nano-4b"]
    layout = plan_layout(read_spec(hf), tensor_model_parallel_size=2)
    other = checkpoints["tied"]
    first, second = pool.run(layout, ranks.replicas, hf, tmp_path / "megatron", other)
    everything = len(source_digests(hf))
    assert first["streams"] == [everything, everything, 0]
    assert second["streams"] == [everything, 0, everything]
    export_checkpoint(tmp_path / "megatron", tmp_path / "hf")
    assert [name for name in same_files(hf, tmp_path / "hf") if "token" not in name] == []
    assert [name for name in same_files(other, tmp_path / "hf") if "token" in name] == []
    # float32 rounds sums of another order; a gradient that is not averaged is off by its own size.
    assert max(first["gradients"], second["gradients"]) < 1e-4


def test_what_one_rank_cannot_do_all_ranks_refuse(
    pool: RankPool, checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    """With the same words, none left waiting, and nothing left behind."""
    hf, other = checkpoints["nano-4b"], checkpoints["tied"]
    more = tmp_path / "more"
    shutil.copytree(hf, more)
    save_file({"model.layers.0.extra.weight": torch.zeros(3)}, more / "extra.safetensors")
    index = json.loads((more / "model.safetensors.index.json").read_text())
    index["weight_map"]["model.layers.0.extra.weight"] = "extra.safetensors"
    (more / "model.safetensors.index.json").write_text(json.dumps(index))
    before = sorted(path.name for path in hf.iterdir())
    layout = plan_layout(read_spec(hf), pipeline_model_parallel_size=2)
    first, last = pool.run(layout, ranks.refusals, hf, other, more, tmp_path / "out")
    assert first == last
    assert {what: error[:5] for what, error in first.items()} == {
        "target": "BR304",
        "megatron target": "BR304",
        **{
            f"{what} {where}": "BR001"
            for what in ("hf", "weights", "megatron")
            for where in ("over the source", "around the source", "in the source", "to a URL")
        },
        "over the side files": "BR001",
        "over the tokenizer": "BR001",
        "no side files": "BR300",
        "no tokenizer": "BR300",
        "import on some ranks": "BR300",
        "weights on some ranks": "BR300",
        "no target": "BR001",
        "no megatron target": "BR001",
        "no size": "BR001",
        "no task": "BR001",
        "no rank": "BR001",
        "integers": "BR001",
        "integers saved": "BR001",
        "other weights": "BR104",
        "one more tensor": "BR301",
        "mismatches": "BR001",
        "no source": "BR001",
        "no model on some ranks": "BR200",
        "other constants": "BR104",
        "other constants in megatron": "BR104",
        "other constants to fill": "BR104",
        "other frequencies": "BR104",
        "other frequencies in megatron": "BR104",
        "other frequencies to fill": "BR104",
        "damaged": "BR305",
        "damaged megatron": "BR305",
        "overflow": "BR303",
        "overflow saved": "BR303",
        "adapter": "BR400",
        "adapter saved": "BR400",
        "adapter in megatron": "BR400",
    }
    assert "around their tensors" in first["damaged"]
    assert "around their tensors" in first["damaged megatron"]
    assert "mlp.down_proj.weight: 1" in first["overflow"]
    assert "lora" in first["adapter"]
    assert "factor=" in first["other frequencies"]
    assert before == sorted(path.name for path in hf.iterdir())
    assert [path.name for path in tmp_path.iterdir()] == ["more"]


def test_what_is_set_is_what_is_built(pool: RankPool, checkpoints: dict[str, Path]) -> None:
    """Megatron-Core gets what is handed on; hooks run in turn; without weights they are drawn."""
    hf = checkpoints["tied"]
    layout = plan_layout(read_spec(hf), tensor_model_parallel_size=2)
    found, other = pool.run(layout, ranks.built, hf)
    assert found["config"] == {
        "recompute_granularity": "full",
        "hidden_dropout": 0.1,
        "params_dtype": torch.float32,
        "sequence_parallel": True,
        "perform_initialization": True,
    }
    assert found["hooks"] == ["first", "second", "third", "wrapped"]
    assert found["training"] == [True]
    assert found["rows"] == 768 // 2  # 527 to a multiple of 128 x TP, halved
    assert found["std"] == pytest.approx(0.05, rel=0.05)
    assert found["ones"]
    assert found["halves"] == ["Float16Module", "GPTModel"]
    assert "groups are formed for 2, the provider says 1" in found["other groups"]
    assert "post_process=False for a stage" in found["post_process"]
    assert "vp_stage=3 for layout tp2-pp1 of 1 parts" in found["vp_stage"]
    assert "recompute_granularity='foo'" in found["handed on"]
    assert found["provided"] == "GPTModel"
    assert {name: one for name, one in other.items() if name != "std"} == {
        name: one for name, one in found.items() if name != "std"
    }
