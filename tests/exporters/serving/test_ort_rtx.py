"""Folders for ONNX Runtime with the TensorRT RTX provider: what is in them, and that they load."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper

from deploycli.exporters.bundle.golden import load_golden
from deploycli.exporters.serving import ort_rtx_load
from deploycli.exporters.serving.ort_rtx import PACKAGE, PROVIDER, OrtRtxOptions, prepare
from deploycli.exporters.target.settings import BuildSettings, ShapeRange
from deploycli.exporters.target.targets import TARGETS
from deploycli.exporters.verification.report import keep
from deploycli.exporters.verify import VerifyOptions, verify
from deploycli.models.errors import EnvironmentUnsuitable, IntegrityError, NumericsError, UsageError
from deploycli.models.spec import Weights
from tests.exporters import engines
from tests.exporters.bundle import bundles
from tests.exporters.bundle.bundles import proven, with_external_data, write_bundle

if TYPE_CHECKING:
    from deploycli.exporters.bundle.bundle import Bundle
    from deploycli.exporters.bundle.engine import Sidecar
    from deploycli.exporters.serving.ort_rtx import PackagedFolder

RECORDED = json.loads((Path(__file__).parent / "ort_rtx_options.json").read_text("utf-8"))


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return proven(bundles.make(tmp_path / "bundles"))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "served"


def write(bundle: Bundle, root: Path, **options: Any) -> PackagedFolder:
    return prepare(bundle, root, OrtRtxOptions(**options)).write()


def config_of(folder: Path) -> dict[str, Any]:
    found = json.loads((folder / "onnxruntime.json").read_text("utf-8"))
    assert isinstance(found, dict)
    return found


def engine(bundle: Bundle, *batches: tuple[int, int, int], **changes: Any) -> Sidecar:
    """An engine of TensorRT for RTX from the bundle's file, of a profile for each range of batches."""
    first, *more = ({"images": ShapeRange(*((size, 12) for size in batch))} for batch in batches)
    made = {
        "precision": "fp32",
        "onnx_sha256": bundle.manifest.artifacts[0].sha256,
        "settings": BuildSettings(first, more_profiles=tuple(more)),
        **{"compiler": "rtx", "gpu": None, "targets": TARGETS},
    }
    return engines.build(bundle, **{**made, **changes})


def test_it_holds_the_verified_file_and_the_shapes_of_its_engine(bundle: Bundle, root: Path) -> None:
    sidecar = engine(bundle, (1, 4, 16))
    engine(bundle, (1, 2, 2), capability=(8, 6), onnx_sha256="0" * 64)  # from a file that the bundle held before
    packaged = write(bundle, root)
    folder = root / "linear"
    assert sorted(path.name for path in folder.iterdir()) == ["load.py", "model.onnx", "onnxruntime.json"]
    assert (folder / "model.onnx").read_bytes() == (bundle.path / "model.onnx").read_bytes()
    config = config_of(folder)
    assert config["files"] == {"model.onnx": hashlib.sha256((folder / "model.onnx").read_bytes()).hexdigest()}
    assert (config["execution_provider"], config["package"]) == (PROVIDER, PACKAGE)
    assert (
        config["provider_options"]
        == packaged.provider_options
        == {
            "nv_runtime_cache_path": "cache",
            "nv_profile_min_shapes": "images:1x12",
            "nv_profile_opt_shapes": "images:4x12",
            "nv_profile_max_shapes": "images:16x12",
        }
    )
    assert (packaged.engine, packaged.file.verdict.status, packaged.forced) == (sidecar.plan, "ok", ())
    assert config["inputs"] == [{"name": "images", "dtype": "float32", "shape": [-1, 12]}]
    assert config["deploycli"]["proof"] == "ok"
    assert config["deploycli"]["bundle"] == "linear"


def test_it_is_the_same_for_the_same_bundle(bundle: Bundle, root: Path) -> None:
    write(bundle, root / "a")
    write(bundle, root / "b")
    for name in ("load.py", "model.onnx", "onnxruntime.json"):
        assert (root / "a/linear" / name).read_bytes() == (root / "b/linear" / name).read_bytes()


def test_without_an_engine_the_shapes_are_those_that_build_trt_would_take(bundle: Bundle, root: Path) -> None:
    packaged = write(bundle, root)
    assert packaged.engine == ""
    assert packaged.provider_options["nv_profile_opt_shapes"] == "images:8x12"
    assert packaged.provider_options["nv_profile_max_shapes"] == "images:32x12"


