"""The part of the world that runs leave: evidence, journals, goldens, references, texts."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np

IDENTITY: Final[Mapping[str, Any]] = {
    "code": "b" * 64, "cases": ["config/tied/float32"], "inputs": {"tied": {"sha": "a" * 64}},
    "thresholds": "c" * 64, "fault_names": ["rope-theta"],
}  # fmt: skip
"""Of every journal here, and of the run that takes it up."""
GOLDEN_NAME: Final = "toy-tied-float32"
STARTED: Final = "2026-01-02T03:04:05+00:00"


def write(root: Path) -> None:
    """Write all of it; the checkpoints are there."""
    _report(root / "report")
    _faults(root / "faults")
    _walk(root / "walk")
    _golden(root / "golden")
    _bundle(root / "bundle")
    _texts(root / "texts")
    _references(root)
    from harness.replay import Replay, save_replay
    from harness.toys import toy_named

    replay = Replay(check="logits", layout="tp2-pp1", probe="long")
    save_replay(root / "replay", toy_named("tied").config, replay, summary="1 of 4 differ")


def _results(cases: Sequence[Any]) -> list[Any]:
    """Results that nobody measured."""
    from harness.compare import Finding
    from harness.runner import Result

    places = ["model.norm.weight[3]"]
    by_position = {
        "positions": [0, 1, 8192], "candidate_error": [1e-7, 2e-7, 3e-7],
        "reference_error": [1e-7, 2e-7, 2e-7], "max_abs_diff": [0.0, 1e-7, 2e-7],
        "kl": [0.0, 1e-14, 2e-14], "top1": [1.0, 1.0, 1.0], "top5": [1.0, 1.0, 0.8],
    }  # fmt: skip
    block = {"layer_idx": 0, "kind": "SwiGLU 64", "teacher_excess": 0.9, "free_excess": 1.0}
    details: dict[str, Any] = {
        "by_position": by_position, "ulp_histogram": {"0": 10, "inf": 3}, "blocks": [block],
    }  # fmt: skip
    return [
        Result(
            case=case, status="passed", seconds=0.25,
            finding=Finding(
                passed=True, summary="0 differences", value=0.5, limit=2.0, unit="times",
                places=tuple(places[: number % 2]), details=details if number % 3 else {},
            ),
        )
        for number, case in enumerate(cases)
    ]  # fmt: skip


def _evidence(cases: Sequence[Any], inputs: Mapping[str, Any]) -> dict[str, Any]:
    from harness.report.digests import code_sha256
    from harness.report.evidence import Provenance, evidence
    from harness.runner import RunReport
    from harness.thresholds import load_thresholds

    provenance = Provenance(
        command=["nemotron-bridge", "parity", "--report", "D"], suite="parity", started=STARTED,
        inputs=inputs, environment={"nemotron-bridge": "1", "python": "3", "versions": {"x": "1"}},
        hardware={"cpu": "A CPU", "cores": 2, "memory_bytes": 8 << 30, "gpus": []},
        code_sha256=code_sha256(), thresholds=load_thresholds(),
        memory={"main_bytes": 1 << 30, "largest_rank_bytes": 3 << 29},
    )  # fmt: skip
    return evidence(RunReport(results=_results(cases), seconds=12.5), provenance)


def _report(directory: Path) -> None:
    from harness.report.evidence import FILE_NAME, to_json
    from harness.report.journal import Journal
    from harness.suite import Case

    directory.mkdir()
    cases = [
        Case(check="config", model="tied", dtype="float32"),
        Case(check="logits", model="tied", dtype="float32", layout="tp2-pp1", probe="long"),
        Case(check="blocks", model="tied", dtype="float32", layout="tp1-pp1", probe="short"),
    ]
    files = {"model.safetensors": {"bytes": 12345, "sha256": "a" * 64}}
    found = _evidence(cases, {"tied": {"config_sha256": "0" * 64, "weight_files": files}})
    (directory / FILE_NAME).write_text(to_json(found), "utf-8")
    with Journal.begin(directory, IDENTITY, started=STARTED) as journal:
        for seconds, result in enumerate(_results(cases)):
            journal.add(result, seconds=seconds)


def _units(names: Sequence[str], toy: str) -> list[Any]:
    from harness.faults.units import Unit

    return [
        Unit(
            fault=name, toy=toy, killed_by=("logits",), first=f"logits/{toy}/x: failed",
            checks=("logits", "config"), seconds=1.5, seconds_by_check={"logits": 1.0},
        )
        for name in names
    ]  # fmt: skip


def _faults(directory: Path) -> None:
    from harness.faults.journal import UnitJournal

    directory.mkdir()
    with UnitJournal.begin(directory, IDENTITY) as journal:
        for unit in _units(("rope-theta", "gate-up-swapped"), "tied"):
            journal.add(unit)


def _walk(directory: Path) -> None:
    from harness.block_states import judgement_of
    from harness.metrics import Excess
    from harness.streaming.record import PartError, Record, Store
    from harness.thresholds import load_thresholds

    directory.mkdir()
    errors = np.full((1, 3), 1e-7)
    measured = Excess(
        problems=(), value=1.0, candidate_error=1e-7, reference_error=1e-7, floor=1e-9, scale=1.0,
        candidate_by_position=errors, reference_by_position=errors,
    )  # fmt: skip
    judgement = judgement_of(
        0, "SwiGLU 64", measured, measured, dtype="float32", thresholds=load_thresholds()
    )
    part = PartError(name="rows 0-9", kind="SwiGLU 64", segment_idx=1, candidate=0.1, reference=0.1)
    record = Record(judgements={"short": [judgement]}, parts={"short": {0: [part]}})
    states = {"short": np.zeros((1, 3, 8), np.float32)}
    Store(directory, IDENTITY).save(1, record, states)


def _golden(directory: Path) -> None:
    from harness.golden.store import Index, file_of, index_text, record_text, sha256_of

    path = directory / file_of(GOLDEN_NAME)
    path.parent.mkdir(parents=True)
    header = {"name": GOLDEN_NAME, "model": "tied", "dtype": "float32", "seed": 0, "traits": ["a"]}
    fields = {"plan": "d" * 64, "tensors": {"x": "e" * 64}, "logits": [[0.5, 1.25], [2.0, -1.0]]}
    path.write_text(record_text(header, fields), "utf-8")
    entry = {"file": file_of(GOLDEN_NAME), "sha256": sha256_of(path), "recording": 0}
    recording = {"date": "2026-01-02", "reason": "the first", "versions": {"torch": "2"}}
    index = Index(recordings=[recording], entries={GOLDEN_NAME: entry})
    (directory / "index.json").write_text(index_text(index), "utf-8")


def _bundle(directory: Path) -> None:
    """A qualification whose numbers nobody measured; all else of it is as it would be."""
    from bridge.drawing.architecture import architecture
    from bridge.hf_config import spec_from_hf_config
    from harness.fuzz.world import tiny
    from harness.qualify.bundle import write_bundle
    from harness.qualify.origin import Origin
    from harness.qualify.scope import Choices, scope_of
    from harness.qualify.trial import matrix_data
    from harness.report.evidence import FILE_NAME, strict, to_json

    directory.mkdir()
    config = tiny("nano-4b", num_hidden_layers=1, num_key_value_heads=2, intermediate_size=48)
    raw = json.dumps(config, indent=1).encode()
    choices = Choices(name="odd", weights="synthetic", faults=("rope-theta",))
    scope = scope_of(config, choices, where="config.json")
    inputs = {
        name: {
            "config_sha256": "0" * 64, "weight_files": {},
            "architecture": strict(architecture(spec, None, name="").as_data()),
        }
        for name, spec in (
            ("odd", scope.spec), (scope.twin.toy.name, spec_from_hf_config(scope.twin_config))
        )
    }  # fmt: skip
    (directory / FILE_NAME).write_text(to_json(_evidence(scope.cases, inputs)), "utf-8")
    units = [one.to_dict() for one in _units(scope.faults, scope.twin.toy.name)]
    write_bundle(directory, scope, Origin(), matrix_data(units, scope, 1.0, []), config=raw)


def _texts(directory: Path) -> None:
    from harness.locations import suites_dir

    directory.mkdir()
    for name in ("parity.toml", "thresholds.toml", "layouts.toml"):
        shutil.copyfile(suites_dir() / name, directory / name)
    (directory / "variant.toml").write_text(
        'schema_version = 1\ndescription = "a model"\nhf_id = "nvidia/a"\nnum_parameters = 5\n'
        'config = "a.json"\n',
        "utf-8",
    )
    lines: list[Any] = [
        {"prompt": "Is 221 prime?"},
        {"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "hi"}]},
        {"token_ids": [1, 2, 3]},
    ]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (directory / "prompts.jsonl").write_text(text, "utf-8")
    (directory / "prompts.txt").write_text("Is 221 prime?\nw1 w2\n", "utf-8")
    (directory / "flags.txt").write_text("tp2-pp2-vp2\n", "utf-8")
    more = directory.parent / "seeds" / "flags"
    more.mkdir(parents=True)
    for number, flag in enumerate(("1GiB", "tp1-pp2-l5.3", "512MB", "float32,bfloat16", "tp2-pp1")):
        (more / f"{number}.txt").write_text(flag, "utf-8")
    held = {"claim": "f" * 32, "host": "somewhere", "pid": 4321}
    (directory / "marker.json").write_text(json.dumps(held), "utf-8")
    job = {"format_version": 1, "what": {"plan": "1"}, "source": {"b": "2"}}
    (directory / "job.json").write_text(json.dumps(job), "utf-8")
    note = {"file": "a", "size": 5, "mtime_ns": 1}
    (directory / "done.jsonl").write_text(f"{json.dumps(note)}\n" * 2, "utf-8")


def _references(root: Path) -> None:
    """Logits, and token ids to make some of."""
    from safetensors.numpy import save_file

    from harness.detached import DetachedReference, Provenance, write_reference

    provenance = Provenance(
        config_sha256="0" * 64, spec_sha256="1" * 64, weights_sha256="2" * 64,
        inputs_sha256="3" * 64, dtype="float32", device="cpu", implementation="transformers",
        versions={"torch": "2", "transformers": None}, inv_freq=np.ones(4, np.float32),
    )  # fmt: skip
    logits = np.zeros((1, 3, 90), np.float32)
    write_reference(
        root / "texts" / "logits.safetensors",
        DetachedReference(logits=logits, provenance=provenance),
    )
    tokens = {"input_ids": np.array([[1, 2, 3]]), "position_ids": np.array([0, 5, 9])}
    save_file(tokens, root / "texts" / "input.safetensors")
