"""Paths behind a URL answer as pathlib's do, and say what is wrong when the backend fails."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

import pytest
from fsspec.registry import known_implementations

from bridge.errors import (
    CheckpointError,
    EnvironmentMissingError,
    UnsafeFileError,
    UsageError,
)
from bridge.storage.remote import RemotePath, parse_location

Store: TypeAlias = Any
Call: TypeAlias = Any
"""Those of `conftest`, which no test can import."""


class BackendError(Exception):
    """What botocore, google and httpx raise: nothing that derives from OSError."""


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """Files and directories, with names that sort differently as strings and as parts."""
    for name in ("a/b.txt", "a.txt", "a-b/c/d.safetensors", "e.safetensors", ".hidden"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(name.encode() * 3)
    return tmp_path


def remote(url: str) -> RemotePath:
    """A location that is one behind a URL."""
    found = parse_location(url)
    assert isinstance(found, RemotePath)
    return found


@pytest.fixture(params=["local", "store"])
def twin(request: pytest.FixtureRequest, tree: Path, store: Store) -> RemotePath:
    """The tree again, through fsspec: on the disk, and as objects."""
    if request.param == "local":
        return remote(f"local://{tree}")
    files = {f"bucket/{path.relative_to(tree)}": path for path in tree.rglob("*")}
    store.fill({name: path.read_bytes() for name, path in files.items() if path.is_file()})
    return remote("store://bucket")


def test_listings_are_those_of_pathlib(tree: Path, twin: RemotePath) -> None:
    """Names, kinds, sizes and contents; in the same order when sorted."""
    for one, other in (
        (sorted(tree.iterdir()), sorted(twin.iterdir())),
        (sorted(tree.glob("*.safetensors")), sorted(twin.glob("*.safetensors"))),
        (sorted(path for path in tree.rglob("*") if path.is_file()), sorted(twin.rglob("*"))),
    ):
        names = [path.relative_to(tree).as_posix() for path in one]
        assert names == [path.relative_to(twin).as_posix() for path in other]
        for path, remote_path in zip(one, other, strict=True):
            assert path.is_dir() == remote_path.is_dir()
            assert path.is_file() == remote_path.is_file()
            if path.is_file():
                assert path.stat().st_size == remote_path.stat().st_size
                assert path.read_bytes() == remote_path.read_bytes()


@pytest.mark.parametrize("name", ["a.txt", "a", "a/b.txt", "nothing", "a/nothing"])
def test_questions_are_answered_as_by_pathlib(tree: Path, twin: RemotePath, name: str) -> None:
    """Present or absent, file or directory; the parts of the name."""
    path, remote_path = tree / name, twin / name
    for question in ("exists", "is_file", "is_dir", "is_symlink"):
        assert getattr(path, question)() == getattr(remote_path, question)(), question
    assert (path.name, path.suffix) == (remote_path.name, remote_path.suffix)
    assert remote_path.parent / remote_path.name == remote_path
    assert remote_path.absolute() == remote_path.resolve() == remote_path


def test_the_parent_of_what_lies_at_the_top_is_the_top() -> None:
    """Some backends begin paths with a slash; without it the whole path would be a name."""
    top = parse_location("memory://model").parent
    assert isinstance(top, RemotePath)
    assert (top.path, (top / "model").path) == ("/", "/model")


@pytest.mark.parametrize(
    "ask",
    [
        lambda path: path.stat(),
        lambda path: path.read_bytes(),
        lambda path: path.read_text(encoding="utf-8"),
        lambda path: path.open("rb").read(3),
    ],
)
def test_what_is_absent_is_a_file_not_found(
    twin: RemotePath, ask: Callable[[RemotePath], object]
) -> None:
    """With a reason in words, which fsspec's own lack, and the URL."""
    with pytest.raises(FileNotFoundError) as caught:
        ask(twin / "nothing")
    assert caught.value.strerror == "No such file or directory"
    assert str(twin / "nothing") == caught.value.filename


def test_a_stream_reads_on(twin: RemotePath) -> None:
    """Two reads give two pieces, and the last one what is left."""
    with (twin / "a.txt").open("rb") as stream:
        assert [stream.read(n) for n in (5, 2, 99, 9)] == [b"a.txt", b"a.", b"txta.txt", b""]
    with pytest.raises(ValueError, match="mode"):
        twin.open("wb")


def test_a_listing_answers_for_its_files(store: Store) -> None:
    """Each question would be a request of its own."""
    store.fill({f"bucket/{name}": b"x" for name in "abc"})
    found = list(remote("store://bucket").iterdir())
    assert [path.stat().st_size for path in found if path.is_file()] == [1, 1, 1]
    assert [call.operation for call in store.calls] == ["list"]


