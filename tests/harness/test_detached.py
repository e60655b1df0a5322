"""Files of reference logits: what they say of themselves, and which of them are refused."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

from bridge.hf_config import spec_from_hf_config
from bridge.spec import ModelSpec
from harness.detached import (
    DetachedReference,
    Provenance,
    check_weights,
    match_references,
    read_reference,
    write_reference,
)
from harness.errors import DetachedReferenceError
from harness.identity import config_sha256, inputs_sha256, spec_sha256
from harness.probes import Probe, probes
from harness.toys import toy_named

CONFIG = toy_named("nano-4b").config_for("float32")
SPEC: ModelSpec = spec_from_hf_config(CONFIG)
PROBES = probes(SPEC.vocab_size, max_position_embeddings=SPEC.max_position_embeddings)
FREQUENCIES = np.linspace(1, 0.1, SPEC.kv_channels // 2, dtype=np.float32)


def reference(probe: Probe = PROBES[0], **changes: Any) -> DetachedReference:  # noqa: ANN401 - any field
    """What a healthy run would have written, some of it changed."""
    shape = (*probe.input_ids.shape, SPEC.vocab_size)
    found = Provenance(
        config_sha256=config_sha256(CONFIG),
        spec_sha256=spec_sha256(SPEC),
        weights_sha256="weights",
        inputs_sha256=inputs_sha256(probe.input_ids, probe.position_ids),
        dtype="float32",
        device="cuda",
        implementation="somebody's",
        versions={"torch": "2.13.0", "megatron-core": None},
        inv_freq=FREQUENCIES,
    )
    logits = changes.pop("logits", np.ones(shape, np.float32))
    provenance = dataclasses.replace(found, **changes)
    return DetachedReference(logits=logits, provenance=provenance, where=f"{probe.name}.st")


def matched(*files: DetachedReference) -> dict[str, DetachedReference]:
    """By probe, for a float32 run."""
    return match_references(files, spec=SPEC, config=CONFIG, dtype="float32", probes=PROBES)


def refusal(*files: DetachedReference) -> str:
    """What is said of files that do not belong to the model."""
    with pytest.raises(DetachedReferenceError) as caught:
        matched(*files)
    assert caught.value.code == "HN104"
    assert caught.value.hint
    return "\n".join(caught.value.where)


def test_a_file_gives_back_what_was_written(tmp_path: Path) -> None:
    """Logits and frequencies bit for bit, every field, and nothing but `logits` as a tensor."""
    written = reference(logits=np.array([[[1e-8, -3.5]]], np.float32))
    write_reference(tmp_path / "file", written)
    found = read_reference(tmp_path / "file")
    np.testing.assert_array_equal(found.logits, written.logits)
    assert found.logits.dtype == np.float32
    assert found.provenance.to_metadata() == written.provenance.to_metadata()
    assert found.provenance.inv_freq is not None
    np.testing.assert_array_equal(found.provenance.inv_freq, FREQUENCIES)
    with safe_open(tmp_path / "file", framework="numpy") as file:
        assert list(file.keys()) == ["logits"]
        assert file.metadata()["weights_sha256"] == "weights"


def test_files_are_matched_to_probes_by_their_inputs() -> None:
    """Whatever they are called and in whatever order they are given."""
    short, long = reference(PROBES[0]), reference(PROBES[1])
    assert matched(long, short) == {"short": short, "long": long}
    assert matched(long) == {"long": long}
    without = reference(config_sha256=None, inv_freq=None)  # as Megatron-Core's are
    assert matched(without) == {"short": without}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"spec_sha256": "0"}, "short.st: other configuration: of another model"),
        ({"config_sha256": "0"}, "other configuration: the model is the same"),
        ({"inputs_sha256": "0"}, "other inputs: none of the probes short, long"),
        ({"dtype": "bfloat16"}, "other dtype: computed in bfloat16, this run is in float32"),
        ({"logits": np.ones((2, 23, SPEC.vocab_size), np.float32)}, "logits have shape (2, 23,"),
        ({"logits": np.ones((2, 24, SPEC.vocab_size))}, "logits are float64, not float32"),
        ({"logits": np.full((2, 24, SPEC.vocab_size), np.nan, np.float32)}, "not finite"),
        ({"inv_freq": FREQUENCIES[1:]}, "inv_freq is not"),
        ({"inv_freq": FREQUENCIES * np.float32(np.inf)}, "inv_freq is not"),
    ],
)
def test_a_file_of_anything_else_is_refused_by_name(changes: dict[str, Any], said: str) -> None:
    """One line for what differs, and no other."""
    assert said in refusal(reference(**changes))
    assert refusal(reference(**changes)).count("\n") == 0


def test_everything_that_is_wrong_is_said_at_once() -> None:
    """Of all files, each with its own place."""
    said = refusal(
        reference(PROBES[0], dtype="bfloat16", spec_sha256="0"), reference(PROBES[1], dtype="other")
    )
    assert [line.partition(": ")[0] for line in said.splitlines()] == [
        "short.st", "short.st", "long.st",
    ]  # fmt: skip


def test_a_probe_has_one_reference() -> None:
    """Of two files nobody would know which was meant."""
    assert "the short probe again" in refusal(reference(), reference())


def test_files_of_one_model_have_the_same_frequencies() -> None:
    """A unit in the last place is another model."""
    other = np.nextafter(FREQUENCIES, np.float32(2))
    said = refusal(reference(PROBES[0]), reference(PROBES[1], inv_freq=other))
    assert said == "long.st: another inv_freq than in short.st"


def test_other_weights_are_refused() -> None:
    """By the digest that the caller has of the checkpoint."""
    check_weights([reference()], "weights")
    with pytest.raises(DetachedReferenceError, match="no reference for this model") as caught:
        check_weights([reference(), reference(PROBES[1], weights_sha256="0")], "weights")
    assert caught.value.where[0].startswith("long.st: other weights")
    assert len(caught.value.where) == 1


@pytest.mark.parametrize(
    ("metadata", "said"),
    [
        ({}, "do not say what they were made from"),
        ({"nemotron_bridge_logits": "9"}, "format 9, this version reads 1"),
        ({"nemotron_bridge_logits": "1"}, "damaged: "),
        ({"inv_freq_float32": "AAA"}, "damaged: "),
        ({"inv_freq_float32": "AAAA"}, "damaged: "),
        ({"versions": "[1"}, "damaged: "),
    ],
)
def test_logits_without_a_whole_account_of_themselves_are_refused(
    metadata: dict[str, str], said: str, tmp_path: Path
) -> None:
    """Missing, of another version, or cut."""
    healthy = reference().provenance.to_metadata()
    told = metadata if "nemotron_bridge_logits" in metadata or not metadata else healthy | metadata
    save_file({"logits": np.ones((1, 1, 1), np.float32)}, tmp_path / "file", metadata=told)
    with pytest.raises(DetachedReferenceError, match=said):
        read_reference(tmp_path / "file")


def test_a_file_of_something_else_is_refused(tmp_path: Path) -> None:
    """Not there, not safetensors, other tensors."""
    (tmp_path / "text").write_text("not safetensors, but long enough to be read as a length")
    save_file({"input_ids": np.ones((1, 1))}, tmp_path / "ids")
    for name, said in (("none", "cannot read"), ("text", "cannot read"), ("ids", "input_ids")):
        with pytest.raises(DetachedReferenceError, match=said):
            read_reference(tmp_path / name)
