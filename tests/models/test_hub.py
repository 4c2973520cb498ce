"""Fetching from a small server on loopback that speaks the hub's paths and headers."""

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import huggingface_hub.constants
import pytest
from safetensors.torch import save

from models.checkpoint import load
from models.errors import EnvironmentUnsuitable, UsageError
from models.hub import fetch, parse
from models.registry import HubFile
from tests.models.swins import tiny_spec, tiny_swin, to_timm_names

COMMIT = "c0ffee" * 6 + "c0ff"
REPO = "timm/tiny"


@dataclass
class Hub:
    """One repository with one file at one commit, which is also its branch ``main``."""

    content: bytes
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
                served = {f"/{REPO}/resolve/{rev}/model.safetensors" for rev in ("main", COMMIT)}
                if self.path in served:
                    self.reply(200, hub.content if body else b"", length=len(hub.content))
                elif self.path.startswith(f"/{REPO}/resolve/main/"):
                    self.reply(404, error="EntryNotFound")
                elif self.path.startswith(f"/{REPO}/"):
                    self.reply(404, error="RevisionNotFound")
                elif self.path.startswith("/timm/gated/"):
                    self.reply(403, error="GatedRepo")
                else:
                    self.reply(401, error="RepoNotFound")

            def reply(self, status: int, content: bytes = b"", length: int = 0, error: str = "") -> None:
                self.send_response(status)
                self.send_header("Content-Length", str(length))
                self.send_header("X-Repo-Commit", COMMIT)
                if error:
                    self.send_header("X-Error-Code", error)
                    self.send_header("X-Error-Message", error)
                else:
                    etag = f'"{hashlib.sha256(hub.content).hexdigest()}"'
                    for name, value in {"ETag": etag, "X-Linked-Etag": etag, "X-Linked-Size": str(length)}.items():
                        self.send_header(name, value)
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the base class's name
                """Keep the test's output clean."""

        return Handler


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    weights = {key: value.contiguous() for key, value in to_timm_names(dict(tiny_swin().state_dict())).items()}
    hub = Hub(save(weights))
    server = ThreadingHTTPServer(("127.0.0.1", 0), hub.handler())
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    monkeypatch.setenv("HF_ENDPOINT", hub.url)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    yield hub
    huggingface_hub.close_session()  # its idle connections would be reported as leaks
    server.shutdown()
    server.server_close()
    thread.join()


def test_fetches_once_and_loads(hub: Hub) -> None:
    fetched = fetch(HubFile(REPO, COMMIT))
    assert fetched.path.read_bytes() == hub.content
    assert fetched.origin == f"{REPO}@{COMMIT}/model.safetensors"
    loaded = load(tiny_spec(), fetched.path, source="pretrained", origin=fetched.origin)
    assert loaded.weights.sha256 == hashlib.sha256(hub.content).hexdigest()
    assert loaded.weights.describe().startswith(f"pretrained {fetched.origin}")

    asked = len(hub.requests)
    assert fetch(HubFile(REPO, COMMIT)) == fetched
    assert len(hub.requests) == asked  # a pinned file that is cached needs no network


def test_a_branch_is_resolved_to_its_commit(hub: Hub) -> None:
    assert fetch(HubFile(REPO)).origin == f"{REPO}@{COMMIT}/model.safetensors"
    downloads = [r for r in hub.requests if r.startswith("GET")]
    fetch(HubFile(REPO))
    assert [r for r in hub.requests if r.startswith("GET")] == downloads


@pytest.mark.parametrize(
    "file",
    [HubFile("timm/absent"), HubFile("timm/gated"), HubFile(REPO, "0" * 40), HubFile(REPO, filename="absent.bin")],
    ids=["repository", "gated", "revision", "file"],
)
def test_what_the_hub_refuses_is_a_usage_error(hub: Hub, file: HubFile) -> None:
    with pytest.raises(UsageError) as failure:
        fetch(file)
    assert file.repo in failure.value.found
    assert "HTTP 40" in failure.value.found


def test_without_a_network_the_cache_is_enough(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    fetched = fetch(HubFile(REPO))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    huggingface_hub.close_session()  # the session read the setting when it was made
    assert fetch(HubFile(REPO)) == fetched
    with pytest.raises(EnvironmentUnsuitable, match="timm/other could not be fetched") as failure:
        fetch(HubFile("timm/other"))
    assert failure.value.exit_code == 7
    assert "--checkpoint" in failure.value.hint


def test_honours_the_environment(hub: Hub, tmp_path: Path) -> None:
    code = (
        "import json, models.hub, models.registry\n"
        f"fetched = models.hub.fetch(models.registry.HubFile({REPO!r}))\n"
        "print(json.dumps([str(fetched.path), fetched.origin]))"
    )
    environment = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "NO_PROXY": "127.0.0.1"}
    for name in ("HF_HUB_CACHE", "HF_HUB_OFFLINE"):
        environment.pop(name, None)
    done = subprocess.run([sys.executable, "-c", code], env=environment, check=True, capture_output=True, text=True)
    path, origin = json.loads(done.stdout)
    assert Path(path).is_relative_to(tmp_path / "home")
    assert origin == f"{REPO}@{COMMIT}/model.safetensors"


@pytest.mark.parametrize(
    ("text", "file"), [("a/b", HubFile("a/b")), ("a/b@main", HubFile("a/b")), ("a/b@1f", HubFile("a/b", "1f"))]
)
def test_a_repository_may_name_its_revision(text: str, file: HubFile) -> None:
    assert parse(text) == file


@pytest.mark.parametrize("text", ["", "a", "a/", "/b", "a/b/c", "a/b@"])
def test_other_forms_are_refused(text: str) -> None:
    with pytest.raises(UsageError, match="names no hub repository"):
        parse(text)
