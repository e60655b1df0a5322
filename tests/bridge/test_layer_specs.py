"""A process has one attention backend of Transformer Engine's; local layers have no say in it."""

from __future__ import annotations

import importlib.machinery
import os
from typing import Literal

import pytest

from bridge.errors import EnvironmentMissingError, UsageError
from bridge.layer_specs import attention_environment
from bridge.megatron_config import choose_layers

NAMES = ("NVTE_FLASH_ATTN", "NVTE_FUSED_ATTN", "NVTE_UNFUSED_ATTN")


@pytest.fixture(autouse=True)
def _nothing_set(monkeypatch: pytest.MonkeyPatch) -> None:
    """And nothing stays set."""
    for name in NAMES:
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


def by_megatron(backend: str) -> dict[str, str]:
    """What Megatron-Core itself writes for a backend."""
    from types import SimpleNamespace

    from megatron.core.models.common.language_module.language_module import LanguageModule
    from megatron.core.transformer.enums import AttnBackend

    model = SimpleNamespace(config=SimpleNamespace(attention_backend=AttnBackend[backend]))
    LanguageModule._set_attention_backend(model)
    return {name: os.environ[name] for name in NAMES}


@pytest.mark.parametrize("backend", ["auto", "unfused", "fused", "flash"])
def test_what_megatron_pins_for_a_backend_is_taken_for_it_and_for_no_other(
    backend: Literal["auto", "unfused", "fused", "flash"],
) -> None:
    """A later model of the same backend is welcome; one of another would change the first's."""
    with attention_environment("te", backend):
        pinned = by_megatron(backend)
    with attention_environment("te", backend):
        assert by_megatron(backend) == pinned
    for other in ("auto", "unfused", "fused", "flash"):
        if other == backend:
            continue
        with (
            pytest.raises(UsageError, match=f"another backend than {other!r}") as caught,
            attention_environment("te", other),
        ):
            pytest.fail("built")
        assert set(caught.value.where) <= {f"{name}={pinned[name]}" for name in NAMES}
        assert caught.value.where


def test_local_layers_leave_the_environment_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    """Megatron pins something for them too, whether or not somebody else has already."""
    with attention_environment("local", "auto"):
        by_megatron("auto")
    assert not any(name in os.environ for name in NAMES)
    monkeypatch.setenv(NAMES[0], "0")
    monkeypatch.setenv(NAMES[1], "1")
    with attention_environment("local", "auto"):
        by_megatron("auto")  # which would refuse what the caller has set
    assert [os.environ.get(name) for name in NAMES] == ["0", "1", None]
    with pytest.raises(ZeroDivisionError), attention_environment("local", "auto"):
        1 / 0  # noqa: B018 - a failure
    assert [os.environ.get(name) for name in NAMES] == ["0", "1", None]


def test_transformer_engine_is_taken_where_it_is_and_a_gpu_too(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """By default; asked for where it cannot be had, it is refused."""
    assert choose_layers("local", "cuda") == "local"
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    assert choose_layers("auto", "cuda") == "local"
    with pytest.raises(EnvironmentMissingError, match="transformer-engine"):
        choose_layers("te", "cuda")
    there = importlib.machinery.ModuleSpec("transformer_engine", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda _: there)
    assert choose_layers("auto", "cuda") == "te"
    assert choose_layers("auto", "cpu") == "local"
    with pytest.raises(EnvironmentMissingError, match="transformer-engine"):
        choose_layers("te", "cpu")