def test_every_profile_is_written_and_a_choice_of_shapes_is_the_users(bundle: Bundle, root: Path) -> None:
    both = engine(bundle, (1, 1, 1), (2, 8, 16))
    given = write(bundle, root).provider_options
    assert given["nv_profile_min_shapes"] == "images:1x12,images:2x12"
    assert given["nv_profile_max_shapes"] == "images:1x12,images:16x12"
    assert given["nv_multi_profile_enable"] == "1"
    other = engine(bundle, (1, 8, 8), capability=(8, 6))
    with pytest.raises(UsageError, match="holds engines of several shapes") as caught:
        prepare(bundle, root)
    assert both.plan in caught.value.hint
    assert write(bundle, root, engine=other.plan).provider_options["nv_profile_max_shapes"] == "images:8x12"
    with pytest.raises(UsageError, match=r"holds no engine none\.plan"):
        prepare(bundle, root, OrtRtxOptions(engine="none.plan"))
    stale = engine(bundle, (1, 2, 2), capability=(7, 5), onnx_sha256="0" * 64)
    with pytest.raises(UsageError, match=r"was compiled from another file than model\.onnx is now"):
        prepare(bundle, root, OrtRtxOptions(engine=stale.plan))


def test_a_fixed_batch_needs_no_shapes(tmp_path: Path, root: Path) -> None:
    model = bundles.graph()
    dim = model.graph.input[0].type.tensor_type.shape.dim[0]
    dim.Clear()
    dim.dim_value = 4
    for output in model.graph.output:
        output.CopyFrom(helper.make_tensor_value_info(output.name, TensorProto.FLOAT, [4, bundles.CLASSES]))
    fixed = proven(bundles.make(tmp_path / "bundles", model=model, batch=4))
    assert write(fixed, root).provider_options == {"nv_runtime_cache_path": "cache"}


def test_a_name_that_the_options_cannot_hold(tmp_path: Path, root: Path) -> None:
    model = bundles.graph()
    model.graph.input[0].name = model.graph.node[0].input[0] = "a,b"
    odd = write_bundle(
        tmp_path / "bundles",
        "odd",
        lambda folder: replace(
            found := bundles.filler(model)(folder),
            spec=replace(found.spec, inputs=(replace(found.spec.inputs[0], name="a,b"),)),
        ),
    )
    with pytest.raises(UsageError, match=r"the input 'a,b' has a sign that separates shapes"):
        prepare(odd, root, OrtRtxOptions(force=True))


def test_every_option_is_one_of_the_provider(bundle: Bundle, root: Path) -> None:
    engine(bundle, (1, 1, 1), (2, 8, 16))
    given = write(bundle, root).provider_options
    assert len(given) == 5
    assert set(given) <= set(RECORDED["provider_options"])
    assert RECORDED["package"] == PACKAGE
    assert all(isinstance(value, str) for value in given.values())


def test_the_recorded_options_are_those_of_the_package() -> None:
    package = importlib.util.find_spec("onnxruntime_ep_nv_tensorrt_rtx")
    if package is None or package.origin is None:
        pytest.skip(f"needs the header of {PACKAGE}")
    text = (Path(package.origin).parent / RECORDED["header"]).read_text("utf-8")
    _, _, text = text.partition("namespace provider_option_names")
    names = re.findall(r'constexpr const char\* \w+ = "(\w+)"', text.partition("// namespace provider_option_names")[0])
    assert set(names) >= {*RECORDED["provider_options"]}


class TestWhatIsRefused:
    def test_what_is_not_for_release(self, tmp_path: Path, root: Path) -> None:
        unproven = bundles.make(tmp_path / "bundles")
        with pytest.raises(UsageError, match="never verified"):
            prepare(unproven, root)
        keep(unproven, verify(unproven, VerifyOptions(reference="golden", rtol={"features": 1e-12})))
        with pytest.raises(NumericsError, match="failed"):
            prepare(unproven, root)
        forced = write(bundles.make(tmp_path / "random", weights=Weights("random", seed=3)), root, force=True)
        assert len(forced.forced) == 2
        assert "random weights" in config_of(root / "linear")["deploycli"]["not_for_release"]

    def test_a_precision_that_is_not_there(self, bundle: Bundle, root: Path) -> None:
        with pytest.raises(UsageError, match="holds no fp16") as caught:
            prepare(bundle, root, OrtRtxOptions(precision="fp16"))
        assert "deploycli cast" in caught.value.hint

    @pytest.mark.parametrize("name", [".hidden", "a/b", " linear"])
    def test_names_of_no_folder(self, bundle: Bundle, root: Path, name: str) -> None:
        with pytest.raises(UsageError, match="cannot name a model"):
            prepare(bundle, root, OrtRtxOptions(name=name))

    def test_what_somebody_else_wrote_stays(self, bundle: Bundle, root: Path, tmp_path: Path) -> None:
        (root / "linear").mkdir(parents=True)
        (root / "linear/mine").touch()
        (root / "file").touch()
        (root / "link").symlink_to(tmp_path)
        (root / "other").mkdir()
        (root / "other/onnxruntime.json").symlink_to(root / "file")
        for where, name, words in (
            (root, None, "did not write"),
            (root, "file", "is a file"),
            (root, "link", "is a symbolic link"),
            (root / "file", None, "is a file"),
            (root, "other", r"onnxruntime\.json is a symbolic link"),
            (bundle.path, None, "is a bundle"),
        ):
            with pytest.raises(UsageError, match=words):
                prepare(bundle, where, OrtRtxOptions(name=name, force=True))
        assert (root / "linear/mine").is_file()

    def test_a_file_that_changes_meanwhile_leaves_the_old_folder(self, bundle: Bundle, root: Path) -> None:
        write(bundle, root)
        before = {path: path.read_bytes() for path in (root / "linear").iterdir()}
        delivery = prepare(bundle, root)
        (bundle.path / "model.onnx").write_bytes(b"another")
        with pytest.raises(IntegrityError, match="changed while it was packaged"):
            delivery.write()
        assert {path: path.read_bytes() for path in (root / "linear").iterdir()} == before
        assert [path.name for path in root.iterdir()] == ["linear"]

    def test_a_place_that_cannot_be_written(self, bundle: Bundle, root: Path) -> None:
        delivery = prepare(bundle, root / "linear")
        root.write_text("a file")
        with pytest.raises(EnvironmentUnsuitable, match="cannot write"):
            delivery.write()


