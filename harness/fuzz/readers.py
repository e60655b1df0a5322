"""What reads each kind of input: the highest function of the project's that stays fast.

Each takes the root of a world, and either returns or raises what the project raises for its users.
"""

from __future__ import annotations

import hashlib
import re
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Final

import numpy as np

from bridge.storage.source import TensorSource
from bridge.tiling import Box, bands
from harness.fuzz import world
from harness.fuzz.world_reports import GOLDEN_NAME, IDENTITY

Reader = Callable[[Path], object]

_ALL: Final = 1000
_PIECE: Final = 1 << 16  # elements; conversions read in bands, too, whatever a tensor's size


def _read_some(source: TensorSource, most: int) -> None:
    """The first band of each of the first tensors."""
    for name in list(source.tensors)[:most]:
        info = source.tensors[name]
        for band in bands(Box.whole(info.shape), max_elements=_PIECE):
            source.read_into(name, band, np.empty(band.shape, info.dtype.word))
            break


def config(directory: str) -> Reader:
    """`inspect`, `plan` and `generate` of a configuration: what they look at before weights."""

    def read(root: Path) -> None:
        from bridge.casting import stated_dtype
        from bridge.consumers import consumer_refusals
        from bridge.convert import read_spec
        from bridge.generation.text import stop_token_ids
        from bridge.hf_config import CONFIG_NAME, hf_config_from_spec, load_hf_config
        from bridge.pipeline import plan_layout

        path = root / directory
        spec = read_spec(path)
        stated_dtype((path / CONFIG_NAME).read_bytes(), where=str(path))
        stop_token_ids(None, load_hf_config(path), None)
        consumer_refusals(spec, load_hf_config(path))
        hf_config_from_spec(spec)
        plan_layout(spec, tensor_model_parallel_size=2, pipeline_model_parallel_size=2)

    return read


def described(root: Path) -> None:
    """`inspect` of a configuration, to its end."""
    from bridge.convert import read_spec
    from bridge.describe import describe
    from bridge.drawing.architecture import architecture
    from bridge.pipeline import plan_layout
    from bridge.plan import Plan

    spec = read_spec(root / world.LLAMA)
    layout = plan_layout(spec, tensor_model_parallel_size=1, pipeline_model_parallel_size=2)
    describe(spec, layout)
    architecture(spec, layout, name="x")
    Plan(spec, spec.padded_vocab_size(2)).digest()


def hf(root: Path) -> None:
    """`import`, up to the first byte that it would write, and the weights."""
    from bridge.convert import read_spec
    from bridge.parameters import hf_tensors
    from bridge.plan import account_for
    from bridge.storage.safetensors import SafetensorsSource

    path = root / world.HF
    with SafetensorsSource(path) as source:
        _read_some(source, _ALL)
        account_for(hf_tensors(read_spec(path)), source.tensors, where=str(path))


def megatron(directory: str, *, most: int = 3) -> Reader:
    """`export`, up to the first byte that it would write, and `most` of its tensors."""

    def read(root: Path) -> None:
        from bridge.agreement import described_model
        from bridge.plan import Plan, account_for
        from bridge.storage.megatron import MegatronSource

        with MegatronSource(root / directory) as source:
            _read_some(source, most)
            spec, _ = described_model(source)
            plan = Plan.of_checkpoint(spec, source.tensors)
            account_for(plan.mcore_shapes, source.tensors, where=str(root))
            plan.target_dtypes(plan.mcore_to_hf, source.tensors, where=str(root))

    return read


def nemo(root: Path) -> None:
    """`export` of what NeMo left, with the model's own configuration."""
    from bridge.agreement import described_model
    from bridge.storage.megatron import MegatronSource

    with MegatronSource(root / "nemo") as source:
        _read_some(source, 3)
        described_model(source, root / world.HF)


