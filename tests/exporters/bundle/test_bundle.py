from __future__ import annotations

import json
import shutil
import time
import zipfile
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from deploycli.exporters.bundle.bundle import Bundle, Engine, OnnxFile, find_bundles
from deploycli.exporters.bundle.golden import load_golden, save_golden
from deploycli.exporters.bundle.manifest import MANIFEST_NAME, FileRecord, Manifest
from deploycli.models.codec import decode
from deploycli.models.errors import IntegrityError, UsageError
from deploycli.models.spec import Preprocessing
from tests.exporters import engines
from tests.exporters.bundle.bundles import make

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return make(tmp_path)


def edit(bundle: Bundle, change: Callable[[dict[str, Any]], object]) -> None:
    path = bundle.path / MANIFEST_NAME
    data = json.loads(path.read_text("utf-8"))
    change(data)
    path.write_text(json.dumps(data), "utf-8")


def test_round_trip(bundle: Bundle) -> None:
    assert Bundle.open(bundle.path) == bundle
    assert sorted(path.name for path in bundle.path.iterdir()) == ["golden.npz", "manifest.json", "model.onnx"]
    assert [path.name for path in bundle.path.parent.iterdir()] == ["linear"]


def test_preprocessing_round_trip(bundle: Bundle) -> None:
    manifest = replace(bundle.manifest, preprocessing=Preprocessing((224, 224)))
    assert decode(manifest.dumps(), Manifest, where="it", what="a manifest", version=1) == manifest


def test_the_list_of_model_files(bundle: Bundle) -> None:
    """ONNX files and engines, each with all that a command asks of it."""
    sidecar = engines.build(bundle)
    assert [file.verdict.status for file in (*bundle.onnx_files(), *bundle.engines())] == ["not verified"] * 2
    engines.verify_engines(bundle, "fp16")
    onnx, engine = (*bundle.onnx_files(), *bundle.engines())
    assert isinstance(onnx, OnnxFile)
    assert isinstance(engine, Engine)
    assert ([onnx.name], [engine.name]) == ([f.name for f in bundle.onnx_files()], [f.name for f in bundle.engines()])
    assert (onnx.name, onnx.precision, onnx.batches) == ("model.onnx", "fp32", None)
    assert (engine.name, engine.precision, engine.batches) == (f"engines/{sidecar.plan}", "fp16", (1, 16))
    for file in (onnx, engine):
        assert file.record == FileRecord.of(bundle.path, file.name)
        assert (file.path, file.size, file.unreleasable) == (bundle.path / file.name, file.record.size, "")
        assert file.verdict.passed
    assert bundle.onnx_file("model.onnx") is not None
    assert bundle.onnx_file("model.fp16.onnx") is None
    assert engine.stale == "was built from another model.onnx than the bundle holds now"
    engine.check()
    engine.path.write_bytes(b"another")
    with pytest.raises(IntegrityError, match="has changed"):
        engine.check()


@pytest.mark.parametrize("file", ["model.onnx", "golden.npz"])
def test_one_changed_byte_is_found(bundle: Bundle, file: str) -> None:
    path = bundle.path / file
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    recorded = {record.path: record.sha256 for record in bundle.manifest.records()}[file]
    with pytest.raises(IntegrityError, match=file) as caught:
        Bundle.open(bundle.path)
    assert FileRecord.of(bundle.path, file).sha256 in str(caught.value)
    assert recorded in str(caught.value)
    assert caught.value.exit_code == 8


def test_missing_file_is_found(bundle: Bundle) -> None:
    (bundle.path / "model.onnx").unlink()
    with pytest.raises(IntegrityError, match=r"model\.onnx is missing"):
        Bundle.open(bundle.path)


@pytest.mark.parametrize(
    "path", ["../model.onnx", "/etc/passwd", "a/../../b", "C:\\model.onnx", "..\\model.onnx", "C:model", "a\0b", ""]
)
def test_recorded_path_must_stay_inside(bundle: Bundle, path: str) -> None:
    edit(bundle, lambda data: data["golden"].update(path=path))
    with pytest.raises(IntegrityError, match="relative path inside"):
        Bundle.open(bundle.path)


def test_link_that_leaves_the_bundle_is_refused(bundle: Bundle, tmp_path: Path) -> None:
    shutil.move(bundle.path / "model.onnx", tmp_path / "elsewhere.onnx")
    (bundle.path / "model.onnx").symlink_to(tmp_path / "elsewhere.onnx")
    with pytest.raises(IntegrityError, match="leaves the bundle"):
        Bundle.open(bundle.path)


