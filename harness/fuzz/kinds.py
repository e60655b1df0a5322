"""The table of what is fuzzed: a file of the world, how it is mutated, what reads it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from harness.fuzz import mutation, readers
from harness.fuzz import world as of
from harness.fuzz.mutation import Form
from harness.fuzz.readers import Reader

_HF_SHARD: Final = f"{of.HF}/model-00002-of-*.safetensors"
_IN_MEGATRON: Final = f"{of.MEGATRON}/{of.ITERATION}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """One kind of input.

    Args:
        name: As `--only` and `--replay` have it.
        path: Of the file in the world that is mutated; a glob, of which the first is taken.
        form: How.
        read: Reads it; see `harness.fuzz.readers`.
        share: Of the inputs, in proportion to the other kinds'.
        seeds: A directory of the world with further files to begin with.
        originals_refused: The file is one that is told and refused.
    """

    name: str
    path: str
    form: Form
    read: Reader
    share: float = 1.0
    seeds: str = ""
    originals_refused: bool = False

    def file(self, root: Path) -> Path:
        """The file in a world."""
        return min(root.glob(self.path))

    def originals(self, root: Path) -> list[bytes]:
        """What inputs are made of."""
        more = sorted((root / self.seeds).iterdir()) if self.seeds else []
        return [path.read_bytes() for path in (self.file(root), *more)]


def _kinds() -> Iterable[Kind]:
    m, r = mutation, readers
    yield Kind(
        name="config",
        path="llama/config.json",
        form=m.JSON,
        read=r.config("llama"),
        seeds="seeds/config",
        share=4,
    )
    yield Kind(
        name="config-inspected",
        path="llama/config.json",
        form=m.JSON,
        read=r.described,
        seeds="seeds/config",
        share=0.5,
    )
    yield Kind(name="safetensors", path=_HF_SHARD, form=m.SAFETENSORS, read=r.hf, share=2)
    yield Kind(
        name="safetensors-index",
        path=f"{of.HF}/model.safetensors.index.json",
        form=m.JSON,
        read=r.hf,
        share=1.5,
    )
    yield Kind(
        name="generation-config",
        path=f"{of.HF}/generation_config.json",
        form=m.JSON,
        read=r.generation_config,
    )
    yield Kind(
        name="tokenizer", path=f"{of.HF}/tokenizer.json", form=m.JSON, read=r.tokenizer, share=0.1
    )
    yield Kind(
        name="tokenizer-config",
        path=f"{of.HF}/tokenizer_config.json",
        form=m.JSON,
        read=r.tokenizer,
        share=0.1,
    )
    for name, directory in (("", of.MEGATRON), ("stacked-", of.STACKED)):
        inside, read = f"{directory}/{of.ITERATION}", r.megatron(directory)
        whole = r.megatron(directory, most=1000)
        yield Kind(
            name=f"{name}metadata", path=f"{inside}/.metadata", form=m.PICKLE, read=read, share=2
        )
        yield Kind(
            name=f"{name}common", path=f"{inside}/common.pt", form=m.ARCHIVE, read=read, share=1.5
        )
        yield Kind(
            name=f"{name}distcp", path=f"{inside}/*.distcp", form=m.RECORDS, read=whole, share=1.5
        )
    read = r.megatron(of.MEGATRON)
    yield Kind(name="metadata-json", path=f"{_IN_MEGATRON}/metadata.json", form=m.JSON, read=read)
    yield Kind(
        name="tracker",
        path=f"{of.MEGATRON}/latest_checkpointed_iteration.txt",
        form=m.TEXT,
        read=read,
        share=0.5,
    )
    yield Kind(
        name="hf-source-config", path=f"{of.MEGATRON}/hf_source/config.json", form=m.JSON, read=read
    )
    yield Kind(
        name="record",
        path=f"{of.MEGATRON}/nemotron_bridge.json",
        form=m.JSON,
        read=r.record,
        share=1.5,
    )
    yield Kind(name="nemo-common", path="nemo/weights/common.pt", form=m.ARCHIVE, read=r.nemo)
    yield Kind(name="nemo-metadata", path="nemo/weights/.metadata", form=m.PICKLE, read=r.nemo)
    yield Kind(name="run-config", path="foreign/*/run_config.yaml", form=m.YAML, read=r.run_config)
    yield Kind(
        name="legacy",
        path="legacy/*/mp_rank_01/model_optim_rng.pt",
        form=m.ARCHIVE,
        read=r.megatron("legacy"),
        share=2,
    )
    yield Kind(
        name="legacy-unzipped",
        path="unzipped/*/mp_rank_00/model_optim_rng.pt",
        form=m.PICKLE,
        read=r.megatron("unzipped"),
        originals_refused=True,
    )
    yield Kind(
        name="logits",
        path="texts/logits.safetensors",
        form=m.SAFETENSORS,
        read=r.logits,
        originals_refused=True,
    )
    yield Kind(name="input", path="texts/input.safetensors", form=m.SAFETENSORS, read=r.token_ids)
    yield Kind(name="golden", path="golden/cases/*.json", form=m.JSON, read=r.golden)
    yield Kind(name="golden-index", path="golden/index.json", form=m.JSON, read=r.golden)
    yield Kind(name="suite", path="texts/parity.toml", form=m.TEXT, read=r.suite)
    yield Kind(name="thresholds", path="texts/thresholds.toml", form=m.TEXT, read=r.thresholds)
    yield Kind(name="layouts", path="texts/layouts.toml", form=m.TEXT, read=r.layouts)
    yield Kind(name="variant", path="texts/variant.toml", form=m.TEXT, read=r.variant)
    yield Kind(
        name="evidence", path="report/evidence.json", form=m.JSON, read=r.evidence, share=0.5
    )
    for name, file, form in (
        ("evidence", "evidence.json", m.JSON),
        ("matrix", "faults.json", m.JSON),
        ("config", "config.json", m.JSON),
        ("sums", "SHA256SUMS", m.TEXT),
    ):
        yield Kind(
            name=f"bundle-{name}", path=f"bundle/{file}", form=form, read=r.bundle, share=0.05
        )
    yield Kind(name="journal", path="report/journal.jsonl", form=m.JSON_LINES, read=r.journal)
    yield Kind(
        name="faults-journal", path="faults/faults.jsonl", form=m.JSON_LINES, read=r.unit_journal
    )
    yield Kind(name="streamed", path="walk/streamed.npz", form=m.ARRAYS, read=r.walk)
    yield Kind(
        name="prompts",
        path="texts/prompts.jsonl",
        form=m.JSON_LINES,
        read=r.prompts("prompts.jsonl"),
    )
    yield Kind(
        name="prompts-text",
        path="texts/prompts.txt",
        form=m.TEXT,
        read=r.prompts("prompts.txt"),
        share=0.5,
    )
    yield Kind(name="replay", path="replay/replay.json", form=m.JSON, read=r.replay)
    yield Kind(name="marker", path="texts/marker.json", form=m.JSON, read=r.marker)
    yield Kind(name="flags", path="texts/flags.txt", form=m.TEXT, read=r.flags,
               seeds="seeds/flags", originals_refused=True)  # fmt: skip


KINDS: Final[tuple[Kind, ...]] = tuple(_kinds())