class TestTheLoader:
    """What stands in the folder, as a user runs it: a process without this program."""

    @staticmethod
    def run(folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-W", "error", str(folder / "load.py")]
        return subprocess.run(
            command, cwd=folder.parent, env=environment, capture_output=True, text=True, timeout=120, check=False
        )

    def test_the_cpu_runs_it_where_the_provider_is_missing_which_is_said(self, tmp_path: Path, root: Path) -> None:
        external = proven(write_bundle(tmp_path / "bundles", "external", with_external_data))
        write(external, root)
        assert set(config_of(root / "external")["files"]) == {"model.onnx", "model.onnx.data"}
        done = self.run(root / "external")
        assert done.returncode == 0, done.stderr
        assert done.stdout.splitlines()[-1] == "ran by CPUExecutionProvider"
        assert f"{PROVIDER} cannot run here, the CPU does: " in done.stderr

    def test_a_provider_that_does_not_load_is_told(self, bundle: Bundle, root: Path, tmp_path: Path) -> None:
        """As the real one does where there is no driver."""
        write(bundle, root)
        package = tmp_path / "onnxruntime_ep_nv_tensorrt_rtx"
        package.mkdir()
        (package / "__init__.py").write_text(f"def get_library_path(): return {str(package / 'provider.so')!r}")
        (package / "provider.so").write_bytes(b"no library")
        done = self.run(root / "linear", PYTHONPATH=str(tmp_path))
        assert done.returncode == 0, done.stderr
        assert "Failed to load library" in done.stderr

    def test_a_changed_file_is_not_opened(self, bundle: Bundle, root: Path) -> None:
        write(bundle, root)
        content = (root / "linear/model.onnx").read_bytes()
        (root / "linear/model.onnx").write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        done = self.run(root / "linear")
        assert (done.returncode, done.stdout) == (1, "")
        assert "is not the file that was packaged" in done.stderr

    def test_the_outputs_are_the_golden_ones(
        self, bundle: Bundle, root: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        write(bundle, root)
        session = ort_rtx_load.open_session(root / "linear")
        inputs, truth = load_golden(bundle.golden)
        found = dict(zip(truth, session.run(list(truth), inputs), strict=True))
        for name, expected in truth.items():
            np.testing.assert_allclose(found[name], expected, rtol=1e-4, atol=1e-5)
        assert "cannot run here" in capsys.readouterr().err

    def test_a_provider_that_has_a_device_gets_the_options(
        self, bundle: Bundle, root: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """ONNX Runtime's own way to a device, with the CPU for the GPU: its provider is passed over no option."""
        write(bundle, root)
        config = root / "linear/onnxruntime.json"
        config.write_text(config.read_text().replace(PROVIDER, "CPUExecutionProvider"))
        for _ in range(2):  # a provider is registered once
            assert ort_rtx_load.open_session(root / "linear").get_providers() == ["CPUExecutionProvider"]
        assert (root / "linear/cache").is_dir()
        assert capsys.readouterr().err == ""


def test_names_of_onnx_runtime_that_the_loader_uses() -> None:
    assert {"register_execution_provider_library", "get_ep_devices"} <= set(dir(ort))
    assert hasattr(ort.SessionOptions, "add_provider_for_devices")
