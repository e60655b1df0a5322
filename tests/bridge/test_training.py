"""Checkpoints of real training come back as the weights that were live, bit for bit.

Megatron-Core's DistributedDataParallel and distributed optimizer train toys on CPU ranks and save
them, in both formats; imports are loaded there and trained on. What the ranks held is put together
by a layout written out below, which shares nothing with the bridge's table.
"""

from __future__ import annotations

import re
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from bridge.convert import export_checkpoint, import_checkpoint, read_spec
from bridge.errors import CheckpointError, CorruptFileError
from bridge.pipeline import parse_layout
from bridge.spec import GroupedQueryAttention, ModelSpec, ParallelLayout
from harness.launcher import RankPool
from harness.toys import toy_named, write_checkpoint

if TYPE_CHECKING:
    from tests.bridge import training_ranks as ranks
else:  # a module beside this file: tests are not a package
    sys.path.append(str(Path(__file__).parent))
    import training_ranks as ranks

pytestmark = pytest.mark.ranks

Words = np.ndarray[Any, Any]

# Four ranks in all: the first is trained by two data-parallel pairs, the second on uneven virtual
# stages, rank 0 holding layers 0, 3 and 4.
TRAINED = {"51b": "tp2-pp1", "nano-8b": "tp2-pp2-vp2-l1.2.2.1"}


@dataclass(frozen=True)
class Run:
    """A toy that was trained, and what each rank held at the end."""

    spec: ModelSpec
    layout: ParallelLayout
    formed: ParallelLayout
    """Of all four ranks, some of which may be data-parallel."""
    hf: Path
    root: Path
    held: list[dict[str, Any]]


@pytest.fixture(scope="module")
def pool() -> Iterator[RankPool]:
    """Ranks for all tests here."""
    with RankPool(timeout=120) as found:
        yield found


@pytest.fixture(scope="module", params=TRAINED)
def run(
    request: pytest.FixtureRequest, pool: RankPool, tmp_path_factory: pytest.TempPathFactory
) -> Run:
    """One toy, trained and saved once for all tests."""
    root = tmp_path_factory.mktemp(request.param)
    write_checkpoint(toy_named(request.param), root / "hf", dtype="bfloat16")
    spec = read_spec(root / "hf", carry=())
    layout = parse_layout(TRAINED[request.param], spec)
    formed = layout if layout.world_size == 4 else parse_layout("tp4-pp1", spec)
    held = pool.run(formed, ranks.train_and_save, spec, layout, root / "hf", root)
    return Run(spec=spec, layout=layout, formed=formed, hf=root / "hf", root=root, held=held)


# Live name to Hugging Face's, and the axis by which TP cuts it; None where all ranks hold it.
# Local layers hold their norms themselves.
PLAIN = {
    "embedding.word_embeddings.weight": ("model.embed_tokens.weight", 0),
    "output_layer.weight": ("lm_head.weight", 0),
    "decoder.final_layernorm.weight": ("model.norm.weight", None),
    "input_layernorm.weight": ("input_layernorm.weight", None),
    "pre_mlp_layernorm.weight": ("post_attention_layernorm.weight", None),
    "self_attention.linear_proj.weight": ("self_attn.o_proj.weight", 1),
    "self_attention.weight": ("self_attn.linear_attn.weight", 0),
    "mlp.linear_fc2.weight": ("mlp.down_proj.weight", 1),
    "mlp.weight": ("mlp.linear_mlp.weight", 0),
}


def hf_of_ranks(spec: ModelSpec, ranks_held: Sequence[Mapping[str, Any]]) -> dict[str, Words]:
    """Put live shards together under Hugging Face's names, by Megatron's layout as documented.

    Rows of `linear_qkv` run group by group; a rank's `linear_fc1` is its gate above its up.
    """
    shards: dict[str, dict[int, Words]] = {}
    for one in ranks_held:
        for name, words in one["tensors"].items():
            # Data-parallel ranks hold the same.
            seen = shards.setdefault(name, {}).setdefault(one["tp_rank"], words)
            assert np.array_equal(seen, words), name
    found: dict[str, Words] = {}
    for name, by_rank in shards.items():
        parts = [by_rank[tp_rank] for tp_rank in sorted(by_rank)]
        match = re.fullmatch(r"decoder\.layers\.(\d+)\.(.*)", name)
        block = f"model.layers.{match[1]}." if match else ""
        rest = match[2] if match else name
        if rest == "self_attention.linear_qkv.weight":
            found |= qkv_of_ranks(spec, block, parts)
        elif rest == "mlp.linear_fc1.weight":
            for index, proj in enumerate(("gate", "up")):
                halves = [np.split(part, 2)[index] for part in parts]
                found[f"{block}mlp.{proj}_proj.weight"] = np.concatenate(halves)
        else:
            hf_name, axis = PLAIN[rest]
            assert axis is not None or all(np.array_equal(parts[0], part) for part in parts)
            whole = parts[0] if axis is None else np.concatenate(parts, axis)
            rows = spec.vocab_size if match is None and axis == 0 else None
            found[block + hf_name] = whole[:rows]
    return found


