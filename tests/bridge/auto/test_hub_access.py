"""A model of the Hub costs what is needed of it, once, and its weights are of its own commit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

import huggingface_hub.constants
import pytest

from bridge import AutoBridge
from bridge.errors import CheckpointError
from bridge.storage.safetensors import SafetensorsSource
from harness.toys import toy_named, write_checkpoint

Hub: TypeAlias = Any
"""That of `conftest`, which no test can import."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of several files, and weights in a format nobody asks for."""
    folder = tmp_path_factory.mktemp("hub") / "model"
    write_checkpoint(toy_named("nano-4b"), folder, dtype="bfloat16")
    (folder / "pytorch_model.bin").write_bytes(b"pickled")
    return folder


@pytest.fixture
def served(
    hub: Callable[..., Hub], model: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Hub:
    """The Hub that huggingface_hub talks to, its cache empty."""
    started = hub(model)
    started.be_the_hub(monkeypatch, tmp_path / "cache")
    return started


def needed(model: Path, *, weights: bool) -> list[str]:
    """Files that are to be fetched."""
    return sorted(
        path.name
        for path in model.iterdir()
        if path.suffix != ".bin" and (weights or "safetensors" not in path.name)
    )


def test_a_bridge_fetches_no_weights_until_they_are_needed(served: Hub, model: Path) -> None:
    """Then those alone, and nothing twice, by another bridge either."""
    bridge = AutoBridge.from_hf_pretrained("org/model", trust_remote_code=True)
    assert sorted(served.transferred) == needed(model, weights=False)
    assert bridge.hf_pretrained.files().headers == ()
    assert sorted(served.transferred) == needed(model, weights=False)
    where = bridge.hf_pretrained.location(weights=True)
    assert sorted(served.transferred) == needed(model, weights=True)
    with SafetensorsSource(Path(str(where))) as source:
        assert {header.file for header in bridge.hf_pretrained.files().headers} == set(
            source.headers
        )
    again = AutoBridge.from_hf_pretrained("org/model", dtype="float32")
    assert again.hf_pretrained.location(weights=True) == where
    assert sorted(served.transferred) == needed(model, weights=True)


def test_weights_are_of_the_commit_that_the_configuration_was(served: Hub) -> None:
    """Even when the branch has moved on in between."""
    for revision, commit in (("main", "a" * 40), ("old", "b" * 40)):
        bridge = AutoBridge.from_hf_pretrained("org/model", revision=revision)
        served.commits[revision] = "c" * 40
        served.requests.clear()
        where = bridge.hf_pretrained.location(weights=True)
        assert where.name == commit
        asked = {one.path.split("/")[4] for one in served.requests if "resolve" in one.path}
        assert asked == {commit}


def test_a_cut_download_goes_on_where_it_stopped(
    served: Hub, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No piece that came whole is fetched again."""
    file = max(path.name for path in model.glob("*.safetensors"))
    served.cut = file
    monkeypatch.setattr(huggingface_hub.constants, "DOWNLOAD_CHUNK_SIZE", 4096)
    where = AutoBridge.from_hf_pretrained("org/model").hf_pretrained.location(weights=True)
    assert (Path(str(where)) / file).read_bytes() == (model / file).read_bytes()
    starts = [
        request.bytes_from
        for request in served.requests
        if request.method == "GET" and request.path.endswith(file)
    ]
    half = (model / file).stat().st_size // 2
    assert starts == [0, half // 4096 * 4096]


def test_offline_the_cache_is_enough(served: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it does not hold is an error that says so."""
    AutoBridge.from_hf_pretrained("org/model")
    served.requests.clear()
    with monkeypatch.context() as patch:
        patch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        bridge = AutoBridge.from_hf_pretrained("org/model")
        with pytest.raises(CheckpointError, match="neither a path here nor a model") as caught:
            bridge.hf_pretrained.location(weights=True)
        assert caught.value.where == ("org/model",)
    assert AutoBridge.from_hf_pretrained("org/model", local_files_only=True).spec == bridge.spec
    assert served.requests == []


def test_a_model_that_is_not_there_cannot_be_handled(served: Hub) -> None:
    """Nor is it a traceback."""
    assert AutoBridge.can_handle("org/model")
    assert not AutoBridge.can_handle("org/other")
    with pytest.raises(CheckpointError, match="neither a path here nor a model"):
        AutoBridge.from_hf_pretrained("org/other")
    assert served.requests
