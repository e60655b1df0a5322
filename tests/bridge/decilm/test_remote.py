"""Loading a reference: whose code runs, and what is said when a checkpoint's own must not."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, dynamic_module_utils

from bridge.decilm import (
    DeciLMForCausalLM,
    RemoteCodeWarning,
    explain_remote_code_failure,
    load_reference,
    remote,
)
from bridge.decilm.own_code import announce
from bridge.errors import (
    AccountingError,
    RemoteCodeError,
    UnmappedFieldError,
    UnsupportedArchitectureError,
)

Write = Callable[..., Path]
TOKENS = torch.tensor([[5, 6, 7, 8]])
OWN_CONFIGURATION = """
from transformers import LlamaConfig

class OwnConfig(LlamaConfig):
    model_type = "own-llama"
"""
OWN_MODEL = """
from transformers import LlamaForCausalLM

from .configuration_own import OwnConfig

class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
"""
AS_PUBLISHED = """
raise ImportError("cannot import name 'NEED_SETUP_CACHE_CLASSES_MAPPING'")
"""


@pytest.fixture(autouse=True)
def _own_cache_of_modules(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A checkpoint's code is copied to a cache before it runs: here, to one that goes away."""
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    """A Llama checkpoint."""
    config = LlamaConfig(
        vocab_size=131,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "llama")
    return tmp_path / "llama"


def _with_own_code(directory: Path, *, model_type: str, model: str = OWN_MODEL) -> Path:
    (directory / "configuration_own.py").write_text(OWN_CONFIGURATION)
    (directory / "modeling_own.py").write_text(model)
    config = json.loads((directory / "config.json").read_text())
    config["model_type"] = model_type
    config["auto_map"] = {
        "AutoConfig": "configuration_own.OwnConfig",
        "AutoModelForCausalLM": "modeling_own.OwnForCausalLM",
    }
    (directory / "config.json").write_text(json.dumps(config))
    return directory


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_decilm_is_loaded_with_our_code(implementation: str, write_checkpoint: Write) -> None:
    """In the dtype and with the attention asked for, ready for inference."""
    directory = write_checkpoint([(None, 64), (2, 32)])
    model = load_reference(directory, dtype=torch.bfloat16, attn_implementation=implementation)
    assert type(model) is DeciLMForCausalLM
    assert model.dtype == torch.bfloat16
    assert model.config._attn_implementation == implementation
    assert not model.training


def test_llama_is_loaded_with_the_code_of_transformers(llama: Path) -> None:
    """The homogeneous half of the family needs nothing of ours."""
    assert type(load_reference(llama)) is LlamaForCausalLM


def test_own_code_runs_by_opt_in_only(llama: Path) -> None:
    """Refused without a word of trust, and said how to give it; run with it."""
    directory = _with_own_code(llama, model_type="own-llama")
    with pytest.raises(RemoteCodeError, match="--trust-remote-code") as caught:
        load_reference(directory)
    assert caught.value.code == "BR105"
    model = load_reference(directory, trust_remote_code=True)
    assert type(model).__name__ == "OwnForCausalLM"
    assert model(TOKENS).logits.shape == (1, 4, 131)


def test_trust_without_own_code_is_no_obstacle(write_checkpoint: Write) -> None:
    """A checkpoint that names no code of its own loads with ours."""
    directory = write_checkpoint([(2, 32)])
    config = json.loads((directory / "config.json").read_text())
    del config["auto_map"]
    (directory / "config.json").write_text(json.dumps(config))
    assert type(load_reference(directory, trust_remote_code=True)) is DeciLMForCausalLM


