"""A stand-in for the Hugging Face hub: a server on this machine that answers the hub's client as the hub would.

It knows repositories of three kinds: open ones, which are folders here; gated ones, whose description anyone may see
and whose files nobody gets; and all others, which it does not have, or does not show to strangers.
"""

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class StandInHub:
    """Address and contents of a running stand-in."""

    address: str = ""
    open: dict[str, Path] = field(default_factory=dict)
    """Hub id -> the folder with its files."""
    revisions: set[str] = field(default_factory=lambda: {"main"})
    """Branches and tags that every open repository has."""
    gated: set[str] = field(default_factory=set)
    failing: set[str] = field(default_factory=set)
    """Hub ids for which the server answers with an error of its own."""
    asked: list[str] = field(default_factory=list)
    """Method and path of every request for a repository."""


@contextmanager
def stand_in_hub(monkeypatch: pytest.MonkeyPatch, cache: Path, token: str | None = None) -> Iterator[StandInHub]:
    """Run a stand-in on a free port and point the hub's client at it, with an empty cache."""
    hub = StandInHub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(hub))
    hub.address = f"http://127.0.0.1:{server.server_port}"
    use_hub(monkeypatch, hub.address, cache, token)
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()


def use_hub(monkeypatch: pytest.MonkeyPatch, address: str, cache: Path, token: str | None = None) -> None:
    """Point the hub's client at an address; it reads its environment once, when it is imported."""
    constants = "huggingface_hub.constants"
    monkeypatch.setattr(f"{constants}.ENDPOINT", address)
    monkeypatch.setattr(
        f"{constants}.HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr(f"{constants}.HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(f"{constants}.HF_TOKEN_PATH", str(cache / "token"))
    monkeypatch.setattr(f"{constants}.HF_STORED_TOKENS_PATH", str(cache / "stored_tokens"))
    monkeypatch.setattr("huggingface_hub.hf_api.api.endpoint", address)
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    if token is not None:
        monkeypatch.setenv("HF_TOKEN", token)


def _handler(hub: StandInHub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        """Answers for `hub`."""

        def do_GET(self) -> None:
            self._answer()

        def do_HEAD(self) -> None:
            self._answer()

        def log_message(self, format: str, *arguments: object) -> None:
            """Keep the test's output empty."""

        def _answer(self) -> None:
            path = unquote(urlsplit(self.path).path)
            name = next((name for name in (*hub.open, *hub.gated, *hub.failing) if f"/{name}" in f"{path}/"), None)
            if "/owner/" in path:  # the client also asks what kind of machine it runs on
                hub.asked.append(f"{self.command} {path}")
            if self.headers.get("Authorization") == "Bearer hf_expired":
                self._refuse(401, message="Invalid credentials in Authorization header")
            elif name in hub.failing:
                self._refuse(500, message="Internal Error - we are working hard to fix this")
            elif name is None:
                self._refuse(404 if "Authorization" in self.headers else 401, code="RepoNotFound")
            elif name in hub.gated:
                self._gated(name, path)
            elif path.startswith("/api/"):
                self._describe(hub.open[name], name, path)
            else:
                self._file(hub.open[name], path.partition(f"/resolve/{COMMIT}/")[2])

        def _gated(self, name: str, path: str) -> None:
            if path.startswith("/api/") and not {"tree", "auth-check"} & set(path.split("/")):
                self._json({"id": name, "sha": COMMIT, "gated": "manual", "siblings": [], "tags": []})
            else:
                self._refuse(403 if "Authorization" in self.headers else 401, code="GatedRepo")

        def _describe(self, folder: Path, name: str, path: str) -> None:
            if "/tree/" in path:
                files = [file for file in sorted(folder.rglob("*")) if file.is_file()]
                self._json(
                    [
                        {
                            "type": "file",
                            "path": str(file.relative_to(folder)),
                            "size": file.stat().st_size,
                            "oid": hashlib.sha1(file.read_bytes()).hexdigest(),
                        }
                        for file in files
                    ]
                )
            elif "/revision/" in path and path.partition("/revision/")[2] not in {*hub.revisions, COMMIT}:
                self._refuse(404, code="RevisionNotFound")
            else:
                self._json({"id": name, "sha": COMMIT, "siblings": [], "tags": []})

        def _file(self, folder: Path, name: str) -> None:
            data = (folder / name).read_bytes()
            self.send_response(200)
            self.send_header("X-Repo-Commit", COMMIT)
            self.send_header("ETag", f'"{hashlib.sha1(data).hexdigest()}"')
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(data)

        def _json(self, tree: Any) -> None:
            data = json.dumps(tree).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def _refuse(self, status: int, code: str = "", message: str = "") -> None:
            self.send_response(status)
            if code:
                self.send_header("X-Error-Code", code)
            if message:
                self.send_header("X-Error-Message", message)
            self.send_header("Content-Length", "0")
            self.end_headers()

    return Handler
