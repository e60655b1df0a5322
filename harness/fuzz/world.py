"""Small real files of everything that is read, made by what makes the real ones.

    hf/ llama/              Hugging Face checkpoints, heterogeneous and plain, with tokenizers
    megatron/ stacked/      what imports of them leave
    legacy/ unzipped/       the same model in Megatron-LM's `torch` format, of today and of 2019
    nemo/ foreign/          the same as NeMo 2 keeps it; what Megatron-Bridge says of a checkpoint
    report/                 evidence and journals of a run; faults/ and walk/: of a matrix, a walk
    bundle/                 a qualification
    golden/ replay/ texts/  records, a failed case, suites, limits, prompts and the like
    seeds/KIND/             more to begin with

Nothing of it is read from elsewhere, and it is the same each time.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import shutil
from pathlib import Path
from typing import Any, Final

import numpy as np

from harness.errors import WorkerFailedError

HF, LLAMA = "hf", "llama"
MEGATRON, STACKED = "megatron", "stacked"
ITERATION: Final = "iter_0000000"
RANKS: Final = ("mp_rank_00", "mp_rank_01")


def build_world(root: Path) -> None:
    """Write all of it, in a process of its own: torch is needed, and stays there.

    Raises:
        WorkerFailedError: HN202, that process failed; it has said why.
    """
    made = multiprocessing.get_context("spawn").Process(target=write_world, args=(root,))
    made.start()
    made.join()
    if made.exitcode:
        raise WorkerFailedError(
            f"the files to be mutated could not be made: exit {made.exitcode}",
            where=str(root),
            hint="what the process said is above",
        )


def write_world(root: Path) -> None:
    """Write all of it here."""
    from harness.fuzz import world_reports

    root.mkdir()
    _checkpoints(root)
    _legacy(root)
    _nemo(root)
    _configs(root / "seeds" / "config")
    world_reports.write(root)


def tiny(name: str, **changes: Any) -> dict[str, Any]:  # noqa: ANN401 - JSON
    """A toy's configuration, smaller still."""
    from harness.toys import toy_named

    config = dict(toy_named(name).config)
    if config.get("block_configs"):
        config["block_configs"] = config["block_configs"][:4]
        config["num_hidden_layers"] = 4
    small = {"hidden_size": 32, "num_attention_heads": 4, "vocab_size": 90, "bos_token_id": 1}
    return config | small | {"eos_token_id": [2, 3]} | changes


def _checkpoints(root: Path) -> None:
    from bridge.convert import import_checkpoint

    llama = {"num_hidden_layers": 2, "intermediate_size": 48, "num_key_value_heads": 2}
    for name, target, config in (
        (HF, MEGATRON, tiny("super-49b-v1", block_configs=_blocks())),
        (LLAMA, STACKED, tiny("nano-4b", head_dim=8, **llama)),
    ):
        _write_hf(root / name, config)
        import_checkpoint(root / name, root / target, tensor_model_parallel_size=2)


def _blocks() -> list[dict[str, Any]]:
    """A block of each kind of the released schema."""
    from harness.toys import toy_named

    first = toy_named("super-49b-v1").config["block_configs"][0]

    def part(kind: str, **fields: Any) -> dict[str, Any]:  # noqa: ANN401 - JSON
        plain: dict[str, Any] = {"no_op": False, "replace_with_linear": False}
        return {**first[kind], **plain, **fields}

    linear, none = {"replace_with_linear": True}, {"no_op": True}
    return [
        {"attention": part("attention", n_heads_in_group=2), "ffn": part("ffn", ffn_mult=1.0)},
        {
            "attention": part("attention", n_heads_in_group=None, **linear),
            "ffn": part("ffn", ffn_mult=2.0),
        },
        {
            "attention": part("attention", n_heads_in_group=None, **none),
            "ffn": part("ffn", ffn_mult=None, **linear),
        },
        {
            "attention": part("attention", n_heads_in_group=1),
            "ffn": part("ffn", ffn_mult=None, **none),
        },
    ]  # fmt: skip


