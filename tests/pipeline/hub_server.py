"""A hub of one dataset on this machine, speaking as much of the hub's protocol as its own clients ask for."""

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@contextmanager
def serving(repo: str, files: dict[str, bytes]) -> Iterator[str]:
    """The address of a hub that has the dataset `repo`, of these files, at `COMMIT`."""
    hub = _Hub(repo, files)
    threading.Thread(target=hub.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{hub.server_port}"
    finally:
        hub.shutdown()
        hub.server_close()


class _Hub(ThreadingHTTPServer):
    def __init__(self, repo: str, files: dict[str, bytes]) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repo, self.files = repo, files

    def info(self) -> dict[str, Any]:
        siblings = [{"rfilename": name, "size": len(content)} for name, content in self.files.items()]
        return {"id": self.repo, "sha": COMMIT, "private": False, "tags": [], "downloads": 0, "siblings": siblings, "cardData": self.card()}

    def card(self) -> dict[str, Any]:
        """The hub parses the head of the README, which here is JSON (and so YAML)."""
        readme = self.files.get("README.md", b"---\n{}\n---\n")
        content: dict[str, Any] = json.loads(readme.split(b"---")[1])
        return content

    def entry(self, name: str) -> dict[str, Any]:
        return {"type": "file", "path": name, "size": len(self.files[name]), "oid": hashlib.sha1(self.files[name]).hexdigest()}

    def listing(self, folder: str, recursive: bool) -> list[dict[str, Any]]:
        below = [name for name in self.files if name.startswith(f"{folder}/" if folder else "")]
        depth = folder.count("/") + 1 if folder else 0
        folders = dict.fromkeys("/".join(name.split("/")[: depth + 1]) for name in below if name.count("/") > depth)
        shown = [self.entry(name) for name in below if recursive or name.count("/") == depth]
        return [{"type": "directory", "path": name, "size": 0, "oid": COMMIT} for name in folders] + shown


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Hub

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        hub, path = self.server, unquote(urlsplit(self.path).path)
        files, api = f"/datasets/{hub.repo}/resolve/{COMMIT}/", f"/api/datasets/{hub.repo}"
        if path.startswith(files):
            content = hub.files.get(path.removeprefix(files))
            if content is None:
                self._answer(404, b"", X_Error_Code="EntryNotFound")
            else:
                self._answer(200, content, ETag=f'"{hashlib.sha1(content).hexdigest()}"')
        elif path.startswith(f"{api}/tree/{COMMIT}"):
            self._tell(hub.listing(path.partition(COMMIT)[2].strip("/"), "recursive=true" in self.path))
        elif path in (api, f"{api}/revision/main", f"{api}/revision/{COMMIT}"):
            self._tell(hub.info())
        else:
            self._answer(404, b'{"error": "Repository not found"}', X_Error_Code="RepoNotFound")

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self._tell([self.server.entry(name) for name in asked.get("paths", []) if name in self.server.files])

    def _tell(self, content: Any) -> None:
        self._answer(200, json.dumps(content).encode(), Content_Type="application/json")

    def _answer(self, status: int, body: bytes, **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), "X-Repo-Commit": COMMIT, **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *arguments: Any) -> None:
        """Nothing: the answers are what is tested."""
