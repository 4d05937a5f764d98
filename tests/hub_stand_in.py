"""A hub of one's own for tests: a local server that answers what huggingface_hub asks.

Repositories of models, with commits, branches, private and gated ones. What it answers, and with
which headers, is what the real one does; every file is a plain git file, none goes through LFS.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
import yaml

Files = dict[str, bytes]
REPOSITORY = r"(?P<repo>[\w.-]+/[\w.-]+)"


@dataclass
class Repository:
    """Commits by hash, and what branches and tags name."""

    commits: dict[str, Files] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)
    is_private: bool = False
    is_gated: bool = False

    def commit(self, files: Files, revision: str = "main", message: str = "") -> str:
        """A new commit that holds what the branch did, and these files."""
        held = {**self.commits.get(self.refs.get(revision, ""), {}), **files}
        text = repr((len(self.commits), sorted(held))).encode()
        name = hashlib.sha1(text, usedforsecurity=False).hexdigest()
        self.commits[name], self.refs[revision] = held, name
        self.messages.append(message)
        return name

    def resolve(self, revision: str) -> str | None:
        """The commit that a branch, a tag or a hash names."""
        found = self.refs.get(revision, revision)
        return found if found in self.commits else None


class StandIn:
    """The hub: its repositories, who may do what, and what it was asked."""

    token = "hf_right"

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.requests: list[tuple[str, str]] = []
        self.agents: set[str] = set()
        self.is_down = False
        self.url = ""

    def add(self, name: str, folder: Path | None = None, revision: str = "main") -> Repository:
        """A repository that holds a folder's files."""
        repository = self.repositories.setdefault(name, Repository())
        paths = [p for p in sorted(folder.rglob("*")) if p.is_file()] if folder else []
        if folder is not None:
            named = {p.relative_to(folder).as_posix(): p.read_bytes() for p in paths}
            repository.commit(named, revision)
        return repository

    def files(self, name: str, revision: str = "main") -> Files:
        """What a branch holds."""
        repository = self.repositories[name]
        return repository.commits[repository.refs[revision]]


