"""Where a model named on the command line is: here, or behind a URL."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

import pytest
from fsspec.registry import _registry

from bridge.errors import CheckpointError, UsageError
from bridge.hf_config import load_hf_config
from bridge.hub import OTHER_WEIGHTS, local_copy, resolve_here, resolve_model
from bridge.storage.remote import RemotePath, parse_location

Store: TypeAlias = Any
"""That of `conftest`, which no test can import."""

FILES = {
    "bucket/model/config.json": b"{}",
    "bucket/model/model.safetensors": b"weights",
    "bucket/model/pytorch_model.bin": b"weights again",
    "bucket/model/deep/er/file": b"x",
    "bucket/model-2/config.json": b"another",
}


def test_a_path_here_wins(tmp_path: Path) -> None:
    """And a file's URL is one."""
    assert tmp_path == resolve_model(str(tmp_path), weights=True)
    assert tmp_path == resolve_model(f"file://{tmp_path}", weights=True)


def test_a_url_is_not_downloaded(store: Store) -> None:
    """Its files are read where they are, only when they are needed."""
    store.fill(FILES)
    found = resolve_model("store://bucket/model", weights=True)
    assert isinstance(found, RemotePath)
    assert [call for call in store.calls if call.operation == "read"] == []


@pytest.mark.parametrize("model", ["store://bucket/nothing", "file:///nowhere/at/all"])
def test_a_url_of_nothing_is_an_error(store: Store, model: str) -> None:
    """Said before any work."""
    store.fill(FILES)
    with pytest.raises(CheckpointError, match="no such file or directory") as caught:
        resolve_model(model, weights=False)
    assert caught.value.where == (model,)


def test_a_revision_of_a_url_stands_in_it(store: Store) -> None:
    """As a Hub URL's does."""
    store.fill(FILES)
    with pytest.raises(UsageError, match="--revision is for Hub ids") as caught:
        resolve_model("store://bucket/model", weights=False, revision="main")
    assert "hf://ORG/NAME@REVISION" in str(caught.value.hint)


def test_a_hub_url_is_read_file_by_file(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through whatever fsspec has for `hf://`; nothing goes to the Hub's cache."""
    store.fill({"org/name/config.json": b'{"hidden_size": 64}'})
    monkeypatch.setitem(_registry, "hf", store)
    found = resolve_model("hf://org/name", weights=True)
    assert isinstance(found, RemotePath)
    assert load_hf_config(found) == {"hidden_size": 64}


def test_a_copy_has_what_is_needed_and_goes_away(store: Store) -> None:
    """The directory's own files, without weights in other formats."""
    store.fill(FILES)
    found = resolve_model("store://bucket/model", weights=True)
    with local_copy(found, without=OTHER_WEIGHTS) as copy:
        assert copy.name == "model"
        assert {
            path.relative_to(copy).as_posix(): path.read_bytes()
            for path in copy.rglob("*")
            if path.is_file()
        } == {
            "config.json": b"{}",
            "model.safetensors": b"weights",
            "deep/er/file": b"x",
        }
    assert not copy.exists()
    with local_copy(found / "config.json") as copy:
        assert (copy.name, copy.read_bytes()) == ("config.json", b"{}")
    assert not copy.exists()


def test_a_copy_of_what_is_here_is_itself(tmp_path: Path) -> None:
    """And stays."""
    with local_copy(tmp_path) as copy:
        assert copy == tmp_path
    assert tmp_path.is_dir()


def test_a_copy_of_what_lies_at_the_top_is_whole() -> None:
    """The name of its directory, too."""
    model = parse_location("memory://model")
    assert isinstance(model, RemotePath)
    model.fs.pipe_file("/model/config.json", b"{}")
    try:
        with local_copy(model) as copy:
            assert (copy.name, [path.name for path in copy.iterdir()]) == ("model", ["config.json"])
    finally:
        model.fs.rm("/model", recursive=True)


class _TransportError(Exception):
    """As an HTTP client has them, of no family of Python's own."""


@pytest.mark.parametrize("error", [OSError, _TransportError])
def test_what_the_hub_refuses_without_a_word_is_an_error(
    monkeypatch: pytest.MonkeyPatch, error: type[Exception]
) -> None:
    """Of our own, that says at least of what kind it was."""

    def refuse(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("huggingface_hub.snapshot_download", refuse)
    with pytest.raises(CheckpointError, match=rf"that the Hub gives: {error.__name__}\n") as caught:
        resolve_model("nobody/nothing", weights=False)
    assert caught.value.where == ("nobody/nothing",)


def test_a_copy_that_has_no_room_is_refused(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before a byte is fetched."""
    store.fill(FILES)
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 5}))
    with (
        pytest.raises(CheckpointError, match="are free") as caught,
        local_copy(resolve_model("store://bucket/model", weights=True)),
    ):
        pytest.fail("there is no room")
    assert "TMPDIR" in str(caught.value.hint)


def test_a_copy_that_fails_leaves_nothing(
    store: Store, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """An error with the file's URL; what the caller's own block raises is not touched."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    store.fill(FILES)
    found = resolve_model("store://bucket/model", weights=True)

    def fail(fs: object, remote: str, local: str) -> None:
        del fs, local
        if remote.endswith("config.json"):
            raise PermissionError("Access Denied")

    with monkeypatch.context() as patch:
        patch.setattr(store, "get_file", fail)
        with pytest.raises(CheckpointError, match="Access Denied") as caught, local_copy(found):
            pytest.fail("it did not come")
    assert caught.value.where == ("store:///bucket/model/config.json",)
    with pytest.raises(OSError, match="mine"), local_copy(found):
        raise OSError("mine")
    assert list(tmp_path.iterdir()) == []


def test_what_needs_files_gets_a_copy_until_the_process_ends(
    store: Store, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Of the configuration alone where that is enough; what is here is not copied."""
    ends: list[Callable[[], object]] = []
    monkeypatch.setattr("atexit.register", ends.append)
    store.fill(FILES)
    whole = resolve_here("store://bucket/model", weights=True)
    assert {"config.json", "model.safetensors", "deep"} == {path.name for path in whole.iterdir()}
    config = resolve_here("store://bucket/model", weights=False)
    assert {"config.json", "deep"} == {path.name for path in config.iterdir()}
    assert tmp_path == resolve_here(str(tmp_path), weights=True)
    for end in ends:
        end()
    assert not whole.exists()
    assert not config.exists()


@pytest.mark.parametrize(
    ("url", "repository", "revision"),
    [
        ("hf://org/name", "org/name", None),
        ("hf://org/na.me-v1_5/", "org/na.me-v1_5", None),
        ("hf://org/name@refs%2Fpr%2F3", "org/name", "refs/pr/3"),
    ],
)
def test_a_model_of_the_hub_that_needs_files_goes_to_the_hub_s_cache(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, url: str, repository: str, revision: str
) -> None:
    """As its id does, with the revision in the URL."""
    asked: list[tuple[str, object]] = []

    def snapshot_download(model: str, *, revision: str | None, **options: object) -> str:
        del options
        asked.append((model, revision))
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    assert tmp_path == resolve_here(url, weights=True)
    assert asked == [(repository, revision)]