def record(root: Path) -> None:
    """What an export does with the record of an import."""
    from bridge.casting import files_in
    from bridge.dtypes import dtype_named
    from bridge.record import read_record
    from bridge.side_files import refuse_changed_config
    from bridge.storage.safetensors_layout import layout_like

    path = root / world.MEGATRON
    found = read_record(path)
    if found is None:
        return
    refuse_changed_config(found, path / "hf_source")
    headers = found.shard_headers(str(path))
    layout_like({}, headers, found.index, max_shard_size=1 << 20)
    files_in(headers, found.index, dtype_named("float16"), where=str(path))


def run_config(root: Path) -> None:
    """`AutoBridge.get_hf_model_id_from_checkpoint` of a foreign checkpoint."""
    from bridge.auto.checkpoints import hf_model_id_of

    hf_model_id_of(root / "foreign" / "iter_0000003")


def generation_config(root: Path) -> None:
    """Which tokens end a text."""
    from bridge.generation.text import stop_token_ids

    stop_token_ids(root / world.HF, {}, None)


def tokenizer(root: Path) -> None:
    """Words to tokens and back."""
    from bridge.generation.text import Tokenizer

    found = Tokenizer(root / world.HF)
    found.decode(found.encode("w1 w2 w99"))


def logits(root: Path) -> None:
    """`verify --reference-logits`."""
    from bridge.convert import read_spec
    from bridge.hf_config import load_hf_config
    from harness.detached import check_weights, match_references, read_reference
    from harness.probes import probes

    found = [read_reference(root / "texts" / "logits.safetensors")]
    check_weights(found, "2" * 64)
    spec = read_spec(root / world.LLAMA)
    known = list(probes(spec.vocab_size, max_position_embeddings=spec.max_position_embeddings))
    match_references(
        found, spec=spec, config=load_hf_config(root / world.LLAMA), dtype="float32", probes=known
    )


def token_ids(root: Path) -> None:
    """`verify --input` and `logits --input`."""
    from bridge.convert import read_spec
    from harness.logits_file import as_probe, read_input

    as_probe(read_input(root / "texts" / "input.safetensors"), read_spec(root / world.LLAMA))


def golden(root: Path) -> None:
    """What is on record, held against something else."""
    from harness.golden.compare import differences
    from harness.golden.store import load_index, load_record

    load_index(root / "golden")
    found = load_record(root / "golden", GOLDEN_NAME)
    if found is not None:
        differences(found.fields, {"plan": "", "tensors": {}, "logits": [[1.0]]})


def suite(root: Path) -> None:
    """`parity --suite FILE`."""
    from harness.suite import load_suite

    load_suite(str(root / "texts" / "parity.toml"))


def thresholds(root: Path) -> None:
    """Limits."""
    from harness.thresholds import load_thresholds

    load_thresholds(root / "texts" / "thresholds.toml").for_hidden_size(16384)


def layouts(root: Path) -> None:
    """Layouts by name."""
    from harness.layouts import read_layouts

    read_layouts(root / "texts" / "layouts.toml")


def variant(root: Path) -> None:
    """`qualify --suite FILE`."""
    from harness.qualify.suites import load_variant

    load_variant(str(root / "texts" / "variant.toml"))


def evidence(root: Path) -> None:
    """`diff`, and every report that is made of evidence."""
    from harness.report.card import card, to_yaml
    from harness.report.diff import as_text, compare_runs
    from harness.report.evidence import read_evidence
    from harness.report.junit import junit
    from harness.report.markdown import markdown

    found = read_evidence(root / "report")
    as_text(compare_runs(found, found))
    junit(found)
    markdown(found)
    if "qualification" in found:
        to_yaml(card(found))


def bundle(root: Path) -> None:
    """`qualify --check`."""
    from harness.qualify.audit import audit

    audit(root / "bundle")


def journal(root: Path) -> None:
    """`parity --resume`."""
    from harness.report.journal import Journal

    Journal.resume(root / "report", IDENTITY).close()


