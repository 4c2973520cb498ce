from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from onnx import helper

from deploycli.exporters.runtime.runtimes import EagerRuntime, OrtRuntime, Runtime, TensorInfo
from deploycli.models.errors import ExportError, UsageError
from tests.exporters.bundle.bundles import CLASSES, FEATURES, WEIGHT, graph, truth

if TYPE_CHECKING:
    from pathlib import Path

IMAGES = np.random.default_rng(0).standard_normal((3, FEATURES)).astype(np.float32)


class Linear(torch.nn.Module):
    def __init__(self, returns: type = tuple) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor(WEIGHT))
        self.dropout = torch.nn.Dropout(0.5)
        self.returns = returns
        self.seen: dict[str, Any] = {}

    def forward(self, images: torch.Tensor) -> Any:
        self.seen = {
            "grad": torch.is_grad_enabled(),
            "autocast": torch.is_autocast_enabled("cpu"),
            "precision": torch.get_float32_matmul_precision(),
            "deterministic": torch.are_deterministic_algorithms_enabled(),
            "dtype": self.weight.dtype,
        }
        logits = self.dropout(images) @ self.weight
        if self.returns is torch.Tensor:
            return logits
        if self.returns is dict:
            return {"logits": logits}
        return self.returns((logits, logits.tanh()))


@pytest.fixture
def model_file(tmp_path: Path) -> Path:
    (tmp_path / "model.onnx").write_bytes(graph().SerializeToString())
    return tmp_path / "model.onnx"


@pytest.mark.parametrize("returns", [tuple, list, torch.Tensor])
def test_eager_names_its_outputs(returns: type) -> None:
    expected = truth(IMAGES)
    names = ("logits",) if returns is torch.Tensor else ("logits", "features")
    with EagerRuntime(Linear(returns), ["images"], names) as eager:
        outputs = eager.run({"images": IMAGES})
    assert tuple(outputs) == names
    for name in names:
        np.testing.assert_allclose(outputs[name], expected[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("returns", "names"), [(dict, ("a", "b")), (tuple, ("logits",)), (torch.Tensor, ("a", "b"))])
def test_eager_outputs_must_fit_their_names(returns: type, names: tuple[str, ...]) -> None:
    with pytest.raises(ExportError, match="Linear returned"):
        EagerRuntime(Linear(returns), ["images"], names).run({"images": IMAGES})


def test_eager_is_exact_whatever_the_caller_has_set() -> None:
    module = Linear().double().train()
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu"):
            EagerRuntime(module, ["images"], ["logits", "features"]).run({"images": IMAGES})
        assert torch.get_float32_matmul_precision() == "medium"
        assert not torch.are_deterministic_algorithms_enabled()
    finally:
        torch.set_float32_matmul_precision("highest")
    assert module.seen == {
        "grad": False,
        "autocast": False,
        "precision": "highest",
        "deterministic": True,
        "dtype": torch.float32,
    }


def test_eager_takes_read_only_arrays() -> None:
    images = IMAGES.copy()
    images.flags.writeable = False
    EagerRuntime(Linear(), ["images"], ["logits", "features"]).run({"images": images})


@pytest.mark.parametrize("optimize", [True, False])
def test_ort_runs_and_describes_the_graph(model_file: Path, optimize: bool) -> None:
    with OrtRuntime(model_file, optimize=optimize, threads=1) as ort:
        assert ort.inputs == (TensorInfo("images", "float32", ("batch", FEATURES)),)
        assert [(o.name, o.dtype) for o in ort.outputs] == [("logits", "float32"), ("features", "float32")]
        outputs = ort.run({"images": IMAGES})
    assert outputs["logits"].shape == (3, CLASSES)
    for name, expected in truth(IMAGES).items():
        np.testing.assert_allclose(outputs[name], expected, rtol=1e-5, atol=1e-6)


def test_both_run_behind_one_interface(model_file: Path) -> None:
    runtimes: list[Runtime] = [EagerRuntime(Linear(), ["images"], ["logits", "features"]), OrtRuntime(model_file)]
    for runtime in runtimes:
        with runtime as entered:
            assert list(entered.run({"images": IMAGES})) == ["logits", "features"]
            with pytest.raises(UsageError, match="pixels"):
                entered.run({"pixels": IMAGES})
    assert [runtime.name for runtime in runtimes] == ["PyTorch eager", "ONNX Runtime"]


@pytest.mark.parametrize("content", [None, b"", b"no protobuf"])
def test_file_that_ort_cannot_load_is_one_message(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "model.onnx"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ExportError, match=r"cannot load .*model\.onnx") as caught:
        OrtRuntime(path)
    assert "\n" not in caught.value.found


def test_graph_that_ort_refuses_is_one_message(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(
        graph([helper.make_node("NoSuchOperator", ["raw.logits"], ["logits"])]).SerializeToString()
    )
    with pytest.raises(ExportError, match="NoSuchOperator"):
        OrtRuntime(tmp_path / "model.onnx")


def test_input_that_does_not_fit_is_one_message(model_file: Path) -> None:
    with OrtRuntime(model_file) as ort, pytest.raises(ExportError, match="failed on images:3x2 float32") as caught:
        ort.run({"images": IMAGES[:, :2]})
    assert "\n" not in caught.value.found


class Careless(torch.nn.Module):
    """Reads memory that nothing has written."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images + torch.empty_like(images)


def test_memory_that_nothing_has_written_is_not_a_number() -> None:
    with EagerRuntime(Careless(), ["images"], ["logits"]) as eager:
        assert np.isnan(eager.run({"images": IMAGES})["logits"]).all()


@pytest.mark.parametrize("poison", [True, False])
def test_poison_is_of_no_consequence_to_a_careful_model(poison: bool) -> None:
    with EagerRuntime(Linear(), ["images"], ("logits", "features")) as eager:
        expected = eager.run({"images": IMAGES})
    torch.utils.deterministic.fill_uninitialized_memory = not poison  # type: ignore[attr-defined]
    try:
        with EagerRuntime(Linear(), ["images"], ("logits", "features"), poison=poison) as eager:
            outputs = eager.run({"images": IMAGES})
        assert torch.utils.deterministic.fill_uninitialized_memory is not poison  # type: ignore[attr-defined]
    finally:
        torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
    for name, array in expected.items():
        assert outputs[name].tobytes() == array.tobytes()
