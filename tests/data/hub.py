"""A stand-in for the Hub: the part of its HTTP API that reads data sets, over files in memory."""

from __future__ import annotations

import collections
import contextlib
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote

COMMIT = "c0ffee" + "0" * 34


class Hub:
    """The repositories, and what was sent of them.

    Attributes:
        endpoint: the address, for HF_ENDPOINT.
        files: by repository and path in it.
        sent: the number of bytes sent of each file that was asked for, README.md left out.
        revisions: the revisions that were asked for.
    """

    def __init__(self, files: dict[str, dict[str, bytes]]) -> None:
        """Hold ``files`` by repository, "owner/name", and path."""
        self.endpoint = ""
        self.files = files
        self.sent: collections.Counter[str] = collections.Counter()
        self.revisions: set[str] = set()

    @contextlib.contextmanager
    def serve(self) -> Iterator[None]:
        """Serve on a free port of this machine."""
        handler = type("Handler", (_Handler,), {"hub": self})
        with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
            self.endpoint = f"http://127.0.0.1:{server.server_port}"
            thread = threading.Thread(target=server.serve_forever, daemon=True)
            thread.start()
            try:
                yield
            finally:
                server.shutdown()
                thread.join()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    def log_message(self, *_: object) -> None:
        """Print nothing."""

    def _answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        path = unquote(self.path.partition("?")[0])
        if path == "/sent":
            self._send(json.dumps(self.hub.sent).encode())
            self.hub.sent.clear()
        elif match := re.fullmatch(r"/datasets/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            self._send_file(*match.groups())
        elif match := re.fullmatch(r"/api/datasets/([^/]+/[^/]+)(?:/revision/([^/]+))?", path):
            self._send_info(match[1], match[2])
        elif match := re.fullmatch(r"/api/datasets/([^/]+/[^/]+)/tree/([^/]+)/?(.*)", path):
            self._send_tree(*match.groups())
        elif match := re.fullmatch(r"/api/datasets/([^/]+/[^/]+)/paths-info/([^/]+)", path):
            self._send_paths(match[1], body)
        else:
            self._fail("")

    def _send(self, data: bytes, status: int = 200, **headers: str) -> None:
        self.send_response(status)
        headers = {"Content-Type": "application/json", "Content-Length": str(len(data)), **headers}
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _fail(self, code: str) -> None:
        self._send(b"{}", 404, **({"X-Error-Code": code} if code else {}))

    def _send_file(self, repository: str, revision: str, path: str) -> None:
        files = self.hub.files.get(repository)
        if files is None:
            self._fail("RepoNotFound")
            return
        self.hub.revisions.add(revision)
        if path not in files:
            self._fail("EntryNotFound")
            return
        data, status, more = files[path], 200, {}
        if wanted := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            start, end = int(wanted[1]), int(wanted[2] or len(data) - 1)
            more["Content-Range"] = f"bytes {start}-{min(end, len(data) - 1)}/{len(data)}"
            data, status = data[start : end + 1], 206
        if self.command == "GET" and path != "README.md":
            self.hub.sent[path] += len(data)
        tag = hashlib.sha256(files[path]).hexdigest()
        self._send(data, status, **{"X-Repo-Commit": COMMIT, "ETag": f'"{tag}"', **more})

    def _send_info(self, repository: str, revision: str | None) -> None:
        files = self.hub.files.get(repository)
        if files is None:
            self._fail("RepoNotFound")
            return
        self.hub.revisions.add(revision or "main")
        siblings = [{"rfilename": name} for name in files]
        info = {"id": repository, "sha": COMMIT, "siblings": siblings, "tags": [], "private": False}
        self._send(json.dumps(info).encode())

    def _entry(self, repository: str, path: str) -> dict[str, object] | None:
        files = self.hub.files[repository]
        if path in files:
            data = files[path]
            tag = hashlib.sha1(data).hexdigest()
            return {"type": "file", "oid": tag, "size": len(data), "path": path}
        if any(name.startswith(f"{path}/") for name in files):
            return {"type": "directory", "oid": "0" * 40, "size": 0, "path": path}
        return None

    def _send_tree(self, repository: str, _: str, folder: str) -> None:
        names = {
            "/".join(parts[:depth])
            for parts in (name.split("/") for name in self.hub.files[repository])
            for depth in range(1, len(parts) + 1)
        }
        below = f"{folder}/" if folder else ""
        is_deep = "recursive=true" in self.path.lower()
        entries = [
            self._entry(repository, name)
            for name in sorted(names)
            if name.startswith(below) and (is_deep or "/" not in name[len(below) :])
        ]
        self._send(json.dumps(entries).encode())

    def _send_paths(self, repository: str, body: bytes) -> None:
        text = body.decode()
        if text.startswith("{"):
            paths = json.loads(text)["paths"]
        else:
            fields = (field.partition("=") for field in text.split("&"))
            paths = [
                unquote(value.replace("+", " ")) for name, _, value in fields if name == "paths"
            ]
        entries = (self._entry(repository, path) for path in paths)
        self._send(json.dumps([entry for entry in entries if entry]).encode())