def test_a_store_s_own_mark_of_a_directory_is_not_in_it(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Consoles make an empty object of the directory's name, which listings then tell of."""
    store.fill({"bucket/a": b"x"})
    entries = [{"name": "/bucket/", "type": "directory", "size": 0}]
    true = store.ls
    monkeypatch.setattr(store, "ls", lambda *args, **kwargs: entries + true(*args, **kwargs))
    assert [path.name for path in remote("store://bucket").iterdir()] == ["a"]


@pytest.mark.parametrize(("asynchronous", "options"), [(True, {}), (False, {"cache_type": "none"})])
def test_a_ranged_read_does_not_read_ahead(
    store: Store, monkeypatch: pytest.MonkeyPatch, *, asynchronous: bool, options: dict[str, str]
) -> None:
    """Files that fsspec opens would; asynchronous filesystems know no such option."""
    seen: list[dict[str, str]] = []

    def cat_file(_: object, path: str, *, start: int, end: int, **given: str) -> bytes:
        seen.append(given)
        return f"{path} {start} {end}".encode()

    monkeypatch.setattr(store, "cat_file", cat_file)
    monkeypatch.setattr(store, "async_impl", asynchronous)
    assert remote("store://bucket/a").read_range(3, 5) == b"/bucket/a 3 5"
    assert seen == [options]


def test_a_path_travels_between_processes(twin: RemotePath) -> None:
    """Workers get it pickled."""
    again = pickle.loads(pickle.dumps(twin))  # noqa: S301 - our own bytes
    assert again == twin
    assert sorted(twin.iterdir()) == sorted(again.iterdir())


@pytest.mark.parametrize(
    ("raised", "said", "hint"),
    [
        (PermissionError("Access Denied"), "Access Denied", "credentials itself"),
        (BackendError("Unable to locate credentials"), "Unable to locate", "credentials itself"),
        (BackendError("no route\nto host"), "cannot reach it: no route", "the network"),
        (TimeoutError(), "TimeoutError", "the network"),
    ],
)
@pytest.mark.parametrize(
    "ask",
    [
        lambda path: path.exists(),
        lambda path: path.is_dir(),
        lambda path: path.stat(),
        lambda path: path.read_bytes(),
        lambda path: path.read_range(0, 2),
        lambda path: list(path.iterdir()),
        lambda path: list(path.rglob("*")),
    ],
)
def test_what_a_backend_raises_is_an_error_with_the_url_and_a_remedy(
    store: Store, ask: Callable[[RemotePath], object], raised: Exception, said: str, hint: str
) -> None:
    """Whatever class it has; never "there is no such file"."""

    def fail(_: object) -> None:
        raise raised

    store.trouble = staticmethod(fail)
    with pytest.raises(CheckpointError, match=said) as caught:
        ask(remote("store://bucket/model"))
    assert "\n" not in caught.value.message
    assert caught.value.code == "BR300"
    assert caught.value.where == ("store:///bucket/model",)
    assert caught.value.hint is not None
    assert hint in caught.value.hint


def test_a_bug_keeps_its_traceback(store: Store) -> None:
    """A TypeError is no user's mistake."""

    def fail(_: object) -> None:
        raise TypeError("a bug")

    store.trouble = staticmethod(fail)
    with pytest.raises(TypeError, match="a bug"):
        remote("store://bucket").exists()


def test_paths_and_file_urls_are_paths() -> None:
    """What is here keeps all that only files can do, escapes and the like included."""
    assert Path("some/model") == parse_location("some/model")
    assert Path("/some/my model") == parse_location("file:///some/my%20model")
    with pytest.raises(UsageError, match="'some' is no path of this machine"):
        parse_location("file://some/model")


@pytest.mark.parametrize(
    ("url", "said"),
    [("nobodys://bucket/x", "unknown protocol 'nobodys'"), ("memory://", "the URL has no path")],
)
def test_a_url_of_nothing_is_bad_usage(url: str, said: str) -> None:
    """Said at once, with an example."""
    with pytest.raises(UsageError, match=said) as caught:
        parse_location(url)
    assert "://BUCKET/PATH" in str(caught.value.hint)


def test_a_missing_backend_names_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    """BR500, and what to install."""
    entry = {"class": "nosuchfs.NoSuchFileSystem", "err": "Install nosuchfs to access it"}
    monkeypatch.setitem(known_implementations, "nosuch", entry)
    with pytest.raises(EnvironmentMissingError, match="Install nosuchfs to access it") as caught:
        parse_location("nosuch://bucket/model")
    assert caught.value.hint == "pip install nosuchfs"


@pytest.mark.parametrize("name", ["../evil.json", "a/../../evil.json", "./evil.json"])
def test_an_object_whose_name_leads_out_is_refused(
    store: Store, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """A store takes any name; where files are copied to, this one would be another directory."""
    entry = {"name": f"/bucket/model/{name}", "type": "file", "size": 1}

    listing = {str(entry["name"]): entry}
    monkeypatch.setattr(store, "find", lambda *_, **__: listing)
    with pytest.raises(UnsafeFileError) as caught:
        list(remote("store://bucket/model").rglob("*"))
    assert name in caught.value.where[0]
