"""GPUs by name, what they compute, and which of NVIDIA's compilers a machine gets."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deploycli.exporters.bundle.engine import GpuRecord
from deploycli.exporters.target.product import RTX, TENSORRT
from deploycli.exporters.target.targets import NEEDS, TARGETS, dotted, lacking, parse_target, parse_targets, shown
from deploycli.exporters.tensorrt import library
from deploycli.models.errors import EnvironmentUnsuitable, UsageError
from tests.exporters.lint.texts import Graph

if TYPE_CHECKING:
    from pathlib import Path

    from deploycli.exporters.target.targets import Capability


@pytest.mark.parametrize(
    ("text", "targets"),
    [
        ("8.6", [(8, 6)]),
        ("sm86", [(8, 6)]),
        ("SM_120", [(12, 0)]),
        ("121", [(12, 1)]),
        ("75", [(7, 5)]),
        ("turing", [(7, 5)]),
        ("Ampere", [(8, 0), (8, 6)]),
        ("ada", [(8, 9)]),
        ("blackwell", [(12, 0), (12, 1)]),
        ("all", TARGETS),
        ("rtx-3090", [(8, 6)]),
        ("NVIDIA GeForce RTX 4070 Ti SUPER", [(8, 9)]),
        ("NVIDIA GeForce RTX 5060 Laptop GPU", [(12, 0)]),
        ("rtx-2080ti", [(7, 5)]),
        ("Tesla T4", [(7, 5)]),
        ("GeForce GTX 1660 Ti", [(7, 5)]),
        ("rtx-a6000", [(8, 6)]),
        ("RTX 6000 Ada Generation", [(8, 9)]),
        ("RTX PRO 6000 Blackwell Workstation Edition", [(12, 0)]),
        ("a100-sxm4-80gb", [(8, 0)]),
        ("L40S", [(8, 9)]),
        ("dgx-spark", [(12, 1)]),
    ],
)
def test_gpus_by_name(text: str, targets: list[Capability]) -> None:
    assert parse_target(text) == tuple(targets)


@given(target=st.sampled_from(TARGETS), before=st.sampled_from(["", "sm", "SM_", "sm-", " cc "]), dot=st.booleans())
def test_every_capability_in_every_spelling(target: Capability, before: str, dot: bool) -> None:
    text = dotted(target) if dot else "".join(map(str, target))
    assert parse_target(before + text) == (target,)


@pytest.mark.parametrize("text", ["9.0", "sm90", "h100", "H200", "10.0", "b200", "v100", "gtx-1080", "orin", "3.5"])
def test_gpus_that_it_does_not_compile_for(text: str) -> None:
    with pytest.raises(UsageError, match="for which TensorRT for RTX does not compile") as caught:
        parse_target(text)
    assert "--compiler tensorrt" in caught.value.hint


@pytest.mark.parametrize("text", ["", "8", "rtx", "rtx-9090", "gpu", "8.6.1", "sm", "8.6,8.9", "+8.6", "\n"])
def test_what_is_no_gpu(text: str) -> None:
    with pytest.raises(UsageError, match="names no GPU that is known"):
        parse_target(text)


def test_several_are_sorted_and_each_is_there_once() -> None:
    assert parse_targets(["ada", "8.6", "rtx-4090", "ampere"]) == ((8, 0), (8, 6), (8, 9))
    assert parse_targets([]) == ()


def test_what_targets_lack() -> None:
    assert lacking(TARGETS, NEEDS) == {
        "fp32 products": ((7, 5),),
        "bf16": ((7, 5),),
        "fp8": ((7, 5), (8, 0), (8, 6)),
        "fp4": ((7, 5), (8, 0), (8, 6), (8, 9)),
    }
    assert lacking(((8, 9),), ["bf16", "fp32 products"]) == {}
    assert [shown(feature) for feature in NEEDS] == ["FP32 products", "BF16", "FP8", "FP4"]


BF16 = Graph("(bfloat16[n, 4] x) => (bfloat16[n, 4] y) { y = Relu (x) }")
FP32 = Graph("(float[n, 4, 4] x) => (float[n, 4, 4] y) { y = MatMul (x, x) }")
FP16 = Graph("(float16[n, 4, 4] x) => (float16[n, 4, 4] y) { y = MatMul (x, x) }")
FP8 = Graph("(float16[n, 4] x) => (float16[n, 4] y) { q = Cast <to = 17> (x) y = Cast <to = 10> (q) }")


@pytest.mark.parametrize(
    ("graph", "features", "below"),
    [
        (BF16, ("bf16",), (7, 5)),
        (FP32, ("fp32 products",), (7, 5)),
        (FP16, (), None),
        (FP8, ("fp8",), (8, 6)),
    ],
)
def test_the_lint_knows_what_the_gpus_compute(graph: Graph, features: tuple[str, ...], below: Any) -> None:
    report = graph.lint(rules=[20])
    assert (report.features, report.findings) == (features, ())
    assert graph.lint(rules=[20], targets=TARGETS[-1:]).passed
    if below is not None:
        (finding,) = graph.lint(rules=[20], targets=(below,)).findings
        assert finding.level == "error"
        assert (
            f"TensorRT for RTX compiles no {shown(features[0])} for compute capability {dotted(below)}"
            in finding.message
        )


class TestTheCompiler:
    """Which one a machine gets, and what helps where there is none."""

    @pytest.fixture
    def machine(self, monkeypatch: pytest.MonkeyPatch) -> Any:
        def make(*, tensorrt: bool, rtx: bool, gpu: bool, driver: bool = False, arm: bool = False) -> None:
            def describe() -> GpuRecord:
                if not gpu:
                    raise EnvironmentUnsuitable("there is no GPU")
                return GpuRecord("NVIDIA L4", (8, 9))

            there = {TENSORRT: tensorrt, RTX: rtx}
            monkeypatch.setattr(library, "is_installed", lambda product: there[product])
            monkeypatch.setattr(library, "gpu", describe)
            monkeypatch.setattr(library, "has_driver", lambda: driver)
            monkeypatch.setattr(library.platform, "machine", lambda: "aarch64" if arm else "x86_64")

        return make

    @pytest.mark.parametrize(
        ("tensorrt", "rtx", "gpu", "chosen"),
        [
            (True, True, True, TENSORRT),
            (True, True, False, RTX),
            (True, False, False, TENSORRT),
            (False, True, True, RTX),
            (False, True, False, RTX),
            (False, False, False, TENSORRT),
        ],
    )
    def test_by_default(self, machine: Any, tensorrt: bool, rtx: bool, gpu: bool, chosen: Any) -> None:
        machine(tensorrt=tensorrt, rtx=rtx, gpu=gpu)
        assert library.choose() is chosen
        assert library.choose("rtx") is RTX
        assert library.choose("tensorrt") is TENSORRT

    def test_advice_works_on_the_machine(self, machine: Any) -> None:
        machine(tensorrt=False, rtx=False, gpu=False)
        assert library.install_hint(TENSORRT).startswith('without an NVIDIA driver: pip install "deploycli[rtx]"')
        machine(tensorrt=False, rtx=True, gpu=False)
        assert "without an NVIDIA driver: --compiler rtx" in library.install_hint(TENSORRT)
        machine(tensorrt=False, rtx=False, gpu=True, driver=True)
        assert library.install_hint(TENSORRT) == TENSORRT.install
        machine(tensorrt=False, rtx=False, gpu=False, arm=True)
        assert "rtx]" not in library.install_hint(TENSORRT) + library.install_hint(RTX)
        assert "no wheel for Linux on aarch64" in library.install_hint(RTX)

    @pytest.mark.parametrize(
        ("source", "what"),
        [
            ("__version__ = '1.4.0.76'", "TensorRT for RTX 1.4.0.76 is installed"),
            ("raise ImportError('libtensorrt_rtx.so.1: cannot open')", "TensorRT for RTX is installed, but its shared"),
            ("raise RuntimeError('x')", "TensorRT for RTX is installed, but it is broken: RuntimeError"),
            ("", "the package tensorrt_rtx in an unknown place is not NVIDIA's"),
        ],
    )
    def test_a_broken_one(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, source: str, what: str) -> None:
        (tmp_path / "tensorrt_rtx.py").write_text(source)
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.delitem(sys.modules, "tensorrt_rtx", raising=False)
        with pytest.raises(EnvironmentUnsuitable, match=what):
            library.require(RTX)
        sys.modules.pop("tensorrt_rtx", None)
