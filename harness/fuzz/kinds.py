"""The table of what is fuzzed: a file of the world, how it is mutated, what reads it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from harness.fuzz import mutation as m
from harness.fuzz import readers as r
from harness.fuzz import world as of
from harness.fuzz.mutation import Form
from harness.fuzz.readers import Reader


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
        original_refused: The file is one that is told and refused.
    """

    name: str
    path: str
    form: Form
    read: Reader
    share: float = 1.0
    seeds: str = ""
    original_refused: bool = False

    def file(self, root: Path) -> Path:
        """The file in a world."""
        return min(root.glob(self.path))

    def originals(self, root: Path) -> list[bytes]:
        """What inputs are made of."""
        more = sorted((root / self.seeds).iterdir()) if self.seeds else []
        return [path.read_bytes() for path in (self.file(root), *more)]


def _kind(
    name: str,
    path: str,
    form: Form,
    read: Reader,
    share: float,
    **more: Any,  # noqa: ANN401 - Kind's
) -> Kind:
    return Kind(name=name, path=path, form=form, read=read, share=share, **more)


_READ_HF: Final = r.megatron(of.MEGATRON)
_READ_STACKED: Final = r.megatron(of.STACKED)
_IN_MEGATRON: Final = f"{of.MEGATRON}/{of.ITERATION}"
_IN_STACKED: Final = f"{of.STACKED}/{of.ITERATION}"
_CONFIGS: Final = "seeds/config"

# Shares are such that no kind takes much more time than another; none has fewer than some hundred
# of 100,000 inputs.
KINDS: Final[tuple[Kind, ...]] = (
    _kind("config", "llama/config.json", m.JSON, r.config("llama"), 6, seeds=_CONFIGS),
    _kind("config-inspected", "llama/config.json", m.JSON, r.described, 0.5, seeds=_CONFIGS),
    _kind("safetensors", "hf/model-00002-of-*.safetensors", m.SAFETENSORS, r.hf, 4),
    _kind("safetensors-index", "hf/model.safetensors.index.json", m.JSON, r.hf, 3),
    _kind("generation-config", "hf/generation_config.json", m.JSON, r.generation_config, 3),
    _kind("tokenizer", "hf/tokenizer.json", m.JSON, r.tokenizer, 0.2),
    _kind("tokenizer-config", "hf/tokenizer_config.json", m.JSON, r.tokenizer, 0.2),
    _kind("metadata", f"{_IN_MEGATRON}/.metadata", m.PICKLE, _READ_HF, 1.5),
    _kind("stacked-metadata", f"{_IN_STACKED}/.metadata", m.PICKLE, _READ_STACKED, 1.5),
    _kind("common", f"{_IN_MEGATRON}/common.pt", m.ARCHIVE, _READ_HF, 0.8),
    _kind("stacked-common", f"{_IN_STACKED}/common.pt", m.ARCHIVE, _READ_STACKED, 0.8),
    _kind("distcp", f"{_IN_MEGATRON}/*.distcp", m.RECORDS, r.megatron(of.MEGATRON, most=99), 0.4),
    _kind("stacked-distcp", f"{_IN_STACKED}/*.distcp", m.RECORDS,
          r.megatron(of.STACKED, most=99), 0.4),
    _kind("metadata-json", f"{_IN_MEGATRON}/metadata.json", m.JSON, _READ_HF, 0.5),
    _kind("tracker", "megatron/latest_checkpointed_iteration.txt", m.TEXT, _READ_HF, 0.3),
    _kind("hf-source-config", "megatron/hf_source/config.json", m.JSON, _READ_HF, 0.4),
    _kind("record", "megatron/nemotron_bridge.json", m.JSON, r.record, 2),
    _kind("nemo-metadata", "nemo/weights/.metadata", m.PICKLE, r.nemo, 0.6),
    _kind("nemo-common", "nemo/weights/common.pt", m.ARCHIVE, r.nemo, 0.4),
    _kind("run-config", "foreign/*/run_config.yaml", m.YAML, r.run_config, 3),
    _kind("legacy", "legacy/*/mp_rank_01/model_optim_rng.pt", m.ARCHIVE, r.megatron("legacy"), 1),
    _kind("legacy-unzipped", "unzipped/*/mp_rank_00/model_optim_rng.pt", m.PICKLE,
          r.megatron("unzipped"), 2, original_refused=True),
    _kind("logits", "texts/logits.safetensors", m.SAFETENSORS, r.logits, 3, original_refused=True),
    _kind("input", "texts/input.safetensors", m.SAFETENSORS, r.token_ids, 4),
    _kind("golden", "golden/cases/*.json", m.JSON, r.golden, 2),
    _kind("golden-index", "golden/index.json", m.JSON, r.golden, 2),
    _kind("suite", "texts/parity.toml", m.TEXT, r.suite, 1),
    _kind("thresholds", "texts/thresholds.toml", m.TEXT, r.thresholds, 1),
    _kind("layouts", "texts/layouts.toml", m.TEXT, r.layouts, 3),
    _kind("variant", "texts/variant.toml", m.TEXT, r.variant, 3),
    _kind("evidence", "report/evidence.json", m.JSON, r.evidence, 0.5),
    _kind("bundle-evidence", "bundle/evidence.json", m.JSON, r.bundle, 0.05),
    _kind("bundle-matrix", "bundle/faults.json", m.JSON, r.bundle, 0.05),
    _kind("bundle-config", "bundle/config.json", m.JSON, r.bundle, 0.05),
    _kind("bundle-sums", "bundle/SHA256SUMS", m.TEXT, r.bundle, 0.05),
    _kind("journal", "report/journal.jsonl", m.JSON_LINES, r.journal, 4),
    _kind("faults-journal", "faults/faults.jsonl", m.JSON_LINES, r.unit_journal, 4),
    _kind("streamed", "walk/streamed.npz", m.ARRAYS, r.walk, 1),
    _kind("prompts", "texts/prompts.jsonl", m.JSON_LINES, r.prompts("prompts.jsonl"), 4),
    _kind("prompts-text", "texts/prompts.txt", m.TEXT, r.prompts("prompts.txt"), 1),
    _kind("replay", "replay/replay.json", m.JSON, r.replay, 3),
    _kind("marker", "texts/marker.json", m.JSON, r.marker, 3),
    _kind("manifest", "megatron/nemotron_bridge.manifest.json", m.JSON, r.manifest, 1),
    _kind("site-job", "texts/job.json", m.JSON, r.site, 2),
    _kind("site-notes", "texts/done.jsonl", m.JSON_LINES, r.site, 2),
    _kind("flags", "texts/flags.txt", m.TEXT, r.flags, 3, seeds="seeds/flags",
          original_refused=True),
)  # fmt: skip
