"""A stand-in for the Hugging Face hub on 127.0.0.1: the calls that an upload of a folder makes, without xet."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

TOKEN = "hf_" + "Abc0123456789xyz" * 2
REPO = "owner/name"


class Hub:
    """A hub with at most one repository of models.

    Attributes:
        files: What the repository holds; None before it is there.
        private: Whether it is.
        answers: Errors by a part of the path: status and message.
        calls: Method and path of each call.
    """

    def __init__(self) -> None:
        self.files: dict[str, bytes] | None = None
        self.private = False
        self.answers: dict[str, tuple[int, str]] = {}
        self.calls: list[str] = []
        self.stored: dict[str, bytes] = {}
        self.commits: list[str] = []
        self.endpoint = ""

    def answer(self, method: str, path: str, body: bytes) -> tuple[int, Any]:
        """Return the status and the body of an answer."""
        if path == "/api/whoami-v2":
            return 200, {"name": "owner"}
        if path == "/api/repos/create":
            wanted = json.loads(body)
            assert f"{wanted['organization']}/{wanted['name']}" == REPO
            known, self.files = self.files is not None, {} if self.files is None else self.files
            if not known:
                self.private = wanted.get("visibility") == "private"
            return 409 if known else 200, {"url": f"{self.endpoint}/{REPO}", "error": "exists"}
        if self.files is None:
            return 404, {"error": "Repository not found"}
        if path == f"/api/models/{REPO}":
            return 200, {"id": REPO, "private": self.private, "sha": "0" * 40}
        if path.startswith(f"/api/models/{REPO}/tree/main"):
            assert self.files is not None
            return 200, [
                {"type": "file", "path": name, "size": len(self.files[name]), "oid": ""} for name in self.files
            ]
        if path == "/api/validate-yaml":
            return 200, {"errors": [], "warnings": []}
        if path == f"/api/models/{REPO}/preupload/main":
            names = [file["path"] for file in json.loads(body)["files"]]
            large = (".safetensors", ".png")
            modes = {name: "lfs" if name.endswith(large) else "regular" for name in names}
            return 200, {"files": [{"path": n, "uploadMode": m, "shouldIgnore": False} for n, m in modes.items()]}
        if path == f"/{REPO}.git/info/lfs/objects/batch":
            return 200, {"transfer": "basic", "objects": [self._upload(file) for file in json.loads(body)["objects"]]}
        if path.startswith("/upload/"):
            name = path.removeprefix("/upload/")
            assert method == "PUT" and hashlib.sha256(body).hexdigest() == name
            self.stored[name] = body
            return 200, {}
        if path == f"/api/models/{REPO}/commit/main":
            self._commit([json.loads(line) for line in body.splitlines()])
            return 200, {"commitUrl": f"{self.endpoint}/{REPO}/commit/1", "commitOid": "1" * 40}
        return 404, {"error": "Not Found"}

    def _upload(self, file: dict[str, Any]) -> dict[str, Any]:
        return {**file, "actions": {"upload": {"href": f"{self.endpoint}/upload/{file['oid']}"}}}

    def _commit(self, lines: list[dict[str, Any]]) -> None:
        assert self.files is not None
        for line in lines:
            value = line["value"]
            if line["key"] == "header":
                self.commits.append(value["summary"])
            elif line["key"] == "file":
                self.files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                self.files[value["path"]] = self.stored[value["oid"]]
            else:
                del self.files[value["path"]]


@contextmanager
def serving(hub: Hub) -> Iterator[None]:
    """Serve a hub; every call must have the token, except those that store a file."""

    class Handler(BaseHTTPRequestHandler):
        def do(self) -> None:
            path = self.path.partition("?")[0]
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            hub.calls.append(f"{self.command} {path}")
            errors = [answer for part, answer in hub.answers.items() if part in path]
            if errors:
                status, message = errors[0]
                answer: Any = {"error": message, "errors": [{"message": message}]}
            elif not path.startswith("/upload/") and self.headers.get("Authorization") != f"Bearer {TOKEN}":
                status, answer = 401, {"error": "Invalid credentials"}
            else:
                status, answer = hub.answer(self.command, path, body)
            content = json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        do_GET = do_POST = do_PUT = do_HEAD = do

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.endpoint = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    try:
        yield
    finally:
        server.shutdown()
        server.server_close()
