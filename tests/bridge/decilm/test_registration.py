"""The Auto classes load DeciLM checkpoints with the code that is here, and no other."""

from __future__ import annotations

import builtins
import json
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, LlamaForCausalLM

import bridge.decilm
from bridge.decilm import DeciLMConfig, DeciLMForCausalLM, DeciLMModel, register

BLOCKS = [(None, 64), (2, None), ("linear", "linear"), (3, 32)]
TOKENS = torch.tensor([[5, 6, 7, 8]])


@pytest.fixture
def isolated(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither a prompt nor the network."""

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("asked the user or the network")

    monkeypatch.setattr(builtins, "input", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)


def _checkpoint(write_checkpoint: Callable[..., Path]) -> Path:
    directory = write_checkpoint(BLOCKS)
    for name in ("configuration_decilm", "modeling_decilm"):
        (directory / f"{name}.py").write_text("raise RuntimeError('the code ran')\n")
    assert "auto_map" in json.loads((directory / "config.json").read_text())
    return directory


@pytest.mark.usefixtures("isolated")
@pytest.mark.parametrize("given", [{}, {"trust_remote_code": False}], ids=["nothing", "false"])
def test_a_checkpoint_with_its_own_code_loads_with_ours(
    given: dict[str, bool], write_checkpoint: Callable[..., Path]
) -> None:
    """Without a word about trust, without a prompt, and without running that code."""
    directory = _checkpoint(write_checkpoint)
    model = AutoModelForCausalLM.from_pretrained(directory, **given)
    assert type(model) is DeciLMForCausalLM
    assert type(AutoConfig.from_pretrained(directory, **given)) is DeciLMConfig
    assert model(TOKENS).logits.shape == (1, 4, 131)


@pytest.mark.usefixtures("isolated")
def test_an_empty_model_of_such_a_configuration_is_ours(
    write_checkpoint: Callable[..., Path],
) -> None:
    """`from_config` does not follow the `auto_map` either."""
    config = AutoConfig.from_pretrained(_checkpoint(write_checkpoint))
    assert type(AutoModelForCausalLM.from_config(config)) is DeciLMForCausalLM


@pytest.mark.usefixtures("isolated")
def test_what_was_saved_is_loaded(
    write_checkpoint: Callable[..., Path], build: Callable[..., DeciLMForCausalLM]
) -> None:
    """Every weight arrives, so that the logits are those of the model saved."""
    model = AutoModelForCausalLM.from_pretrained(write_checkpoint(BLOCKS)).eval()
    assert torch.equal(
        build(BLOCKS, attn_implementation="sdpa")(TOKENS).logits, model(TOKENS).logits
    )


@pytest.mark.usefixtures("isolated")
def test_auto_model_loads_the_body(write_checkpoint: Callable[..., Path]) -> None:
    """`AutoModel` gives the model without its output layer, filled from the same files."""
    directory = write_checkpoint(BLOCKS)
    body = AutoModel.from_pretrained(directory).eval()
    assert type(body) is DeciLMModel
    whole = AutoModelForCausalLM.from_pretrained(directory).eval()
    assert torch.equal(whole.model(TOKENS)[0], body(TOKENS)[0])


def test_a_saved_body_can_be_loaded_again(
    write_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    """Its configuration names another architecture, DeciLMModel, and still means DeciLM."""
    body = AutoModel.from_pretrained(write_checkpoint(BLOCKS)).eval()
    body.save_pretrained(tmp_path / "body")
    again = AutoModel.from_pretrained(tmp_path / "body").eval()
    assert torch.equal(body(TOKENS)[0], again(TOKENS)[0])


def test_registering_again_is_harmless() -> None:
    """Twice is as good as once."""
    register()
    register()
    config = AutoConfig.for_model("nemotron-nas")
    assert type(config) is DeciLMConfig


def test_registering_takes_the_name_back(write_checkpoint: Callable[..., Path]) -> None:
    """After something else took the model class, `register` puts ours in place again."""

    class Other(LlamaForCausalLM):  # type: ignore[misc]  # transformers is not typed for mypy
        config_class = DeciLMConfig

    directory = write_checkpoint(BLOCKS)
    AutoModelForCausalLM.register(DeciLMConfig, Other, exist_ok=True)
    bridge.decilm.register()
    assert type(AutoModelForCausalLM.from_pretrained(directory)) is DeciLMForCausalLM
