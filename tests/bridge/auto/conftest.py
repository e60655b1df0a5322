"""A Hub on this machine, and scripts run as a user runs them."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import NamedTuple

import huggingface_hub.constants
import pytest

ROOT = Path(__file__).parents[3]


class Request(NamedTuple):
    """What a client has asked for."""

    method: str
    path: str
    bytes_from: int


class Hub:
    """Serves one model in the Hub's own protocol, and remembers what it was asked.

    Args:
        directory: The model's files, the same at every revision.
        name: Its id.
    """

    def __init__(self, directory: Path, name: str) -> None:
        self.directory, self.name = directory, name
        self.commits = {"main": "a" * 40, "old": "b" * 40}
        self.requests: list[Request] = []
        self.cut: str | None = None
        """A file whose first transfer ends halfway."""
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def do_HEAD(self) -> None:
                hub.answer(self)

            def do_GET(self) -> None:
                hub.answer(self)

            def log_message(self, *_: object) -> None:
                """Say nothing."""

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    @property
    def environment(self) -> dict[str, str]:
        """What sends a script here, with a cache of its own."""
        return {"HF_ENDPOINT": self.url, "HF_HOME": "cache"}

    def be_the_hub(self, monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
        """Send this process here, with a cache of its own."""
        constants = huggingface_hub.constants
        files = self.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "ENDPOINT", self.url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", files)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))

    @property
    def transferred(self) -> list[str]:
        """Files of which bytes were asked for, in order."""
        return [
            request.path.rpartition("/")[2]
            for request in self.requests
            if request.method == "GET" and "/resolve/" in request.path
        ]

    def answer(self, asked: BaseHTTPRequestHandler) -> None:
        """Answer one request."""
        path = asked.path.partition("?")[0]
        start = int(asked.headers.get("Range", "bytes=0-").removeprefix("bytes=").split("-")[0])
        self.requests.append(Request(asked.command, path, start))
        match path.replace(self.name, "MODEL").strip("/").split("/"):
            case ["api", "models", "MODEL", *rest] if not rest or rest[0] == "revision":
                revision = "/".join(rest[1:]) or "main"
                siblings = [{"rfilename": name} for name in self._names()]
                sha = self.commits.get(revision, revision)
                self._json(asked, {"id": self.name, "sha": sha, "siblings": siblings})
            case ["api", "models", "MODEL", "tree", _]:
                self._json(asked, [self._entry(name) for name in self._names()])
            case ["MODEL", "resolve", revision, name] if name in self._names():
                self._file(asked, self.commits.get(revision, revision), name, start)
            case _:
                asked.send_response(404)
                asked.send_header("X-Error-Code", "RepoNotFound")
                asked.send_header("Content-Length", "0")
                asked.end_headers()

    def _names(self) -> list[str]:
        return sorted(path.name for path in self.directory.iterdir())

    def _entry(self, name: str) -> dict[str, object]:
        data = (self.directory / name).read_bytes()
        oid = hashlib.sha1(data, usedforsecurity=False).hexdigest()
        return {"type": "file", "path": name, "size": len(data), "oid": oid}

    def _json(self, asked: BaseHTTPRequestHandler, value: object) -> None:
        data = json.dumps(value).encode()
        asked.send_response(200)
        asked.send_header("Content-Type", "application/json")
        asked.send_header("Content-Length", str(len(data)))
        asked.end_headers()
        if asked.command == "GET":
            asked.wfile.write(data)

    def _file(self, asked: BaseHTTPRequestHandler, sha: str, name: str, start: int) -> None:
        data = (self.directory / name).read_bytes()
        asked.send_response(206 if start else 200)
        asked.send_header("ETag", f'"{self._entry(name)["oid"]}"')
        asked.send_header("X-Repo-Commit", sha)
        asked.send_header("Accept-Ranges", "bytes")
        asked.send_header("Content-Length", str(len(data) - start))
        if start:
            asked.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        asked.end_headers()
        if asked.command != "GET":
            return
        if name == self.cut:
            self.cut = None
            asked.wfile.write(data[: len(data) // 2])
            asked.close_connection = True
            return
        asked.wfile.write(data[start:])


@pytest.fixture
def hub() -> Iterator[Callable[..., Hub]]:
    """Start a Hub that has one model: `hub(directory, name)`."""
    started: list[Hub] = []

    def start(directory: Path, name: str = "org/model") -> Hub:
        started.append(Hub(directory, name))
        return started[-1]

    yield start
    for one in started:
        one.server.shutdown()
        one.server.server_close()


@pytest.fixture
def script(tmp_path: Path) -> Callable[..., str]:
    """Run Python as a user's script, in a directory of its own: `script(code, ranks=2)`.

    Gives its stdout; with ranks, which print at once, that of the first, then the next one's. A
    script that does not end well fails the test with all it said.
    """

    def run(code: str, *, ranks: int = 0, **environment: str) -> str:
        file = tmp_path / "script.py"
        file.write_text(textwrap.dedent(code), encoding="utf-8")
        command = [sys.executable, file.name]
        if ranks:
            command[1:1] = [
                *("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)),
                *("--redirects", "1", "--log-dir", "logs"),
            ]
        kept = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("HF_", "TORCHELASTIC_")) and name not in {"RANK", "WORLD_SIZE"}
        }
        done = subprocess.run(  # noqa: S603 (our own interpreter)
            command,
            cwd=tmp_path,
            env=kept | {"PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"} | environment,
            capture_output=True,
            text=True,
            timeout=240,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-4000:]
        files = (tmp_path / "logs").glob("*/attempt_0/*/stdout.log")
        by_rank = {int(file.parent.name): file.read_text(encoding="utf-8") for file in files}
        assert sorted(by_rank) == [*range(ranks)]
        return done.stdout + "".join(by_rank[rank] for rank in range(ranks))

    return run
