"""Code that a bundle names runs only where this user exported the bundle on this machine, or says so."""

from __future__ import annotations

import json
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from deploycli.exporters.bundle import trust
from deploycli.exporters.bundle.manifest import MANIFEST_NAME
from deploycli.models.errors import UsageError
from deploycli.models.external import make
from deploycli.models.sources import FACTORY
from deploycli.models.spec import Weights
from tests.exporters.bundle import bundles

if TYPE_CHECKING:
    from pathlib import Path

    from tests.deploycli.conftest import Command

SOURCE = """
import torch
from torch import nn

class Small(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.inner = nn.Linear(8, width)

    def forward(self, x):
        return torch.tanh(self.inner(x))

def make(width=5):
    return Small(width)
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(trust.STATE, str(tmp_path / "state"))
    (tmp_path / "small.py").write_text(SOURCE)
    return tmp_path


def exported(deploycli: Command) -> None:
    arguments = ("--input", "x:2x8", "--name", "small", "--model-kwargs", '{"width": 6}')
    result = deploycli("export", "small.py:make", *arguments)
    assert result.code == 0, result.err
    assert "signed" not in result.err


def reference(deploycli: Command, *arguments: object) -> tuple[str, str]:
    """Return what a verification compared with, and why."""
    (report,) = deploycli("verify", *arguments, "--batches", "1,2", "--json").json()
    return report["reference"], report["reference_note"]


def edit(folder: Path, **config: Any) -> None:
    path = folder / MANIFEST_NAME
    data = json.loads(path.read_text())
    data["spec"]["config"].update(config)
    path.write_text(json.dumps(data))


def test_a_function_of_a_stranger_does_not_run(deploycli: Command, folder: Path) -> None:
    proof = folder / "it-ran"
    config = {"target": "os:system", "kwargs": {"command": f"touch {proof}"}}
    spec = replace(bundles.SPEC, family=FACTORY, config=config)
    bundle = bundles.make(folder / "artifacts", spec=spec, weights=Weights("random", seed=0))
    found, why = reference(deploycli)
    assert found == "golden"
    assert "it names a function, os:system, and was not signed at export (--trust-factory runs it)" in why
    refused = deploycli("verify", "--reference", "eager")
    assert refused.code == 7
    assert "os:system" in refused.err
    assert "--trust-factory" in refused.err
    timed = deploycli("bench", "--rounds", 1, "--batches", 1)
    assert timed.code == 0, timed.err
    assert "not signed" in timed.out
    for command in ("inspect", "lint", "cast", "package"):
        deploycli(command, bundle.path, *(("--triton", "t") if command == "package" else ()))
    assert not proof.exists()
    deploycli("verify", "--trust-factory")
    assert proof.exists()


def test_the_users_own_function_runs(deploycli: Command, folder: Path) -> None:
    exported(deploycli)
    assert reference(deploycli) == ("eager", "")
    shutil.copytree(folder / "artifacts/small", folder / "elsewhere/other")
    shutil.rmtree(folder / "artifacts")
    assert reference(deploycli, "elsewhere/other") == ("eager", "")
    assert deploycli("cast", "elsewhere/other", "--no-lint").code in (0, 3)
    assert reference(deploycli, "elsewhere/other")[0] == "eager"


@pytest.mark.parametrize("what", ["arguments", "function", "file", "key", "signature"])
def test_what_was_changed_is_a_strangers(
    deploycli: Command, folder: Path, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    exported(deploycli)
    bundle = folder / "artifacts/small"
    if what == "arguments":
        edit(bundle, kwargs={"width": 7})
    elif what == "function":
        edit(bundle, target="small.py:Small")
    elif what == "file":  # another one by the same name, as it comes with somebody's bundle
        (folder / "theirs").mkdir()
        (folder / "theirs/small.py").write_text(SOURCE + "open('it-ran', 'w')\n")
        shutil.move(folder / "artifacts", folder / "theirs/artifacts")
        monkeypatch.chdir(folder / "theirs")
    elif what == "key":
        shutil.rmtree(folder / "state")
    else:
        data = json.loads((bundle / MANIFEST_NAME).read_text())
        data["factory_signature"] = "-".join(["0" * 64] * 2)
        (bundle / MANIFEST_NAME).write_text(json.dumps(data))
    found, why = reference(deploycli)
    assert found == "golden"
    assert "is another than when you exported it, or somebody else did" in why
    assert not list(folder.rglob("it-ran"))


def test_the_users_own_file_may_be_moved_and_may_be_edited(
    deploycli: Command, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    exported(deploycli)
    (folder / "small.py").write_text(SOURCE + "# a remark\n")
    assert reference(deploycli) == ("eager", "")
    (folder / "small.py").write_text(SOURCE.replace("nn.Linear(8, width)", "nn.Linear(8, width).requires_grad_(False)"))
    assert reference(deploycli) == ("eager", "")
    (folder / "small.py").write_text(SOURCE)
    (folder / "moved").mkdir()
    for name in ("small.py", "artifacts"):
        shutil.move(folder / name, folder / "moved" / name)
    monkeypatch.chdir(folder / "moved")
    assert reference(deploycli) == ("eager", "")


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda key: key.chmod(0o644), "can be read by others"),
        (lambda key: key.write_bytes(b"short"), "damaged"),
        (lambda key: (key.rename(key.with_name("moved")), key.symlink_to(key.with_name("moved"))), "Too many levels"),
        (lambda key: (key.unlink(), key.mkdir()), "no regular file"),
        (lambda key: (key.unlink(), os.mkfifo(key, 0o600)), "no regular file"),
    ],
)
def test_a_key_that_is_none(deploycli: Command, folder: Path, spoil: Any, reason: str) -> None:
    exported(deploycli)
    spoil(folder / "state/factory.key")
    found, why = reference(deploycli)
    assert (found, "cannot be checked" in why, reason in why) == ("golden", True, True), why
    told = deploycli("export", "small.py:make", "--input", "x:2x8", "--name", "again")
    assert told.code == 0
    assert reason in told.err
    assert "--trust-factory" in told.err


def test_the_key_is_the_users_alone(folder: Path) -> None:
    path = trust.key_path()
    assert path.parent == folder / "state"
    with ThreadPoolExecutor(16) as pool:
        keys = list(pool.map(lambda _: trust._read_key() or trust._make_key(), range(64)))
    assert len(set(keys)) == 1
    assert path.stat().st_mode & 0o777 == 0o600
    assert [file.name for file in path.parent.iterdir()] == ["factory.key"]


def test_modules_are_found_without_importing_them(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    (folder / "strange/inner").mkdir(parents=True)
    for file in ("strange/__init__.py", "strange/inner/__init__.py"):
        (folder / file).write_text("raise SystemExit('it ran')")
    (folder / "strange/inner/model.py").write_text(SOURCE)
    names = ("strange/__init__.py", "strange/inner/__init__.py", "strange/inner/model.py")
    files = tuple(folder / name for name in names)
    assert trust._sources_of("strange.inner.model:make") == files
    assert trust._sources_of("strange.inner:make") == files[:2]
    assert trust._sources_of("strange.absent:make") == ()
    for none in ("sys:exit", "a..b:c", ":c", "strange.\0:c", "strange/inner:c"):
        assert trust._sources_of(none) == (), none
    files[1].unlink()
    assert trust._sources_of("strange.inner.model:make") == (files[0], files[2])


@pytest.mark.parametrize(
    ("family", "kwargs"),
    [
        ("timm", {"checkpoint_path": "evil.pth"}),
        ("timm", {"pretrained_cfg": {"file": "evil.pth"}}),
        ("timm", {"pretrained": True}),
        ("torchvision", {"weights_backbone": "DEFAULT"}),
        ("hf", {"trust_remote_code": True}),
        ("hf", {"attn_implementation": "someone/kernels"}),
    ],
)
def test_arguments_reach_for_nothing(family: str, kwargs: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="the argument "):
        make(family, "swin_tiny_patch4_window7_224", kwargs)
