"""A small server on loopback that speaks the hub's paths and headers."""

import hashlib
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import huggingface_hub.constants
import pytest

COMMIT = "c0ffee" * 6 + "c0ff"


@dataclass
class Hub:
    """One repository at one commit, which is also its branch ``main``."""

    repo: str
    files: dict[str, bytes]
    url: str = ""
    requests: list[str] = field(default_factory=list)

    def handler(self) -> type[BaseHTTPRequestHandler]:
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_HEAD(self) -> None:
                self.answer(body=False)

            def do_GET(self) -> None:
                self.answer(body=True)

            def answer(self, *, body: bool) -> None:
                hub.requests.append(f"{self.command} {self.path}")
                served = {f"/{hub.repo}/resolve/{rev}/{n}": c for rev in ("main", COMMIT) for n, c in hub.files.items()}
                if self.path in served:
                    content = served[self.path]
                    self.reply(200, content, body=body)
                elif self.path.startswith((f"/{hub.repo}/resolve/main/", f"/{hub.repo}/resolve/{COMMIT}/")):
                    self.reply(404, error="EntryNotFound")
                elif self.path.startswith(f"/{hub.repo}/"):
                    self.reply(404, error="RevisionNotFound")
                elif self.path.startswith("/timm/gated/"):
                    self.reply(403, error="GatedRepo")
                else:
                    self.reply(401, error="RepoNotFound")

            def reply(self, status: int, content: bytes = b"", *, body: bool = True, error: str = "") -> None:
                self.send_response(status)
                self.send_header("Content-Length", str(len(content)))
                self.send_header("X-Repo-Commit", COMMIT)
                if error:
                    self.send_header("X-Error-Code", error)
                    self.send_header("X-Error-Message", error)
                else:
                    etag = f'"{hashlib.sha256(content).hexdigest()}"'
                    size = str(len(content))
                    for name, value in {"ETag": etag, "X-Linked-Etag": etag, "X-Linked-Size": size}.items():
                        self.send_header(name, value)
                self.end_headers()
                if body:
                    self.wfile.write(content)

            def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the base class's name
                """Keep the test's output clean."""

        return Handler


@contextmanager
def serving(hub: Hub, cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """Serve a repository, and let huggingface_hub find it, with a cache of its own."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), hub.handler())
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    monkeypatch.setenv("HF_ENDPOINT", hub.url)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    try:
        yield hub
    finally:
        huggingface_hub.close_session()  # its idle connections would be reported as leaks
        server.shutdown()
        server.server_close()
        thread.join()
