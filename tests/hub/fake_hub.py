"""A hub on this machine: the answers that the client asks for, over HTTP, from a folder."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class FakeHub:
    """Serves one folder as the repository `repo`; `asked` are the files that were sent, `broken` those that are cut short."""

    def __init__(self, repo: str, folder: Path, commit: str = COMMIT) -> None:
        self.repo, self.folder, self.commit = repo, folder, commit
        self.asked: list[str] = []
        self.broken: set[str] = set()
        self.url = ""

    def info(self) -> bytes:
        """What /api/models says of the repository."""
        files = [path for path in sorted(self.folder.rglob("*")) if path.is_file()]
        siblings = [
            {"rfilename": path.relative_to(self.folder).as_posix(), "size": path.stat().st_size} for path in files
        ]
        about = {"_id": "1", "id": self.repo, "modelId": self.repo, "sha": self.commit, "siblings": siblings}
        return json.dumps({**about, "private": False, "tags": [], "downloads": 0, "likes": 0}).encode()

    @contextmanager
    def serving(self) -> Iterator[FakeHub]:
        """The hub on a free port of this machine."""
        server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        self.url = f"http://127.0.0.1:{server.server_port}"
        try:
            yield self
        finally:
            server.shutdown()
            server.server_close()
            thread.join()


def _handler(hub: FakeHub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self) -> None:
            self.answer(body=False)

        def do_GET(self) -> None:
            self.answer(body=True)

        def answer(self, *, body: bool) -> None:
            path = self.path.partition("?")[0]
            if path.startswith(f"/api/models/{hub.repo}"):
                return self.send(hub.info(), {"Content-Type": "application/json"}, body)
            before = f"/{hub.repo}/resolve/{hub.commit}/"
            file = hub.folder / path.removeprefix(before)
            if not path.startswith(before) or not file.is_file():
                self.send_response(404)
                self.send_header("X-Error-Code", "RepoNotFound")
                self.send_header("Content-Length", "0")
                return self.end_headers()
            data = file.read_bytes()
            name = path.removeprefix(before)
            etag = hashlib.sha256(data).hexdigest()
            if body:
                hub.asked.append(name)
                data = data[: len(data) // 2] if name in hub.broken else data
            self.send(data, {"ETag": f'"{etag}"', "X-Repo-Commit": hub.commit}, body)

        def send(self, data: bytes, headers: dict[str, str], body: bool) -> None:
            self.send_response(200)
            for name, value in {**headers, "Content-Length": str(len(data))}.items():
                self.send_header(name, value)
            self.end_headers()
            if body:
                self.wfile.write(data)

        def log_message(self, *arguments: object) -> None:
            """Nothing goes to the terminal."""

    return Handler
