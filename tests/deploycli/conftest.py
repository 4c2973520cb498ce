from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest
import torch

from deploycli.exporters.bundle.bundle import Bundle
from deploycli.exporters.export import ExportOptions, export
from deploycli.models.spec import Preprocessing
from deploycli.models.swin import SwinTransformer
from deploycli.models.variants import Variant, spec
from tests import digits
from tests.deploycli.commands import SMALL, Result, files, in_this_process, start
from tests.models.swins import golden_state

if TYPE_CHECKING:
    from pathlib import Path

Command = Callable[..., Result]

# The smallest Swin that shifts its windows.
SMALLEST = {
    "img_size": [16, 16],
    "patch_size": 2,
    "in_chans": 3,
    "num_classes": 5,
    "embed_dim": 8,
    "depths": [2],
    "num_heads": [2],
    "window_size": 4,
}


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder in which ``deploycli export swin_t`` has run, and a folder ``twin`` beside it, made by another process.

    To be read only, but for the report that ``deploycli verify`` keeps: a copy has 113 MB.
    """
    folder = tmp_path_factory.mktemp("exported")
    first = start("export", "swin_t", *SMALL, cwd=folder, PYTHONHASHSEED="1")
    second = start("export", "swin_t", *SMALL, "-o", "twin", "--json", cwd=folder, PYTHONHASHSEED="2")
    for process, name in ((first, "first"), (second, "second")):
        out, err = process.communicate(timeout=120)
        assert process.returncode == 0, err
        (folder / f"{name}.out").write_text(out)
        (folder / f"{name}.err").write_text(err)
    before = {name: len(content) for name, content in files(folder).items()}
    yield folder
    after = {name: len(content) for name, content in files(folder).items() if not name.endswith("reports/verify.json")}
    assert after == before


@pytest.fixture
def deploycli(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Command:
    """Run a command in this process, from the test's own folder."""
    monkeypatch.chdir(tmp_path)
    return in_this_process(monkeypatch, capfd)


@contextmanager
def registered() -> Iterator[str]:
    """Register a model of the user's own for a while."""
    recipe = Preprocessing(size=(16, 16))
    with digits.registered(Variant(spec("swin_smallest", "swin", SMALLEST), recipe, summary="The smallest.")):
        yield "swin_smallest"


@pytest.fixture
def smallest() -> Iterator[str]:
    with registered() as name:
        yield name


def save_checkpoint(folder: Path) -> Path:
    """Write weights for the smallest model by the golden rule: none is zero."""
    path = folder / "smallest.pth"
    torch.save({"model": golden_state(SwinTransformer(**SMALLEST))}, path)
    return path


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return save_checkpoint(tmp_path)


@pytest.fixture(scope="session")
def exported_once(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The smallest model with weights from a file, exported: to be copied, never to be used."""
    folder = tmp_path_factory.mktemp("true")
    with registered() as name:
        return export(ExportOptions(name, folder, checkpoint=save_checkpoint(folder)))


@pytest.fixture(scope="module")
def true_bundle(exported_once: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A copy of it for the tests of one file."""
    return Bundle.open(shutil.copytree(exported_once.path, tmp_path_factory.mktemp("true") / exported_once.path.name))