def qkv_of_ranks(spec: ModelSpec, block: str, parts: list[Words]) -> dict[str, Words]:
    """The three projections of a block."""
    attention = spec.blocks[int(block.split(".")[2])].attention
    assert isinstance(attention, GroupedQueryAttention)
    heads = np.concatenate(parts).reshape(
        attention.num_query_groups, -1, spec.kv_channels, spec.hidden_size
    )
    rows = {"q": heads[:, :-2], "k": heads[:, -2], "v": heads[:, -1]}
    return {
        f"{block}self_attn.{proj}_proj.weight": part.reshape(-1, spec.hidden_size)
        for proj, part in rows.items()
    }


def hf_on_disk(directory: Path) -> dict[str, Words]:
    """Every tensor of an exported directory, as bits."""
    return {
        name: tensor.view(torch.int16).numpy()
        for path in directory.glob("*.safetensors")
        for name, tensor in load_file(path).items()
    }


def assert_equal(expected: Mapping[str, Words], found: Mapping[str, Words]) -> None:
    """The same names, and the same bits under each."""
    assert expected.keys() == found.keys()
    for name, words in expected.items():
        assert np.array_equal(words, found[name]), name


@pytest.mark.parametrize("format_", ["torch_dist", "torch"])
def test_a_trained_checkpoint_exports_to_the_weights_that_were_live(
    run: Run, format_: str, tmp_path: Path
) -> None:
    """Either format, TP, PP, uneven VPP, optimizer state beside the model, which is named."""
    report = export_checkpoint(run.root / format_, tmp_path / "hf", hf_model=run.hf)
    assert_equal(hf_of_ranks(run.spec, run.held), hf_on_disk(tmp_path / "hf"))
    assert any("optimizer" in note for note in report.notes)
    # Training has changed them all: an export of what it started from would not pass.
    before, after = hf_on_disk(run.hf), hf_on_disk(tmp_path / "hf")
    assert not [name for name in before if np.array_equal(before[name], after[name])]


def test_the_args_alone_give_the_configuration_of_a_trained_checkpoint(
    run: Run, tmp_path: Path
) -> None:
    """Without --hf-model the model that is written down is the one that was trained."""
    for format_ in ("torch_dist", "torch"):
        export_checkpoint(run.root / format_, tmp_path / format_)
        assert run.spec == read_spec(tmp_path / format_, carry=())


def test_training_goes_on_from_an_import_as_from_the_source(
    run: Run, pool: RankPool, tmp_path: Path
) -> None:
    """Megatron-Core's loader takes it, strict; the same steps then give the same bits."""
    import_checkpoint(run.hf, tmp_path / "megatron")
    resumed = pool.run(
        run.formed, ranks.resume, run.spec, run.layout, tmp_path / "megatron" / "iter_0000000"
    )
    for before, after in zip(run.held, resumed, strict=True):
        assert before["losses"] == after["losses"]
        assert_equal(before["tensors"], after["tensors"])
    assert torch.bfloat16 is resumed[0]["args"]["params_dtype"]
    assert run.spec.num_layers == resumed[0]["args"]["num_layers"]