class Handler(BaseHTTPRequestHandler):
    """One request."""

    protocol_version = "HTTP/1.1"
    hub: StandIn

    def log_message(self, *_: Any) -> None:
        """Nothing is printed."""

    def do_HEAD(self) -> None:
        self._answer("HEAD")

    def do_GET(self) -> None:
        self._answer("GET")

    def do_POST(self) -> None:
        self._answer("POST")

    def _answer(self, method: str) -> None:
        path = urlsplit(self.path).path
        self.hub.requests.append((method, unquote(path)))
        self.hub.agents.add(self.headers.get("user-agent", ""))
        self.body = self.rfile.read(int(self.headers.get("content-length") or 0))
        if self.hub.is_down:
            return self._refuse(503, "Down")
        kind = "GET" if method == "HEAD" else method
        for verb, pattern, name in ROUTES:
            found = re.fullmatch(pattern, path)
            if verb == kind and found:
                parts = {key: unquote(value) for key, value in found.groupdict().items()}
                return getattr(self, name)(**parts)
        return self._refuse(404, "NoSuchRoute")

    def _send(self, data: bytes, status: int = 200, **headers: str) -> None:
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _json(self, value: Any, status: int = 200) -> None:
        self._send(json.dumps(value).encode(), status, Content_Type="application/json")

    def _refuse(self, status: int, code: str, **headers: str) -> None:
        self._send(b"{}", status, X_Error_Code=code, X_Error_Message=code, **headers)

    def _is_known(self) -> bool:
        return self.headers.get("authorization") == f"Bearer {self.hub.token}"

    def _repository(self, repo: str) -> Repository | None:
        """The one that may be seen; None when a refusal went out."""
        found = self.hub.repositories.get(repo)
        if found is None or (found.is_private and not self._is_known()):
            self._refuse(401 if not self._is_known() else 404, "RepoNotFound")
            return None
        return found

    def _files(self, repo: str, revision: str) -> tuple[Repository, str] | None:
        repository = self._repository(repo)
        if repository is None:
            return None
        commit = repository.resolve(revision)
        if commit is None:
            self._refuse(404, "RevisionNotFound")
            return None
        return repository, commit

    def file(self, repo: str, revision: str, path: str) -> None:
        repository = self._repository(repo)
        if repository is None:
            return
        if repository.is_gated and not self._is_known():
            return self._refuse(403, "GatedRepo")
        found = self._files(repo, revision)
        if found is None:
            return
        data = repository.commits[found[1]].get(path)
        if data is None:
            return self._refuse(404, "EntryNotFound", X_Repo_Commit=found[1])
        etag = hashlib.sha1(data, usedforsecurity=False).hexdigest()
        self._send(data, X_Repo_Commit=found[1], ETag=f'"{etag}"')

    def info(self, repo: str, revision: str = "main") -> None:
        found = self._files(repo, revision)
        if found is not None:
            files = [{"rfilename": name} for name in found[0].commits[found[1]]]
            self._json({"id": repo, "modelId": repo, "sha": found[1], "siblings": files})

    def tree(self, repo: str, revision: str) -> None:
        found = self._files(repo, revision)
        if found is not None:
            files = found[0].commits[found[1]].items()
            self._json(
                [{"type": "file", "path": p, "size": len(d), "oid": "0" * 40} for p, d in files]
            )

    def create(self) -> None:
        if not self._is_known():
            return self._refuse(401, "Unauthorized")
        asked = json.loads(self.body)
        name = f"{asked.get('organization') or 'me'}/{asked['name']}"
        is_there = name in self.hub.repositories
        repository = self.hub.add(name)
        if not is_there:
            repository.is_private = asked.get("private") or asked.get("visibility") == "private"
            repository.commit({".gitattributes": b""}, message="initial commit")
        self._json({"url": f"{self.hub.url}/{name}", "id": name}, 409 if is_there else 200)

    def branch(self, repo: str, revision: str) -> None:
        repository = self._repository(repo)
        if repository is not None:
            is_there = revision in repository.refs
            start = repository.refs.get("main") or repository.commit({})
            repository.refs.setdefault(revision, start)
            self._json({}, 409 if is_there else 200)

    def who(self) -> None:
        self._json({"name": "me", "type": "user"})

    def validate(self) -> None:
        """The metadata of a card, as far as the hub's rules concern ours."""
        text = json.loads(self.body)["content"]
        head = re.match(r"---\n(.*?)\n---\n", text, re.DOTALL)
        values = yaml.safe_load(head.group(1)) if head else {}
        bases = values.get("base_model") or []
        bases = [bases] if isinstance(bases, str) else bases
        wrong = [b for b in bases if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", b)]
        errors = [{"message": f'"base_model" {name} is no id of a model'} for name in wrong]
        self._json({"errors": errors, "warnings": []}, 400 if errors else 200)

    def preupload(self, repo: str, revision: str) -> None:
        if self._files(repo, revision) or self.hub.repositories.get(repo):
            files = json.loads(self.body)["files"]
            self._json(
                {
                    "files": [
                        {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False}
                        for f in files
                    ]
                }
            )

    def commit(self, repo: str, revision: str) -> None:
        repository = self._repository(repo)
        if repository is None:
            return
        if not self._is_known():
            return self._refuse(401, "Unauthorized")
        lines = [json.loads(line) for line in self.body.splitlines()]
        files = {
            line["value"]["path"]: base64.b64decode(line["value"]["content"])
            for line in lines
            if line["key"] == "file"
        }
        request = f"refs/pr/{len(repository.commits)}" if "create_pr" in self.path else None
        name = repository.commit(files, request or revision, lines[0]["value"]["summary"])
        answer: dict[str, Any] = {"commitOid": name, "success": True}
        answer["commitUrl"] = f"{self.hub.url}/{repo}/commit/{name}"
        if request is not None:
            answer["pullRequestUrl"] = f"{self.hub.url}/{repo}/discussions/{request[8:]}"
        self._json(answer)


ROUTES = [
    ("GET", rf"/{REPOSITORY}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", "file"),
    ("GET", rf"/api/models/{REPOSITORY}", "info"),
    ("GET", rf"/api/models/{REPOSITORY}/revision/(?P<revision>[^/]+)", "info"),
    ("GET", rf"/api/models/{REPOSITORY}/tree/(?P<revision>[^/]+)", "tree"),
    ("GET", "/api/whoami-v2", "who"),
    ("POST", "/api/repos/create", "create"),
    ("POST", "/api/validate-yaml", "validate"),
    ("POST", rf"/api/models/{REPOSITORY}/preupload/(?P<revision>[^/]+)", "preupload"),
    ("POST", rf"/api/models/{REPOSITORY}/commit/(?P<revision>[^/]+)", "commit"),
    ("POST", rf"/api/models/{REPOSITORY}/branch/(?P<revision>[^/]+)", "branch"),
]


@contextmanager
def running() -> Iterator[StandIn]:
    """The hub, for the length of the block, at its `url`."""
    hub = StandIn()
    handler = type("Bound", (Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def turn_to(hub: StandIn, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let huggingface_hub of this process ask this hub, and keep its files there."""
    from huggingface_hub import constants, hf_api

    monkeypatch.setattr(hf_api.api, "endpoint", hub.url)
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    template = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(cache / "no-token"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.delenv("HF_TOKEN", raising=False)