def _write_hf(directory: Path, config: dict[str, Any]) -> None:
    """A checkpoint in several files, with all that stands beside weights."""
    from bridge.reading import TransferLimits
    from bridge.storage.synthetic import synthesize

    bare = directory.with_suffix(".json")
    bare.write_text(json.dumps(config, indent=1), "utf-8")
    synthesize(bare, directory, seed=7, max_shard_size=30_000, limits=TransferLimits())
    bare.unlink()
    words = {f"w{token}": token for token in range(config["vocab_size"])}
    tokenizer: dict[str, Any] = {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": [],
        "normalizer": None, "pre_tokenizer": {"type": "WhitespaceSplit"}, "post_processor": None,
        "decoder": None, "model": {"type": "WordLevel", "vocab": words, "unk_token": "w0"},
    }  # fmt: skip
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "w1", "eos_token": "w2"}
    generation = {"bos_token_id": 1, "eos_token_id": [2, 3], "temperature": 0.6}
    for name, value in (
        ("tokenizer.json", tokenizer),
        ("tokenizer_config.json", settings),
        ("generation_config.json", generation),
    ):
        (directory / name).write_text(json.dumps(value), "utf-8")


def _configs(directory: Path) -> None:
    """A configuration of each published variant, and of each toy."""
    from harness.locations import suites_dir
    from harness.toys import TOYS

    directory.mkdir(parents=True)
    for path in sorted((suites_dir() / "variants").glob("*.json")):
        shutil.copyfile(path, directory / path.name)
    for name, toy in TOYS.items():
        (directory / f"toy-{name}.json").write_text(json.dumps(toy.config, indent=1), "utf-8")


def _legacy(root: Path) -> None:
    """The import of `llama` as two TP ranks of Megatron-LM would have saved it."""
    import torch

    from bridge.agreement import described_model
    from bridge.dtypes import Dtype
    from bridge.parameters import parameters
    from bridge.storage.megatron import MegatronSource

    with MegatronSource(root / STACKED) as source:
        spec, _ = described_model(source)
        args = {
            name: getattr(torch, value.name) if isinstance(value, Dtype) else value
            for name, value in (source.args or {}).items()
        } | {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 1}
        padded = int(args["padded_vocab_size"])
        for tp_rank, name in enumerate(RANKS):
            model = {}
            for parameter in parameters(spec, padded_vocab_size=padded).values():
                pieces = []
                cut = parameter.shard_boxes(tp_rank, 2) if parameter.tp_axis is not None else None
                for box in cut or parameter.shard_boxes(0, 1):
                    dtype = source.tensors[parameter.name].dtype
                    words = np.empty(box.shape, dtype.word)
                    source.read_into(parameter.name, box, words)
                    signed = torch.from_numpy(words.view(f"<i{words.itemsize}"))
                    pieces.append(signed.view(getattr(torch, dtype.name)))
                model[parameter.name] = torch.cat(pieces, dim=parameter.tp_axis or 0)
            state = {
                "model": model,
                "args": argparse.Namespace(**args, rank=tp_rank),
                "checkpoint_version": 3.0,
                "iteration": 5,
                "rng_state": [{"random_rng_state": (3, (1, 2, 3), None)}],
            }
            for directory, zipped in (("legacy", True), ("unzipped", False)):
                place = root / directory / "iter_0000005" / name
                place.mkdir(parents=True)
                torch.save(
                    state,
                    place / "model_optim_rng.pt",
                    _use_new_zipfile_serialization=zipped,
                )
    for directory in ("legacy", "unzipped"):
        (root / directory / "latest_checkpointed_iteration.txt").write_text("5", "utf-8")


def _nemo(root: Path) -> None:
    """The import of `hf` by NeMo's names: no tracker, no iteration in a name, no args."""
    from bridge.storage.torch_record import object_record

    weights = root / "nemo" / "weights"
    shutil.copytree(root / MEGATRON / ITERATION, weights)
    (weights / "common.pt").write_bytes(object_record({"global_step": 12, "epoch": 0}))
    context = root / "nemo" / "context"
    context.mkdir()
    foreign = root / "foreign" / "iter_0000003"
    foreign.mkdir(parents=True)
    shutil.copyfile(weights / "metadata.json", foreign / "metadata.json")
    (foreign / "run_config.yaml").write_text(
        "model:\n  _target_: megatron.bridge.models.GPTModelProvider\n  num_layers: 2\n"
        "  hf_model_id: nvidia/a\n  rope: &rope\n    base: 1.0e+4\n  again: *rope\n",
        "utf-8",
    )
    (context / "model.yaml").write_text("_target_: nemo.collections.llm.LlamaModel\n", "utf-8")