@pytest.fixture(scope="module")
def tied(pool: RankPool, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A model with tied embeddings on two pipeline ranks: its source, its legacy checkpoint."""
    root = tmp_path_factory.mktemp("tied")
    write_checkpoint(toy_named("tied"), root / "hf", dtype="bfloat16")
    spec = read_spec(root / "hf", carry=())
    layout = parse_layout("tp2-pp2", spec)
    pool.run(layout, ranks.save_legacy, spec, layout, root / "hf", root / "torch")
    return root / "hf", root / "torch"


def test_a_tied_embedding_has_two_copies_and_comes_back_once(
    tied: tuple[Path, Path], tmp_path: Path
) -> None:
    """The last stage's copy is held against the first's and not exported."""
    hf, legacy = tied
    export_checkpoint(legacy, tmp_path / "hf", hf_model=hf)
    assert_equal(hf_on_disk(hf), hf_on_disk(tmp_path / "hf"))


def change(checkpoint: Path, rank: str, edit: Callable[[dict[str, Any]], None]) -> None:
    """Edit what a rank saved."""
    path = checkpoint / f"iter_{ranks.ITERATION:07d}" / rank / "model_optim_rng.pt"
    state = torch.load(path, weights_only=False)
    edit(state)
    torch.save(state, path)


def _other_copy(state: dict[str, Any]) -> None:
    state["model"]["output_layer.weight"][3, 5] += 1


def _other_norm(state: dict[str, Any]) -> None:
    state["model"]["decoder.layers.1.input_layernorm.weight"][7] += 1


def _short_shard(state: dict[str, Any]) -> None:
    state["model"]["decoder.layers.1.mlp.linear_fc2.weight"] = torch.zeros(
        96, 80, dtype=torch.bfloat16
    )


def _no_shard(state: dict[str, Any]) -> None:
    del state["model"]["decoder.layers.1.mlp.linear_fc2.weight"]


def _no_model(state: dict[str, Any]) -> None:
    del state["model"]


@pytest.mark.parametrize(
    ("edit", "rank", "word"),
    [
        (_other_copy, "mp_rank_01_001", "word_embeddings"),
        (_other_norm, "mp_rank_01_000", "input_layernorm"),
        (_short_shard, "mp_rank_01_001", "linear_fc2"),
        (_no_shard, "mp_rank_01_001", "linear_fc2"),
        (_no_model, "mp_rank_00_001", "no model"),
    ],
)
def test_ranks_that_contradict_each_other_are_named(
    tied: tuple[Path, Path],
    edit: Callable[[dict[str, Any]], None],
    rank: str,
    word: str,
    tmp_path: Path,
) -> None:
    """A copy, a norm or a shard that is another run's is an error that names it; no target."""
    hf, legacy = tied
    shutil.copytree(legacy, tmp_path / "torch")
    change(tmp_path / "torch", rank, edit)
    with pytest.raises(CorruptFileError, match=word):
        export_checkpoint(tmp_path / "torch", tmp_path / "hf", hf_model=hf)
    assert not (tmp_path / "hf").exists()


def test_missing_ranks_are_named(tied: tuple[Path, Path], tmp_path: Path) -> None:
    """Half a checkpoint is not exported as if it were a smaller model."""
    hf, legacy = tied
    shutil.copytree(legacy, tmp_path / "torch")
    shutil.rmtree(tmp_path / "torch" / "iter_0000003" / "mp_rank_01_000")
    with pytest.raises(CheckpointError, match="1 of 2 x 2 ranks") as caught:
        export_checkpoint(tmp_path / "torch", tmp_path / "hf", hf_model=hf)
    assert "mp_rank_01_000" in caught.value.where[0]


def test_a_checkpoint_with_another_order_of_qkv_rows_is_refused(
    tied: tuple[Path, Path], tmp_path: Path
) -> None:
    """Megatron-LM reorders those of version 0 and 1 when it loads them; here nothing guesses."""
    hf, legacy = tied
    shutil.copytree(legacy, tmp_path / "torch")
    change(tmp_path / "torch", "mp_rank_00_000", lambda state: state.pop("checkpoint_version"))
    with pytest.raises(CheckpointError, match="checkpoint_version 0"):
        export_checkpoint(tmp_path / "torch", tmp_path / "hf", hf_model=hf)


def test_layers_without_parameters_are_counted_or_the_checkpoint_is_refused(
    pool: RankPool, tmp_path: Path
) -> None:
    """A stage that ends in no-ops shows too few layers: an even split tells, another one cannot."""
    write_checkpoint(toy_named("ultra-253b"), tmp_path / "hf", dtype="bfloat16")
    spec = read_spec(tmp_path / "hf", carry=())
    for stages in ("4.4", "3.5"):
        layout = parse_layout(f"tp1-pp2-l{stages}", spec)
        pool.run(layout, ranks.save_legacy, spec, layout, tmp_path / "hf", tmp_path / stages)
    export_checkpoint(tmp_path / "4.4", tmp_path / "back", hf_model=tmp_path / "hf")
    assert_equal(hf_on_disk(tmp_path / "hf"), hf_on_disk(tmp_path / "back"))
    with pytest.raises(CheckpointError, match="7 of 8 layers"):
        export_checkpoint(tmp_path / "3.5", tmp_path / "other", hf_model=tmp_path / "hf")