@pytest.mark.parametrize(
    "change",
    [
        lambda data: data.pop("schema_version"),
        lambda data: data.update(schema_version=True),
        lambda data: data.pop("golden"),
        lambda data: data.update(artifacts=[]),
        lambda data: data.update(artifacts=3),
        lambda data: data.update(spec=None),
        lambda data: data["weights"].update(surprise=1),
        lambda data: data["golden"].update(sha256="abc"),
        lambda data: data["golden"].update(sha256=None),
        lambda data: data["golden"].update(size=-1),
        lambda data: data["artifacts"][0].update(batch="dynamic"),
        lambda data: data["artifacts"][0].update(batch=0),
    ],
)
def test_malformed_manifest_is_one_message(bundle: Bundle, change: Callable[[dict[str, Any]], object]) -> None:
    edit(bundle, change)
    with pytest.raises(IntegrityError, match="malformed"):
        Bundle.open(bundle.path)


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[" * 100_000, b"[]", b"null"])
def test_manifest_that_is_none(bundle: Bundle, content: bytes) -> None:
    (bundle.path / MANIFEST_NAME).write_bytes(content)
    with pytest.raises(IntegrityError, match=MANIFEST_NAME):
        Bundle.open(bundle.path)


def test_unknown_schema_version_says_what_to_do(bundle: Bundle) -> None:
    edit(bundle, lambda data: data.update(schema_version=99))
    with pytest.raises(UsageError, match="schema version 99") as caught:
        Bundle.open(bundle.path)
    assert "export" in caught.value.hint


def test_folder_without_manifest_is_no_bundle(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "absent"):
        with pytest.raises(UsageError, match="no bundle"):
            Bundle.open(path)


def test_find_bundles_by_name(tmp_path: Path) -> None:
    for name in ("b", "a"):
        make(tmp_path, name)
    (tmp_path / "other").mkdir()
    (tmp_path / ".c.tmp-12").mkdir()
    (tmp_path / ".c.tmp-12" / MANIFEST_NAME).touch()
    assert find_bundles(tmp_path) == [tmp_path / "a", tmp_path / "b"]


def test_find_bundles_in_nothing_says_to_export(tmp_path: Path) -> None:
    for root in (tmp_path, tmp_path / "absent"):
        with pytest.raises(UsageError, match="export a model first"):
            find_bundles(root)


# Golden arrays


def test_golden_round_trip_is_deterministic(tmp_path: Path) -> None:
    inputs = {"images": np.random.default_rng(0).standard_normal((2, 3)).astype(np.float32)}
    outputs = {"logits": np.arange(4.0).reshape(2, 2), "file": np.ones((2, 1))}
    save_golden(tmp_path / "a.npz", inputs, outputs)
    time.sleep(2.1)  # a zip file's clock ticks every two seconds
    save_golden(tmp_path / "b.npz", inputs, outputs)
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()
    for saved, loaded in zip((inputs, outputs), load_golden(tmp_path / "a.npz"), strict=True):
        assert list(saved) == list(loaded)
        for name, array in saved.items():
            np.testing.assert_array_equal(array, loaded[name])
            assert array.dtype == loaded[name].dtype


@pytest.mark.parametrize(
    "arrays",
    [
        {},
        {"input/a": np.ones((2, 1))},
        {"input/a": np.ones((2, 1)), "output/b": np.ones((3, 1))},
        {"input/a": np.ones((0, 1)), "output/b": np.ones((0, 1))},
        {"input/a": np.ones(()), "output/b": np.ones((1, 1))},
        {"input/a": np.ones((1, 1)), "output/b": np.ones((1, 1)), "else": np.ones(1)},
        {"input/a": np.array([{}], dtype=object), "output/b": np.ones((1, 1))},
    ],
)
def test_golden_that_is_none(tmp_path: Path, arrays: dict[str, np.ndarray]) -> None:
    np.savez(tmp_path / "golden.npz", **arrays)
    with pytest.raises(IntegrityError, match=r"golden\.npz is no golden file"):
        load_golden(tmp_path / "golden.npz")


@pytest.mark.parametrize("content", [None, b"", b"PK\x03\x04junk", b"\x93NUMPY junk", b"cos\nsystem\n."])
def test_golden_that_is_no_archive(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "golden.npz"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(IntegrityError, match=r"golden\.npz is no golden file"):
        load_golden(path)


def test_golden_that_is_a_lone_array(tmp_path: Path) -> None:
    with (tmp_path / "golden.npz").open("wb") as stream:
        np.save(stream, np.ones((2, 2)))
    with pytest.raises(IntegrityError, match="no golden file"):
        load_golden(tmp_path / "golden.npz")


@pytest.mark.parametrize("how", ["compressed", "terabytes", "text", "objects", "negative"])
def test_golden_arrays_are_weighed(tmp_path: Path, how: str) -> None:
    path = tmp_path / "golden.npz"
    images = np.zeros((2, 3), np.float32)
    if how == "compressed":
        np.savez_compressed(path, **{"input/images": images, "output/logits": images})
    else:
        header = {
            "terabytes": "{'descr': '<f4', 'fortran_order': False, 'shape': (2, 1099511627776)}",
            "text": "{'descr': '<U6', 'fortran_order': False, 'shape': (1,)}",
            "objects": "{'descr': '|O', 'fortran_order': False, 'shape': (1,)}",
            "negative": "{'descr': '<f4', 'fortran_order': False, 'shape': (-2, -3)}",
        }[how].encode() + b"\n"
        with zipfile.ZipFile(path, "w") as archive:
            content = b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + bytes(24)
            for name in ("input/images.npy", "output/logits.npy"):
                archive.writestr(name, content)
    with pytest.raises(IntegrityError, match="no golden file"):
        load_golden(path)
