"""What is run follows from the configuration; what cannot be proved is refused by its name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import harness.cli  # noqa: F401 - it adds the commands
from bridge.cli import app
from bridge.errors import BridgeError, UnmappedFieldError, UnsupportedFieldError, UsageError
from bridge.family import FAMILY
from bridge.hf_config import load_hf_config, spec_from_hf_config
from bridge.parameters import num_parameters
from harness.checks import CHECKS
from harness.errors import SuiteError
from harness.faults import CATALOGUE
from harness.faults.matrix import cases_of
from harness.hooks import seams_of
from harness.qualify.origin import bridge_commit, origin_of
from harness.qualify.scope import Choices, Scope, scope_of
from harness.qualify.suites import load_variant, variant_names
from harness.toys import toy_named
from harness.toys.configs import published_config

NANO_8B = "Llama-3.1-Nemotron-Nano-8B-v1"


def scope(config: dict[str, Any], **choices: Any) -> Scope:  # noqa: ANN401 - Choices'
    """Of pseudo-random weights, unless said."""
    wanted = Choices(**({"name": "m", "weights": "synthetic"} | choices))
    return scope_of(config, wanted, where="config.json")


def test_a_homogeneous_model_is_proved_by_one_block_at_its_own_size() -> None:
    """Layouts are those that its twin runs on; every check goes over each of them."""
    found = scope(published_config("Llama-3.1-Nemotron-Nano-8B-v1"))
    assert found.blocks == (0,)
    assert found.layouts == (
        "tp1-pp1", "tp2-pp1", "tp1-pp2", "tp2-pp2", "tp4-pp1", "tp1-pp2-vp2", "tp2-pp2-vp2",
        "tp2-pp1-sp", "tp2-pp2-sp",
    )  # fmt: skip
    real = [case.id for case in found.cases if case.model == "m"]
    assert real == [
        "config/m/float32",
        "logits/m/tp1-pp1/float32/short",
        "logits/m/tp1-pp1/float32/long",
        "blocks/m/tp1-pp1/float32/short",
        "blocks/m/tp1-pp1/float32/long",
    ]
    assert "random-stream-moved" in found.nothing_to_spoil  # only goldens can tell, and it has none
    assert not set(found.faults) & set(found.nothing_to_spoil)
    ids = {case.id for case in found.cases}
    assert {"gradients/m-twin/tp2-pp2-vp2/float32", "placement/m-twin/tp4-pp1/float32"} <= ids


def test_a_checkpoint_is_converted_too_and_full_takes_every_block() -> None:
    """`round_trip` at its own size needs weights of its own."""
    config = dict(toy_named("super-49b-v1").config)
    found = scope(config, weights="checkpoint", full=True)
    assert found.blocks is None
    assert "round_trip/m/tp1-pp1/float32" in {case.id for case in found.cases}
    assert found.as_data()["blocks"] == list(range(8))


TP_ONLY = {
    "tp-ranks-reversed", "all-reduce-missing", "backward-all-reduce-missing", "fc1-sharded-whole",
    "fc2-shards-reversed", "embedding-shards-reversed", "qkv-sharded-by-kind",
    "logits-gathered-backwards", "sequence-parallel-norm-gradients",
}  # fmt: skip


def test_what_tp_2_cannot_cut_has_no_fault_of_tp_and_every_other_one_is_looked_for() -> None:
    """Ten heads in five groups: what is left is seen somewhere, a cache and resharding too."""
    heads = {"num_attention_heads": 10, "num_key_value_heads": 5, "hidden_size": 160}
    config = dict(toy_named("nano-8b").config) | heads | {"head_dim": 16}
    found = scope(config)
    assert set(found.nothing_to_spoil) >= TP_ONLY
    assert not any("tp2" in name for name in found.layouts)
    assert {"cache-one-short", "files-exchanged", "pipeline-boundary-off-by-one"} <= set(
        found.faults
    )
    cases = cases_of(spec_from_hf_config(found.twin_config))
    looking = {check for check, _, _ in cases}
    assert looking >= {"generation", "resharding", "layouts", "logits"}
    for name in found.faults:
        assert any(CHECKS[check].sees & seams_of(CATALOGUE[name]) for check in looking), name


def test_one_layer_has_no_fault_of_pipelines() -> None:
    """Nothing is sent on, and there is no later stage."""
    found = scope(dict(toy_named("nano-8b").config) | {"num_hidden_layers": 1})
    assert {
        "pipeline-rounds", "pipeline-boundary-off-by-one", "last-stage-padding-filled",
    } <= set(found.nothing_to_spoil)  # fmt: skip
    assert set(found.faults) >= TP_ONLY


def test_linear_replacements_rule_out_sequence_parallelism() -> None:
    """Megatron-Core cannot run it; nothing is tried that it cannot run."""
    assert not any("sp" in name for name in scope(dict(toy_named("51b").config)).layouts)


def test_every_published_variant_can_be_qualified() -> None:
    """Each entry is of a known checkpoint, and of its size; the 51B's says what it is not."""
    assert {load_variant(name).hf_id for name in variant_names()} == {one.hub_id for one in FAMILY}
    for one in FAMILY:
        variant = load_variant(one.hub_id.partition("/")[2])
        assert variant.num_parameters == one.num_parameters
        if variant.config is None:
            assert (variant.name, variant.stand_in) == ("Llama-3_1-Nemotron-51B-Instruct", "51b")
            continue
        spec = spec_from_hf_config(load_hf_config(variant.config))
        assert num_parameters(spec) == one.num_parameters


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('schema_version = 1\nhf_id = "a/b"\nconfig = "c.json"', "description is missing"),
        ("schema_version = 2", "schema_version must be 1"),
        ('schema_version = 1\ncolour = "red"', "unknown key colour"),
        ('schema_version = 1\nnum_parameters = "1"', "num_parameters='1' is no int"),
        ("schema_version =", "not a variant"),
        (
            'schema_version = 1\ndescription = "x"\nhf_id = "a/b"\nconfig = "c"\nstand_in = "51b"',
            "one of config and stand_in",
        ),
    ],
)
def test_an_entry_that_makes_no_sense_is_refused(tmp_path: Path, text: str, said: str) -> None:
    """All that is wrong with it, in one error."""
    path = tmp_path / "mine.toml"
    path.write_text(text, "utf-8")
    with pytest.raises(SuiteError) as caught:
        load_variant(str(path))
    assert said in str(caught.value)


