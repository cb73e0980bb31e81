"""A Hub on 127.0.0.1: what of its HTTP interface huggingface_hub uses to publish and to fetch.

It keeps what was uploaded in memory, checks LFS objects against their hash and size as the real one
does, and answers by token and repository name, so that a test picks its answer by what it sends.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

GOOD = "hf_" + "goodtokenforthetests" * 2
READ_ONLY = "hf_" + "readonlytokenoftests" * 2
WRONG = "hf_" + "wrongtokenforthetest" * 2


@dataclass
class Repo:
    """A model repository: files of each branch, commits in order."""

    private: bool
    branches: dict[str, dict[str, bytes]] = field(default_factory=lambda: {"main": {}})
    commits: list[str] = field(default_factory=list)


class FakeHub:
    """The server, as a context manager; `url` is its endpoint."""

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.blobs: dict[str, bytes] = {}
        self.requests: list[str] = []
        hub = self

        class Handler(_Handler):
            state = hub

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        self.thread = threading.Thread(target=self.server.serve_forever, daemon=True)

    def __enter__(self) -> FakeHub:
        self.thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.server.shutdown()
        self.thread.join()
        self.server.server_close()

    def files(self, repo_id: str, branch: str = "main") -> dict[str, bytes]:
        return self.repos[repo_id].branches[branch]


class _Handler(BaseHTTPRequestHandler):
    state: FakeHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        """Keeps the test's output clean."""

    def answer(self, status: int, body: Any = None, headers: dict[str, str] | None = None) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def refuse(self, status: int, message: str, code: str = "") -> None:
        headers = {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {})
        self.answer(status, {"error": message}, headers)

    def read(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def do_GET(self) -> None:
        self._route()

    def do_HEAD(self) -> None:
        self._route()

    def do_POST(self) -> None:
        self._route()

    def do_PUT(self) -> None:
        self._route()

    def _route(self) -> None:
        body = self.read()
        path = urlsplit(self.path).path
        self.state.requests.append(f"{self.command} {path}")
        for method, pattern, serve in _ROUTES:
            match = re.fullmatch(pattern, path)
            if match and self.command in method:
                serve(self, body, *map(unquote, match.groups()))
                return
        self.refuse(404, f"the fake has no {self.command} {path}")

    def token(self) -> str:
        return (self.headers.get("Authorization") or "").removeprefix("Bearer ")

    def allowed(self) -> bool:
        """Whether the token may write; answers the request where it may not."""
        if self.token() == READ_ONLY:
            self.refuse(403, "You don't have the rights to do that")
        elif self.token() != GOOD:
            self.refuse(401, "Invalid credentials in Authorization header")
        return self.token() == GOOD

    def repo(self, repo_id: str) -> Repo | None:
        found = self.state.repos.get(repo_id)
        if found is None or (found.private and self.token() != GOOD):
            self.refuse(404, "Repository not found", "RepoNotFound")
            return None
        return found

    def create(self, body: bytes) -> None:
        asked = json.loads(body)
        repo_id = f"{asked['organization']}/{asked['name']}"
        if not self.allowed():
            return
        status = 409 if repo_id in self.state.repos else 200
        self.state.repos.setdefault(repo_id, Repo(asked.get("visibility") == "private"))
        self.answer(status, {"url": f"{self.state.url}/{repo_id}"})

    def listing(self, _: bytes) -> None:
        """Public models with all the tags that are asked for, by the tags of their cards."""
        asked = parse_qs(urlsplit(self.path).query)
        found = []
        for repo_id, repo in self.state.repos.items():
            card = repo.branches["main"].get("README.md", b"---\n{}\n---\n").decode()
            front = yaml.safe_load(card.split("---")[1])
            tags = list(front.get("tags") or [])
            tags += [f"base_model:{front['base_model']}"] if "base_model" in front else []
            names = [{"rfilename": name} for name in repo.branches["main"]]
            if not repo.private and {*asked.get("filter", [])} <= {*tags}:
                found.append({"id": repo_id, "tags": tags, "downloads": 3, "siblings": names})
        self.answer(200, found)

    def info(self, _: bytes, repo_id: str) -> None:
        if repo := self.repo(repo_id):
            self.answer(200, {"id": repo_id, "private": repo.private, "siblings": []})

    def tree(self, _: bytes, repo_id: str, branch: str) -> None:
        if repo := self.repo(repo_id):
            found = repo.branches[branch]
            self.answer(200, [
                {"type": "file", "path": name, "size": len(data), "oid": "0" * 40}
                for name, data in found.items()
            ])  # fmt: skip

    def branch(self, _: bytes, repo_id: str, branch: str) -> None:
        if not self.allowed():
            return
        if repo := self.repo(repo_id):
            known = branch in repo.branches
            repo.branches.setdefault(branch, dict(repo.branches["main"]))
            self.answer(409 if known else 200, {})

    def validate(self, body: bytes) -> None:
        content = json.loads(body)["content"]
        front = yaml.safe_load(content.split("---")[1])
        errors = [] if isinstance(front, dict) else [{"message": "no metadata"}]
        self.answer(400 if errors else 200, {"errors": errors, "warnings": []})

    def preupload(self, body: bytes, repo_id: str, _: str) -> None:
        if not self.allowed() or not self.repo(repo_id):
            return
        large = (".safetensors", ".onnx", ".onnx_data", ".png")
        self.answer(200, {"files": [
            {"path": file["path"], "shouldIgnore": False, "oid": None,
             "uploadMode": "lfs" if file["path"].endswith(large) else "regular"}
            for file in json.loads(body)["files"]
        ]})  # fmt: skip

    def batch(self, body: bytes, _: str) -> None:
        if not self.allowed():
            return
        objects = []
        for one in json.loads(body)["objects"]:
            known = one["oid"] in self.state.blobs
            href = f"{self.state.url}/lfs/{one['oid']}"
            actions = {} if known else {"actions": {"upload": {"href": href}}}
            objects.append(one | actions)
        self.answer(200, {"transfer": "basic", "objects": objects})

    def put(self, body: bytes, oid: str) -> None:
        if hashlib.sha256(body).hexdigest() != oid:
            self.refuse(400, "the content is not what its hash says")
            return
        self.state.blobs[oid] = body
        self.answer(200, {})

    def commit(self, body: bytes, repo_id: str, branch: str) -> None:
        repo = self.repo(repo_id) if self.allowed() else None
        if repo is None:
            return
        if repo_id.endswith("/busy"):
            self.refuse(409, "another commit is in progress")
            return
        if repo_id.endswith("/nosy"):
            self.refuse(403, f"no rights for {self.token()}")
            return
        files = repo.branches[branch]
        for line in body.splitlines():
            item = json.loads(line)
            value = item["value"]
            if item["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif item["key"] == "lfsFile":
                blob = self.state.blobs[value["oid"]]
                assert len(blob) == value["size"]
                files[value["path"]] = blob
            elif item["key"] == "deletedFile":
                del files[value["path"]]
        oid = hashlib.sha1(body, usedforsecurity=False).hexdigest()
        repo.commits.append(oid)
        url = f"{self.state.url}/{repo_id}/commit/{oid}"
        self.answer(200, {"commitUrl": url, "commitOid": oid, "pullRequestUrl": None})

    def resolve(self, _: bytes, repo_id: str, revision: str, name: str) -> None:
        repo = self.repo(repo_id)
        if repo is None:
            return
        branch = "main" if revision in repo.commits else revision
        if branch not in repo.branches:
            self.refuse(404, "Revision not found", "RevisionNotFound")
        elif name not in repo.branches[branch]:
            self.refuse(404, "Entry not found", "EntryNotFound")
        else:
            data = repo.branches[branch][name]
            digest = hashlib.sha1(data, usedforsecurity=False).hexdigest()
            headers = {"ETag": f'"{digest}"', "X-Repo-Commit": repo.commits[-1]}
            self.answer(200, data, headers)


_ID = r"([\w.-]+/[\w.-]+)"
_ROUTES: list[tuple[set[str], str, Any]] = [
    ({"POST"}, "/api/repos/create", _Handler.create),
    ({"POST"}, "/api/validate-yaml", _Handler.validate),
    ({"GET"}, "/api/models", _Handler.listing),
    ({"GET"}, f"/api/models/{_ID}", _Handler.info),
    ({"GET"}, f"/api/models/{_ID}/tree/([^/]+)", _Handler.tree),
    ({"POST"}, f"/api/models/{_ID}/branch/([^/]+)", _Handler.branch),
    ({"POST"}, f"/api/models/{_ID}/preupload/([^/]+)", _Handler.preupload),
    ({"POST"}, f"/api/models/{_ID}/commit/([^/]+)", _Handler.commit),
    ({"POST"}, rf"/{_ID}\.git/info/lfs/objects/batch", _Handler.batch),
    ({"PUT"}, "/lfs/([0-9a-f]{64})", _Handler.put),
    ({"GET", "HEAD"}, f"/{_ID}/resolve/([^/]+)/(.+)", _Handler.resolve),
]