def test_code_that_does_not_import_is_explained(
    llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error names the reason, the installed version and the versions that work."""
    monkeypatch.setattr(remote, "transformers_version", "4.57.6")
    directory = _with_own_code(llama, model_type="nemotron-nas", model=AS_PUBLISHED)
    with pytest.raises(RemoteCodeError) as caught:
        load_reference(directory, trust_remote_code=True)
    said = str(caught.value)
    for part in ("BR105", "4.57.6", "NEED_SETUP_CACHE_CLASSES_MAPPING", "4.53.3", "bridge.decilm"):
        assert part in said


@pytest.mark.parametrize("version", ["5.0.0", "5.1.2", "5.23.0", "6.0.0.dev0"])
def test_code_known_to_be_wrong_is_not_even_run(
    version: str, llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under transformers 5 the published DeciLM code computes wrong logits without a word."""
    monkeypatch.setattr(remote, "transformers_version", version)
    directory = _with_own_code(llama, model_type="nemotron-nas", model="raise SystemExit('ran')")
    with pytest.raises(RemoteCodeError, match="computes wrong logits"):
        load_reference(directory, trust_remote_code=True)


@pytest.mark.parametrize("version", ["4.54.0", "4.55.4", "4.57.6"])
def test_code_that_cannot_generate_warns(
    version: str, llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its logits are right there, so it may run; the warning names the versions that work."""
    monkeypatch.setattr(remote, "transformers_version", version)
    directory = _with_own_code(llama, model_type="nemotron-nas")
    with pytest.warns(RemoteCodeWarning, match=r"with a cache.*4\.53\.3"):
        load_reference(directory, trust_remote_code=True)


@pytest.mark.parametrize("version", ["4.48.3", "4.53.3"])
def test_code_that_works_is_run_in_silence(
    version: str, llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No warning where the published code was measured to be right."""
    monkeypatch.setattr(remote, "transformers_version", version)
    directory = _with_own_code(llama, model_type="nemotron-nas")
    load_reference(directory, trust_remote_code=True)


def test_an_explanation_survives_an_error_without_words() -> None:
    """Some exceptions say nothing; the diagnostic still has its code, place and help."""
    error = explain_remote_code_failure("some/model", KeyError())
    assert str(error).startswith("BR105 ")
    assert "--> some/model" in str(error)
    assert "KeyError" in str(error)
    assert error.hint


def test_a_model_outside_the_family_is_refused(llama: Path) -> None:
    """A type that neither we nor the checkpoint bring code for."""
    config = json.loads((llama / "config.json").read_text())
    (llama / "config.json").write_text(json.dumps({**config, "model_type": "mamba"}))
    with pytest.raises(UnsupportedArchitectureError, match="'mamba'"):
        load_reference(llama)


def test_weights_that_do_not_match_are_an_error(
    write_checkpoint: Write, config_fields: Callable[..., dict[str, object]]
) -> None:
    """Where transformers fills in noise and goes on, a reference must not."""
    directory = write_checkpoint([(2, 32), (None, 32)])
    fields = config_fields([(2, 32), (2, None)])
    (directory / "config.json").write_text(json.dumps(fields))
    with pytest.raises(AccountingError) as caught:
        load_reference(directory)
    assert len(caught.value.where) == 5 + 4
    assert f"{directory}: missing: model.layers.1.self_attn.q_proj.weight" in caught.value.where
    assert f"{directory}: unexpected: model.layers.1.mlp.up_proj.weight" in caught.value.where


def test_an_unknown_field_is_carried_by_name(write_checkpoint: Write) -> None:
    """As for a conversion: refused, unless the caller says it does not matter."""
    directory = write_checkpoint([(2, 32)])
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, "something_new": 1}))
    with pytest.raises(UnmappedFieldError, match="something_new"):
        load_reference(directory)
    assert type(load_reference(directory, carry=["something_new"])) is DeciLMForCausalLM


def test_whose_code_runs_is_said_before_it_does(
    llama: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The directory, every file that is imported, and its sha256; of other files nothing."""
    directory = _with_own_code(llama, model_type="own-llama")
    (directory / "unused.py").write_text("1 / 0")
    before: list[str] = []

    def run(reference: str, where: str) -> None:
        before.extend(caplog.messages)
        raise SystemExit(f"{reference} of {where}")

    monkeypatch.setattr(remote, "get_class_from_dynamic_module", run)
    with pytest.raises(SystemExit, match=f"configuration_own.OwnConfig of {directory}"):
        load_reference(directory, trust_remote_code=True)
    (said,) = before
    assert said.startswith(f"--trust-remote-code: running the code of the directory {directory}: ")
    for name in ("configuration_own.py", "modeling_own.py"):
        digest = hashlib.sha256((directory / name).read_bytes()).hexdigest()
        assert f"{name} (sha256 {digest})" in said
    assert "unused.py" not in said


def test_code_from_the_hub_is_named_by_model_and_commit(
    llama: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The cache knows both; the directory's name would say nothing to a reader."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    snapshot = tmp_path / "models--some--model" / "snapshots" / commit
    snapshot.parent.mkdir(parents=True)
    _with_own_code(llama, model_type="own-llama").rename(snapshot)
    announce(snapshot, json.loads((snapshot / "config.json").read_text())["auto_map"])
    assert any(f"the code of some/model at commit {commit}: " in one for one in caplog.messages)


@pytest.mark.parametrize(
    "named",
    ["other/repository--modeling_own.OwnForCausalLM", "../modeling_own.OwnForCausalLM",
     "absent.OwnForCausalLM", "modeling_own", "sub/modeling_own.OwnForCausalLM"],
)  # fmt: skip
def test_code_that_is_not_in_the_checkpoint_is_refused(llama: Path, named: str) -> None:
    """Trust is in one checkpoint; another's code would come over the network, unasked."""
    directory = _with_own_code(llama, model_type="own-llama")
    config = json.loads((directory / "config.json").read_text())
    config["auto_map"]["AutoModelForCausalLM"] = named
    (directory / "config.json").write_text(json.dumps(config))
    with pytest.raises(RemoteCodeError, match="not in the checkpoint"):
        load_reference(directory, trust_remote_code=True)