def test_an_unknown_variant_is_refused_with_the_known_ones() -> None:
    """By name."""
    with pytest.raises(SuiteError, match="Nano-8B"):
        load_variant("nano")


@pytest.mark.parametrize(
    ("changes", "kind", "said"),
    [
        ({"new_arithmetic": 3}, UnmappedFieldError, "new_arithmetic"),
        ({"attention_bias": True}, UnsupportedFieldError, "attention_bias"),
        ({"torch_dtype": "float16"}, UnsupportedFieldError, "dtype float16"),
        ({"hidden_size": 98}, UnsupportedFieldError, "num_attention_heads=8 does not divide"),
    ],
)
def test_what_cannot_be_proved_is_refused_by_name(
    changes: dict[str, Any], kind: type[BridgeError], said: str
) -> None:
    """By the bridge, by the reference, or for want of weights."""
    with pytest.raises(kind) as caught:
        scope(dict(toy_named("nano-4b").config) | changes)
    assert said in str(caught.value)


def test_what_the_oracle_does_not_know_is_refused_by_name() -> None:
    """A spelling that the bridge reads and the oracle does not: nothing could judge the model."""
    config = json.loads(json.dumps(toy_named("puzzle").config))
    for block in config["block_configs"]:
        block["attention"]["num_kv_heads"] = block["attention"].pop("num_key_value_heads")
    spec_from_hf_config(config)
    with pytest.raises(UnsupportedFieldError) as caught:
        scope(config)
    assert "the float64 oracle" in str(caught.value)


