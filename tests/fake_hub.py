"""What of the Hugging Face hub a push calls, on this machine: repositories as dictionaries of bytes."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

COMMIT = "c" * 40


class Hub:
    """repositories: name -> files. private: whether each is. token: that may write. calls: what was asked."""

    def __init__(self) -> None:
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.private: dict[str, bool] = {}
        self.objects: dict[str, bytes] = {}
        self.token = ""
        self.calls: list[str] = []
        self.broken = ""  # a path that answers with status 500
        self.address = ""

    def answer(self, verb: str, path: str, body: bytes, authorization: str) -> tuple[int, Any, dict[str, str]]:
        """Status, body (bytes, or what becomes JSON) and headers."""
        self.calls.append(f"{verb} {path}")
        name = "/".join(path.removeprefix("/api/models/").strip("/").split("/")[:2]).removesuffix(".git")
        if self.broken and self.broken in path:
            return 500, {"error": f"broken, with {authorization}"}, {}
        if authorization != f"Bearer {self.token}":
            return 401, {"error": f"not the right of {authorization}"}, {}
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}"
            there = name in self.repositories
            if not there:
                self.repositories[name], self.private[name] = (
                    {},
                    bool(asked.get("private", asked.get("visibility") == "private")),
                )
            return 409 if there else 200, {"url": f"{self.address}/{name}", "name": name}, {}
        if path == "/api/validate-yaml":
            assert json.loads(body)["content"].startswith("---\n")
            return 200, {}, {}
        if path.startswith("/objects/"):
            self.objects[path.rpartition("/")[2]] = body
            return 200, {}, {}
        if "/resolve/" in path:
            found = self.repositories[name].get(path.rpartition("/")[2])
            missing = {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT}
            etag = {"ETag": f'"{hashlib.sha1(found or b"").hexdigest()}"', "X-Repo-Commit": COMMIT}
            return (404, {}, missing) if found is None else (200, found, etag)
        if "/preupload/" in path:
            return 200, {"files": [self._mode(file) for file in json.loads(body)["files"]]}, {}
        if path.endswith("/info/lfs/objects/batch"):
            wanted = json.loads(body)["objects"]
            return 200, {"transfer": "basic", "objects": [self._upload(thing) for thing in wanted]}, {}
        if "/commit/" in path:
            for line in map(json.loads, body.splitlines()):
                value = line["value"]
                if line["key"] == "file":
                    self.repositories[name][value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    self.repositories[name][value["path"]] = self.objects[value["oid"]]
            return 200, {"commitUrl": f"{self.address}/{name}/commit/{COMMIT}", "commitOid": COMMIT}, {}
        about = {"id": name, "private": self.private[name], "sha": COMMIT, "siblings": [], "tags": []}
        return 200, about, {}

    def _mode(self, file: dict[str, Any]) -> dict[str, Any]:
        kind = "regular" if file["path"].endswith(".md") else "lfs"
        return {"path": file["path"], "uploadMode": kind, "shouldIgnore": False}

    def _upload(self, thing: dict[str, Any]) -> dict[str, Any]:
        return {**thing, "actions": {"upload": {"href": f"{self.address}/objects/{thing['oid']}"}}}


@contextlib.contextmanager
def serving() -> Iterator[Hub]:
    """A hub at `address` for the time of the block."""
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        def respond(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            # the address of an upload is its own permission
            own = f"Bearer {hub.token}" if self.path.startswith("/objects/") else ""
            given = self.headers.get("Authorization") or own
            status, answer, headers = hub.answer(self.command, self.path.partition("?")[0], body, given)
            data = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
            self.send_response(status)
            kind = "application/octet-stream" if isinstance(answer, bytes) else "application/json"
            for key, value in {"Content-Type": kind, "Content-Length": str(len(data)), **headers}.items():
                self.send_header(key, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(data)

        do_GET = do_HEAD = do_POST = do_PUT = respond  # noqa: N815, as http.server has them

        def log_message(self, *words: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.address = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
