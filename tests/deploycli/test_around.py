"""What a model needs around it: preprocessing that is known or unknown, pixels in, the best classes out, names."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from PIL import Image

from deploycli.exporters.bundle.manifest import Manifest
from deploycli.exporters.data.pictures import load_image
from tests.deploycli.conftest import save_checkpoint

if TYPE_CHECKING:
    from pathlib import Path

    from tests.deploycli.conftest import Command

NAMES = ("a cat", "ein Hündchen", "[bold]rocket", "-", "0")
RNG = np.random.default_rng(5)

OWN = """
import torch

class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = torch.nn.Conv2d(3, 8, 4, stride=4)
        self.head = torch.nn.Linear(8, 5)

    def forward(self, x):
        return self.head(self.stem(x).mean((2, 3)))

def net():
    torch.manual_seed(3)
    return Net()
"""


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    for place in range(4):
        pixels = RNG.integers(0, 256, (20, 24, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{place}.png")
    return folder


@pytest.fixture
def names(tmp_path: Path) -> Path:
    (tmp_path / "names.txt").write_text("\n".join(NAMES) + "\n", "utf-8")
    return tmp_path / "names.txt"


def export(deploycli: Command, model: str, tmp_path: Path, *more: object, name: str = "net") -> Path:
    done = deploycli("export", model, "--name", name, "--checkpoint", save_checkpoint(tmp_path), *more)
    assert done.code == 0, done.err
    return tmp_path / "artifacts" / name


def answers(folder: Path, inputs: dict[str, Any], file: str = "model.onnx") -> dict[str, Any]:
    session = ort.InferenceSession(folder / file)
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, inputs), strict=True))


@pytest.mark.parametrize("layout", ["nhwc", "nchw"])
def test_pixels_in_and_the_best_classes_out(
    deploycli: Command, smallest: str, tmp_path: Path, pictures: Path, names: Path, layout: str
) -> None:
    """The same numbers as preparing a picture outside and taking the softmax by hand."""
    plain = export(deploycli, smallest, tmp_path, "--mean", "0.1,0.2,0.3", "--std", "0.5,0.6,0.7", name="plain")
    whole = export(
        deploycli, smallest, tmp_path, "--mean", "0.1,0.2,0.3", "--std", "0.5,0.6,0.7", "--uint8-input", layout,
        "--output", "topk:3", "--labels", names,
    )  # fmt: skip
    manifests = [Manifest.read(folder) for folder in (plain, whole)]
    recipes = [manifest.preprocessing for manifest in manifests]
    assert all(recipe is not None and recipe.mean == (0.1, 0.2, 0.3) for recipe in recipes)
    assert manifests[1].spec.inputs[0].dtype == "uint8"
    assert manifests[1].spec.outputs == ("scores", "classes")
    for path in sorted(pictures.iterdir()):
        prepared, pixels = (load_image(path, recipe)[None] for recipe in recipes if recipe is not None)
        assert pixels.dtype == np.uint8
        (logits,) = answers(plain, {"images": prepared}).values()
        shares = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
        found = answers(whole, {"images": pixels})
        assert found["classes"].tolist() == [np.argsort(-shares[0])[:3].tolist()]
        np.testing.assert_allclose(found["scores"][0], np.sort(shares[0])[::-1][:3], rtol=1e-4)
    for command in (
        ("cast", "net"),
        ("verify", "net", "--images", pictures),
        ("build-trt", "net", "--gpu", "ada", "--precision", "fp16"),
        ("bench", "net", "--only", "ort-cpu", "--rounds", 1),
        ("package", "net", "--triton", "served", "--force"),
    ):
        done = deploycli(*command)
        assert done.code == 0, (command, done.err, done.out)


def test_softmax_and_names_go_with_the_file(deploycli: Command, smallest: str, tmp_path: Path, names: Path) -> None:
    folder = export(deploycli, smallest, tmp_path, "--output", "softmax", "--labels", names)
    (shares,) = answers(folder, {"images": RNG.standard_normal((3, 3, 16, 16)).astype(np.float32)}).values()
    np.testing.assert_allclose(shares.sum(axis=1), 1, rtol=1e-5)
    assert deploycli("cast").code == 0
    for file in ("model.onnx", "model.fp16.onnx"):
        (label,) = (prop.value for prop in onnx.load(folder / file).metadata_props if prop.key == "labels")
        assert json.loads(label) == list(NAMES)
    assert "classes   5: a cat, ein Hündchen, [bold]rocket, ..." in deploycli("inspect", "net").out
    assert deploycli("verify").code == 0
    assert deploycli("package", "net", "--triton", "served").code == 0
    (config,) = (tmp_path / "served").glob("*/config.pbtxt")
    assert 'label_filename: "labels.txt"' in config.read_text()
    assert (config.parent / "labels.txt").read_text("utf-8").splitlines() == list(NAMES)
    again = deploycli("import", folder / "model.onnx", "--name", "again")
    assert again.code == 0, again.err
    assert Manifest.read(tmp_path / "artifacts/again").labels == NAMES


@pytest.mark.parametrize(
    ("text", "suffix", "found"),
    [
        ('["a", "b", "c", "d", "e"]', ".json", ("a", "b", "c", "d", "e")),
        ('{"1": "b", "0": "a", "2": "c", "4": "e", "3": "d"}', ".json", ("a", "b", "c", "d", "e")),
        ('{"b": 1, "a": 0, "c": 2, "e": 4, "d": 3}', ".json", ("a", "b", "c", "d", "e")),
        ("a\nb\nc\nd\ne", ".txt", ("a", "b", "c", "d", "e")),
        ("a\nb\n", ".txt", "names 2 classes"),
        ("a\n\nc\nd\ne", ".txt", "has an empty line 2"),
        ('["a", 2, "c", "d", "e"]', ".json", "has no name for class 1"),
        ('["a", "b\\nb", "c", "d", "e"]', ".json", "the name of class 1 has a line break"),
        ('{"0": "a", "2": "c"}', ".json", "do not number 2 classes from 0 to 1"),
        ("7", ".json", "are int"),
        ("{", ".json", "cannot be read"),
        ("[" * 100_000, ".json", "cannot be read"),
    ],
)
def test_files_of_names(
    deploycli: Command, smallest: str, tmp_path: Path, text: str, suffix: str, found: str | tuple[str, ...]
) -> None:
    (tmp_path / f"names{suffix}").write_text(text)
    done = deploycli("export", smallest, "--labels", f"names{suffix}")
    if isinstance(found, tuple):
        assert done.code == 0, done.err
        assert Manifest.read(tmp_path / "artifacts/swin_smallest").labels == found
    else:
        assert done.code == 2
        assert found in " ".join(done.err.split())


def test_what_nobody_said_is_not_made_up(deploycli: Command, tmp_path: Path, pictures: Path) -> None:
    (tmp_path / "own.py").write_text(OWN)
    options = ("--input", "x:2x3x16x16", "--name", "net", "--replace")
    assert deploycli("export", "own.py:net", *options).code == 0
    assert Manifest.read(tmp_path / "artifacts/net").preprocessing is None
    for command in (
        ("quantize", "--calibrate", pictures),
        ("verify", "--images", pictures),
        ("predict", "net", pictures / "0.png"),
    ):
        refused = deploycli(*command)
        assert refused.code == 2
        assert "nothing says how a picture becomes the model's input" in refused.err
        assert "--mean and --std when it is exported" in refused.err
    refused = deploycli("export", "own.py:net", *options, "--uint8-input", "nhwc")
    assert refused.code == 2
    assert "how this model wants its pictures is not known" in refused.err
    told = ("--mean", "0.5,0.5,0.5", "--std", "0.5,0.5,0.5", "--resize", "32", "--interpolation", "bilinear")
    assert deploycli("export", "own.py:net", *options, *told).code == 0
    recipe = Manifest.read(tmp_path / "artifacts/net").preprocessing
    assert recipe is not None
    assert (recipe.size, recipe.crop_pct, recipe.interpolation) == ((16, 16), 0.5, "bilinear")
    assert deploycli("verify", "--images", pictures).code == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--output", "topk:6"), "the model has 5 classes"),
        (("--output", "topk:0"), "the best one or more"),
        (("--output", "topk"), "write topk:5"),
        (("--output", "softmax", "--output", "topk:2"), "give one of a kind"),
        (("-o", "a", "-o", "b"), "give one of a kind"),
        (("--crop", "0.5", "--resize", "20"), "both --crop and --resize were given"),
        (("--crop", "1.5"), "is no number above 0 and up to 1"),
        (("--mean", "1,2"), "is not one number a channel"),
        (("--std", "1,0,1"), "a standard deviation is above 0"),
        (("--mean", "nan,1,1"), "not finite"),
    ],
)
def test_what_makes_no_sense(deploycli: Command, smallest: str, options: tuple[str, ...], message: str) -> None:
    refused = deploycli("export", smallest, *options)
    assert refused.code == 2
    assert message in " ".join(refused.err.split())


def test_a_detector_has_no_classes_to_end_in(deploycli: Command, tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(OWN.replace("self.head(self.stem(x).mean((2, 3)))", "self.stem(x)"))
    refused = deploycli("export", "own.py:net", "--input", "x:2x3x16x16", "--output", "softmax")
    assert refused.code == 2
    assert "the model's outputs are output [8, 4, 4]" in " ".join(refused.err.split())


# --- predict


def test_predict_names_the_best_classes(
    deploycli: Command, smallest: str, tmp_path: Path, pictures: Path, names: Path
) -> None:
    folder = export(deploycli, smallest, tmp_path, "--labels", names)
    assert deploycli("cast").code == 0
    recipe = Manifest.read(folder).preprocessing
    assert recipe is not None
    (logits,) = answers(folder, {"images": load_image(pictures / "2.png", recipe)[None]}).values()
    best = int(logits.argmax())
    share = float(np.exp(logits[0] - logits.max())[best] / np.exp(logits[0] - logits.max()).sum())
    for artifact in ((), ("--artifact", "fp16"), ("--artifact", "model.fp16.onnx")):
        (found,) = deploycli("predict", "net", pictures / "2.png", pictures, *artifact, "--top", 2, "--json").json()
        assert found["artifact"] == ("model.fp16.onnx" if artifact else "model.onnx")
        assert len(found["samples"]) == 5
        first = found["samples"][0]
        assert first["name"] == str(pictures / "2.png")
        assert first["classes"][0]["name"] == NAMES[best]
        assert first["classes"][0]["probability"] == pytest.approx(share, rel=1e-2)
    shown = deploycli("predict", "net", pictures / "2.png", "--top", 1)
    assert f"{share:7.2%}  {best:5d}  {NAMES[best]}" in shown.out


def test_predict_writes_arrays(deploycli: Command, smallest: str, tmp_path: Path, pictures: Path) -> None:
    folder = export(deploycli, smallest, tmp_path)
    samples = RNG.standard_normal((11, 3, 16, 16)).astype(np.float32)
    np.savez(tmp_path / "samples.npz", images=samples)
    assert deploycli("predict", "net", "--inputs", "samples.npz", "-o", "out.npz").code == 0
    with np.load(tmp_path / "out.npz") as written:
        (logits,) = answers(folder, {"images": samples}).values()
        np.testing.assert_allclose(written["logits"], logits, atol=1e-5)
        assert written["samples"].tolist() == [str(place) for place in range(11)]
    assert deploycli("predict", folder / "model.onnx", pictures, "--mean", "0,0,0", "--std", "1,1,1").code == 0
    for arguments, message in (
        (("net",), "nothing to run it on"),
        (("net", pictures, "--inputs", "samples.npz"), "both pictures and --inputs"),
        (("net", pictures, "--artifact", "int8"), "has no 'int8'"),
        (("net", "gone.png"), "gone.png"),
        (("gone", pictures), "gone"),
        (("net", pictures, "--mean", "0,0,0"), "--mean means nothing to a bundle"),
    ):
        refused = deploycli("predict", *arguments)
        assert refused.code == 2, arguments
        assert message in " ".join(refused.err.split())