def unit_journal(root: Path) -> None:
    """`faults --resume`."""
    from harness.faults.journal import UnitJournal

    with UnitJournal.resume(root / "faults", IDENTITY) as found:
        for unit in found.earlier:
            unit.to_dict()


def walk(root: Path) -> None:
    """`verify --stream --resume`."""
    from harness.streaming.record import Store
    from harness.thresholds import load_thresholds

    Store(root / "walk", IDENTITY).load(dtype="float32", thresholds=load_thresholds())


def prompts(name: str) -> Reader:
    """`generate --prompts FILE`."""

    def read(root: Path) -> None:
        from bridge.generation.prompts import given_prompts

        for prompt in given_prompts((), root / "texts" / name):
            if prompt.token_ids is not None:
                prompt.encode(None, chat=False, system=None)

    return read


def replay(root: Path) -> None:
    """`replay DIR`."""
    from harness.replay import load_replay

    load_replay(root / "replay")


def _here() -> bytes:
    return socket.gethostname().encode()


def marker(root: Path) -> None:
    """What a killed upload has left below the URL of a target."""
    from bridge.storage.remote import RemotePath, parse_location
    from bridge.storage.remote_target import MARKER_NAME, new_prefix

    target = parse_location("memory://fuzz/target")
    assert isinstance(target, RemotePath)  # noqa: S101 - of a URL it is
    # As of this machine: of another's process nothing is asked.
    data = (root / "texts/marker.json").read_bytes().replace(b"somewhere", _here())
    target.fs.pipe_file(f"{target.path}/{MARKER_NAME}", data)
    with new_prefix(target, overwrite=False, staging=root, last=()):
        pass


def manifest(root: Path) -> None:
    """`verify --manifest`, of one whose own hash is right: a stranger can see to that."""
    from bridge.manifest_check import check_manifest
    from bridge.storage.target import MANIFEST_NAME

    path = root / world.MEGATRON / MANIFEST_NAME
    raw = path.read_bytes()
    found = re.search(rb'"sha256_of_this_file": "([0-9a-f]{64})"', raw)
    if found is not None:
        unsigned = raw[: found.start(1)] + b"0" * 64 + raw[found.end(1) :]
        digest = hashlib.sha256(unsigned).hexdigest().encode()
        path.write_bytes(unsigned.replace(b"0" * 64, digest))
    check_manifest(root / world.MEGATRON)


def site(root: Path) -> None:
    """What a killed conversion has left beside its target, as `--resume` reads it."""
    from bridge.storage.building import building_site, site_of
    from bridge.storage.journal import Job, open_journal
    from bridge.storage.locks import LOCK_NAME

    target = root / "texts" / "target"
    place = site_of(target)
    (place / "data").mkdir(parents=True, exist_ok=True)
    (place / "data" / "a").write_bytes(b"12345")
    (place / LOCK_NAME).touch()
    kept = {"job.json": "job.json", "done.jsonl": "done-here-1"}
    for file, there in kept.items():
        (place / there).write_bytes((root / "texts" / file).read_bytes())
    job = Job(what={"plan": "1"}, source={"b": "2"}, sizes={"a": 5}, resume=True)
    with building_site(target, overwrite=False) as held:
        open_journal(held, job)


def flags(root: Path) -> None:
    """Sizes, layouts and lists that a command line takes."""
    from bridge.console import parse_size
    from bridge.convert import read_spec
    from bridge.errors import BridgeError
    from harness.layouts import resolve_layout
    from harness.verification import checks_named

    text = (root / "texts" / "flags.txt").read_bytes().decode("utf-8", "surrogateescape")
    spec = read_spec(root / world.LLAMA)
    refused: BridgeError | None = None
    for read in (parse_size, checks_named, lambda one: resolve_layout(one, spec)):
        try:
            read(text)
        except BridgeError as error:  # the others are to be asked, too
            refused = error
    if refused is not None:
        raise refused
