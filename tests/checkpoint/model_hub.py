"""A Hub on 127.0.0.1 that serves models: what huggingface_hub asks to list and fetch them.

`org/gated`, `org/private` and `org/busy` answer as the real Hub answers for such repositories.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"
Models = dict[str, dict[str, bytes]]
_ID = r"([\w.-]+/[\w.-]+)"


@contextmanager
def model_hub(models: Models) -> Iterator[tuple[str, list[str]]]:
    """Serves `models`, files by name; gives its address and the files that were fetched."""
    fetched: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: Any) -> None:
            """Keeps the test's output clean."""

        def do_GET(self) -> None:
            path = unquote(urlsplit(self.path).path)
            if found := re.fullmatch(f"/api/models/{_ID}(?:/revision/(.+))?", path):
                self.info(*found.groups())
            elif found := re.fullmatch(f"/api/models/{_ID}/tree/([^/]+)", path):
                self.tree(*found.groups())
            elif found := re.fullmatch(f"/{_ID}/resolve/([^/]+)/(.+)", path):
                self.file(*found.groups())
            else:
                self.answer(404, b"")

        do_HEAD = do_GET  # noqa: N815 - the base class names it

        def answer(self, status: int, body: bytes, **headers: str) -> None:
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name.replace("_", "-"), value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def known(self, name: str, revision: str | None) -> bool:
            if name == "org/gated":
                self.answer(403, b"", X_Error_Code="GatedRepo", X_Error_Message="ask")
            elif name == "org/busy":
                self.answer(400, b"", X_Error_Message="no capacity")
            elif name not in models:
                self.answer(401, b"", X_Error_Code="RepoNotFound", X_Error_Message="no")
            elif revision not in (None, "main", COMMIT):
                self.answer(404, b"", X_Error_Code="RevisionNotFound", X_Error_Message="no")
            else:
                return True
            return False

        def info(self, name: str, revision: str | None) -> None:
            if self.known(name, revision):
                files = [{"rfilename": file} for file in models[name]]
                row = {"id": name, "sha": COMMIT, "siblings": files}
                self.answer(200, json.dumps(row).encode())

        def tree(self, name: str, revision: str) -> None:
            if self.known(name, revision):
                rows = [
                    {"type": "file", "path": file, "size": len(data), "oid": "0" * 40}
                    for file, data in models[name].items()
                ]
                self.answer(200, json.dumps(rows).encode())

        def file(self, name: str, revision: str, file: str) -> None:
            if not self.known(name, revision):
                return
            if file not in models[name]:
                self.answer(404, b"", X_Error_Code="EntryNotFound")
                return
            if self.command == "GET":
                fetched.append(file)
            data = models[name][file]
            etag = f'"{hashlib.sha1(data, usedforsecurity=False).hexdigest()}"'
            self.answer(200, data, ETag=etag, X_Repo_Commit=COMMIT)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", fetched
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
