"""`deploycli verify` on labelled data: what it counts, what it prints, and what it fails."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import onnx
import pytest
import skimage.data
from onnx import numpy_helper
from PIL import Image

from deploycli.exporters.bundle.bundle import Bundle
from deploycli.exporters.bundle.manifest import MANIFEST_NAME
from deploycli.exporters.bundle.reference import reference_model
from deploycli.exporters.data.samples import open_samples
from deploycli.exporters.runtime.runtimes import EagerRuntime
from tests.deploycli.commands import assert_refused
from tests.exporters.bundle.bundles import record_again

if TYPE_CHECKING:
    from pathlib import Path

    from tests.deploycli.conftest import Command

CLASSES = 5  # of the smallest model


@pytest.fixture
def bundle(true_bundle: Bundle, tmp_path: Path) -> Bundle:
    return Bundle.open(shutil.copytree(true_bundle.path, tmp_path / "artifacts" / "smallest"))


def answers(bundle: Bundle, source: Path) -> tuple[tuple[str, ...], list[int]]:
    """The names of the pictures, and what the eager model says of each."""
    spec = bundle.manifest.spec
    samples = open_samples(source, spec.inputs, bundle.manifest.preprocessing)
    with EagerRuntime(reference_model(bundle.manifest, None), ["images"], spec.outputs) as eager:
        (batch,) = samples.batches(1000)
        return tuple(samples.names), eager.run(batch.inputs)["logits"].argmax(axis=1).tolist()


@pytest.fixture
def pictures(bundle: Bundle, tmp_path: Path) -> Path:
    """120 tiles of a photograph in a folder for each class, by what the eager model says: it is always right."""
    flat, folder = tmp_path / "flat", tmp_path / "pictures"
    flat.mkdir()
    photograph = Image.fromarray(skimage.data.astronaut())
    for tile in range(120):
        left, top = 40 * (tile % 12), 50 * (tile // 12)
        photograph.crop((left, top, left + 40, top + 40)).save(flat / f"{tile:03}.png")
    names, classes = answers(bundle, flat)
    for name, label in zip(names, classes, strict=True):
        (folder / f"class {label}").mkdir(parents=True, exist_ok=True)
        (flat / name).rename(folder / f"class {label}" / name)
    for label in range(CLASSES):  # a class that the model never names still has its place
        if not (folder / f"class {label}").exists():
            (folder / f"class {label}").mkdir()
            photograph.resize((16, 16)).save(folder / f"class {label}" / "other.png")
    flat.rmdir()
    return folder


def as_int8(bundle: Bundle, noise: float) -> Bundle:
    """The same file, called INT8, with noise on its largest weights."""
    path = bundle.path / "model.onnx"
    model = onnx.load(path)
    rng = np.random.default_rng(0)
    for tensor in model.graph.initializer:
        value = numpy_helper.to_array(tensor)
        if noise and value.ndim == 2 and value.dtype == np.float32:
            damaged = value + noise * value.std() * rng.standard_normal(value.shape).astype(np.float32)
            tensor.CopyFrom(numpy_helper.from_array(damaged, tensor.name))
    path.write_bytes(model.SerializeToString())
    manifest = bundle.manifest
    renamed = tuple(replace(artifact, precision="int8") for artifact in manifest.artifacts)
    (bundle.path / MANIFEST_NAME).write_text(replace(manifest, artifacts=renamed).dumps(), "utf-8")
    return record_again(replace(bundle, manifest=replace(manifest, artifacts=renamed)))


def test_labelled_folders(deploycli: Command, bundle: Bundle, pictures: Path) -> None:
    names, said = answers(bundle, pictures)
    right = sum(name.startswith(f"class {label}/") for name, label in zip(names, said, strict=True))
    arguments = ("verify", "--images", pictures, "--labels", "folders")
    (report,) = deploycli(*arguments, "--json").json()
    eager, onnx_file = report["evaluations"]
    assert (eager["artifact"], eager["runtime"], eager["top1_lost"]) == (None, "PyTorch eager", None)
    assert (onnx_file["artifact"], onnx_file["runtime"], onnx_file["top1_lost"]) == ("model.onnx", "ONNX Runtime", 0)
    for found in (eager, onnx_file):
        assert (found["samples"], found["top1_correct"], found["top5"]) == (len(names), right, None)
        assert found["top1_interval"][0] < found["top1"] == right / len(names)
    assert report["stages"][-1]["check"] == "images"
    assert report["stages"][-1]["faults"] == report["skipped"] == []
    out = deploycli(*arguments).out
    assert re.search(rf"eager +{len(names)} +{right / len(names):.2%} +\d+\.\d+% to \d+\.\d+%", out)
    assert re.search(rf"model\.onnx +{len(names)} +{right / len(names):.2%} .* 0\.00 points", out)


@pytest.mark.parametrize(("noise", "code"), [(0.0, 0), (1.0, 5)])
def test_an_int8_file_may_lose_half_a_point(
    deploycli: Command, bundle: Bundle, pictures: Path, noise: float, code: int
) -> None:
    as_int8(bundle, noise)
    arguments = ("verify", "--images", pictures, "--labels", "folders")
    result = deploycli(*arguments, "--json")
    assert result.code == code, result.err
    (report,) = json.loads(result.out)
    eager, damaged = report["evaluations"]
    lost = (eager["top1_correct"] - damaged["top1_correct"]) / eager["samples"]
    assert damaged["top1_lost"] == pytest.approx(lost)
    assert damaged["max_top1_drop"] == 0.005
    faults = report["stages"][-1]["faults"]
    assert faults == damaged["reasons"]
    if noise:
        assert lost > 0.005
        assert f"model.onnx in ONNX Runtime, images: {faults[0]}" in report["failures"]
        told = f"FAILED model.onnx in ONNX Runtime, images: top-1 lost {100 * lost:.2f} points"
        assert told in deploycli(*arguments).out
    else:
        assert faults == []
        assert re.search(r"0\.00 points +0\.50 +ok", deploycli(*arguments).out)


def test_a_table_and_an_npz_count_the_same(deploycli: Command, bundle: Bundle, pictures: Path, tmp_path: Path) -> None:
    names, said = answers(bundle, pictures)
    labels = [label if place % 4 else (label + 1) % CLASSES for place, label in enumerate(said)]
    table = "path,label\n" + "".join(f"{name},{label}\n" for name, label in zip(names, labels, strict=True))
    (tmp_path / "labels.csv").write_text(table)
    manifest = bundle.manifest
    (batch,) = open_samples(pictures, manifest.spec.inputs, manifest.preprocessing).batches(1000)
    np.savez_compressed(tmp_path / "data.npz", images=batch.inputs["images"], labels=labels)
    (by_table,) = deploycli("verify", "--images", pictures, "--labels", "labels.csv", "--json").json()
    (by_npz,) = deploycli("verify", "--images", "data.npz", "--json").json()
    assert by_table["evaluations"] == by_npz["evaluations"]
    assert by_table["evaluations"][0]["top1_correct"] == sum(1 for place in range(len(names)) if place % 4)
    (limited,) = deploycli("verify", "--images", "data.npz", "--limit", 9, "--json").json()
    assert limited["evaluations"][0]["samples"] == limited["stages"][-1]["samples"] == 9


def test_without_labels_there_is_no_accuracy(deploycli: Command, bundle: Bundle, pictures: Path) -> None:
    (report,) = deploycli("verify", bundle.path, "--images", pictures, "--json").json()
    assert report["evaluations"] == []
    assert "interval" not in deploycli("verify", "--images", pictures).out


def test_a_skipped_picture_is_counted_and_shown(deploycli: Command, bundle: Bundle, pictures: Path) -> None:
    first = min(pictures.rglob("*.png"))
    first.write_bytes(first.read_bytes()[:50])
    arguments = ("verify", bundle.path, "--images", pictures, "--labels", "folders")
    (report,) = deploycli(*arguments, "--json").json()
    held = len(list(pictures.rglob("*.png"))) - 1
    assert report["skipped"] == [first.relative_to(pictures).as_posix()]
    assert report["stages"][-1]["samples"] == report["evaluations"][0]["samples"] == held
    assert f"1 skipped, could not be read: {report['skipped'][0]}" in deploycli(*arguments).out


def test_labels_that_cannot_be_used_are_refused(
    deploycli: Command, bundle: Bundle, pictures: Path, tmp_path: Path
) -> None:
    assert_refused(deploycli("verify", "--labels", "folders"), 2, "labels were given without pictures", "--images")
    (tmp_path / "labels.csv").write_text("other.png,1\n")
    labelled = ("verify", bundle.path, "--images", pictures, "--labels")
    told = deploycli(*labelled, "labels.csv")
    assert_refused(told, 2, "labels.csv, line 1: there is no picture 'other.png'")
    (pictures / "more").mkdir()
    shutil.copy(next(pictures.rglob("*.png")), pictures / "more" / "x.png")
    assert_refused(deploycli(*labelled, "folders"), 2, "6 class folders", "at most 5")
    assert_refused(deploycli("verify", "--images", "absent.npz"), 2, "absent.npz cannot be read as arrays")