def test_patterns_that_no_fault_fits_are_refused() -> None:
    """A trial of nothing is none; so is one of faults that the model cannot have."""
    with pytest.raises(UsageError):
        scope(dict(toy_named("nano-4b").config), faults=("linear-for",))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "no model to qualify"),
        (["--hf-model", "x", "--config", "y"], "give either"),
        (["--suite", "nano"], "no variant 'nano'"),
        (["--suite", "Llama-3.1-Nemotron-Nano-8B-v1"], "the evidence needs a place"),
        (["--suite", "Llama-3.1-Nemotron-Nano-8B-v1", "--memory-budget", "1MiB"], "too small"),
        (["--suite", "Llama-3.1-Nemotron-Nano-8B-v1", "--hf-id", "x"], "not pinned down"),
        (["--suite", "Llama-3.1-Nemotron-Nano-8B-v1", "--hf-revision", "main"], "not pinned down"),
        (["--suite", "Llama-3.1-Nemotron-Nano-8B-v1", "--megatron-path", "x"], "no weights"),
        (["--check", "x", "--config", "y"], "takes a bundle and nothing else"),
        (["--check", "x", "--full"], "--full"),
        (["--check", "x", "--seed", "0"], "--seed"),
        (["--suite", "nano", "--list", "--resume"], "--list runs nothing"),
        (["--config", "x", "--revision", "main"], "--revision is of a Hub id"),
        (["--suite", NANO_8B, "--hf-id", "nvidia/other"], "--hf-id says nvidia/other"),
        (["--suite", NANO_8B, "--base-container", "/home/me/x.sif"], "not pinned down"),
        (["--suite", NANO_8B, "--base-container", "an image"], "not pinned down"),
    ],
)
def test_bad_usage_is_said_before_any_work(arguments: list[str], said: str) -> None:
    """Nothing is written anywhere."""
    done = CliRunner().invoke(app, ["qualify", *arguments])
    assert isinstance(done.exception, BridgeError), done.output
    assert said in str(done.exception)
    assert done.exception.exit_code == 2


def test_a_configuration_of_another_size_is_not_the_published_variant(tmp_path: Path) -> None:
    """--suite with a configuration of one's own holds it to the published count."""
    path = tmp_path / "config.json"
    path.write_text(json.dumps(toy_named("nano-8b").config), "utf-8")
    arguments = ["--suite", "Llama-3.1-Nemotron-Nano-8B-v1", "--config", str(path), "--list"]
    done = CliRunner().invoke(app, ["qualify", *arguments])
    assert "8,030,261,248 are published" in str(done.exception)
    arguments = ["--hf-id", f"nvidia/{NANO_8B}", "--config", str(path), "--list"]
    done = CliRunner().invoke(app, ["qualify", *arguments])
    assert "8,030,261,248 are published" in str(done.exception)


def test_the_dry_run_lists_cases_and_faults() -> None:
    """The 51B's stand-in, by its name; as JSON with what the twin keeps."""
    arguments = ["qualify", "--suite", "Llama-3_1-Nemotron-51B-Instruct", "--list"]
    lines = CliRunner().invoke(app, arguments).output.splitlines()
    name = "Llama-3_1-Nemotron-51B-Instruct-stand-in"
    assert f"config/{name}/float32" in lines
    assert f"faults/{name}-twin/gate-up-swapped" in lines
    found = json.loads(CliRunner().invoke(app, [*arguments, "--json"]).output)
    assert "stand-in" in found["stand_in"]
    assert {"trait": "output layer tied to the embedding", "value": False} in found["traits"]


def test_a_hub_snapshot_says_which_revision_it_is(tmp_path: Path) -> None:
    """Its directory is named by the commit; what the user says goes before."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    given = {"hf_id": None, "hf_revision": None, "base_container": None}
    found = origin_of("nvidia/Some-Model", tmp_path / commit, **given)
    assert (found.hf_id, found.hf_revision) == ("nvidia/Some-Model", commit)
    local = origin_of(str(tmp_path), tmp_path, **given)
    assert (local.hf_id, local.hf_revision) == (None, None)
    assert origin_of(None, tmp_path, **given | {"hf_id": "a/b"}).hf_id == "a/b"
    image = "nvcr.io/nvidia/nemo:25.11"
    assert origin_of(None, tmp_path, **given | {"base_container": image}).base_container == image


def test_a_directory_that_is_no_checkout_has_no_commit(tmp_path: Path) -> None:
    """Nor has a file that somebody's own repository does not hold."""
    (tmp_path / "harness").mkdir()
    assert bridge_commit(tmp_path / "harness") is None
