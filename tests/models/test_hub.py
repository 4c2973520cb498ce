"""Fetching from a small server on loopback that speaks the hub's paths and headers."""

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub.constants
import pytest
from safetensors.torch import save

from deploycli.models.checkpoint import load
from deploycli.models.errors import EnvironmentUnsuitable, UsageError
from deploycli.models.hub import fetch, parse
from deploycli.models.variants import HubFile
from tests.hub_server import COMMIT, Hub, serving
from tests.models.swins import tiny_spec, tiny_swin, to_timm_names

REPO = "timm/tiny"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    weights = {key: value.contiguous() for key, value in to_timm_names(dict(tiny_swin().state_dict())).items()}
    with serving(Hub(REPO, {"model.safetensors": save(weights)}), tmp_path / "cache", monkeypatch) as hub:
        yield hub


def test_fetches_once_and_loads(hub: Hub) -> None:
    fetched = fetch(HubFile(REPO, COMMIT))
    assert fetched.path.read_bytes() == hub.files["model.safetensors"]
    assert fetched.origin == f"{REPO}@{COMMIT}/model.safetensors"
    loaded = load(tiny_spec(), fetched.path, source="pretrained", origin=fetched.origin)
    assert loaded.weights.sha256 == hashlib.sha256(hub.files["model.safetensors"]).hexdigest()
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
        "import json, deploycli.models.hub, deploycli.models.variants\n"
        f"fetched = deploycli.models.hub.fetch(deploycli.models.variants.HubFile({REPO!r}))\n"
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
