"""A hub on this machine: the part of the Hugging Face Hub's API that pushing a folder and loading it again use."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

TOKEN = "hf_of_the_tests"
COMMIT = "0123456789" * 4


class Hub:
    """What was pushed: repository -> path -> content; and every request in words."""

    def __init__(self) -> None:
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.stored: dict[str, bytes] = {}
        """Large files by their sha256."""
        self.requests: list[str] = []
        self.address = ""


class _Handler(BaseHTTPRequestHandler):
    hub: Hub

    def log_message(self, *_: object) -> None:
        pass

    def answer(self, content: Any = None, *, status: int = 200, **headers: str) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def begin(self) -> tuple[str, bytes]:
        path = urlsplit(self.path).path
        self.hub.requests.append(f"{self.command} {path}")
        return path, self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def do_POST(self) -> None:
        path, body = self.begin()
        if self.headers.get("Authorization") != f"Bearer {TOKEN}" and "validate-yaml" not in path:
            return self.answer({"error": "who are you?"}, status=401)
        if path == "/api/validate-yaml":
            return self.answer({"errors": [], "warnings": []})
        if path == "/api/repos/create":
            return self.create(json.loads(body))
        if path.endswith(".git/info/lfs/objects/batch"):
            return self.offer_places(json.loads(body))
        parts = path.split("/")
        name, verb = "/".join(parts[3:5]), parts[5]
        if name not in self.hub.repositories:
            return self.answer({"error": "no such repository"}, status=404)
        if verb == "preupload":
            modes = [
                {"path": file["path"], "shouldIgnore": False, "uploadMode": self.mode_of(file["path"])}
                for file in json.loads(body)["files"]
            ]
            return self.answer({"files": modes})
        assert verb == "commit"
        return self.commit(name, [json.loads(line) for line in body.splitlines()])

    @staticmethod
    def mode_of(path: str) -> str:
        return "lfs" if path.endswith((".safetensors", ".onnx")) else "regular"

    def create(self, asked: dict[str, Any]) -> None:
        name = f"{asked['organization']}/{asked['name']}" if asked.get("organization") else asked["name"]
        known = name in self.hub.repositories
        self.hub.repositories.setdefault(name, {})
        url = f"{self.hub.address}/{name}"
        self.answer(
            {"url": url, "error": "already there"} if known else {"url": url}, status=409 if known else 200
        )

    def offer_places(self, asked: dict[str, Any]) -> None:
        objects = []
        for one in asked["objects"]:
            offer = {"oid": one["oid"], "size": one["size"]}
            if one["oid"] not in self.hub.stored:
                offer["actions"] = {"upload": {"href": f"{self.hub.address}/store/{one['oid']}"}}
            objects.append(offer)
        self.answer({"transfer": "basic", "objects": objects})

    def do_PUT(self) -> None:
        path, body = self.begin()
        digest = hashlib.sha256(body).hexdigest()
        assert path == f"/store/{digest}"
        self.hub.stored[digest] = body
        self.answer()

    def commit(self, name: str, lines: list[dict[str, Any]]) -> None:
        files = self.hub.repositories[name]
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.hub.stored[value["oid"]]
        self.answer({"commitUrl": f"{self.hub.address}/{name}/commit/{COMMIT}", "commitOid": COMMIT})

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path, _ = self.begin()
        owner, repository, verb, _, *inside = [*path.split("/")[1:], "", "", "", ""]
        content = self.hub.repositories.get(f"{owner}/{repository}", {}).get("/".join(inside).strip("/"))
        if verb != "resolve" or content is None:
            return self.answer({"error": "not here"}, status=404, X_Error_Code="EntryNotFound")
        return self.answer(content, ETag=f'"{hashlib.sha256(content).hexdigest()}"', X_Repo_Commit=COMMIT)


@contextlib.contextmanager
def running_hub() -> Iterator[Hub]:
    """Serve a hub on the loopback until the block ends."""
    hub = Hub()
    handler = type("Handler", (_Handler,), {"hub": hub})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        hub.address = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield hub
        finally:
            server.shutdown()
            thread.join()
