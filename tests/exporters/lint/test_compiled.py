"""What the compiler makes of the graphs of `cases_compiled.py` and of their twins, and the lint's word on each."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from itertools import permutations
from typing import TYPE_CHECKING

import onnx
import pytest

from deploycli.exporters.bundle.engine import KernelTotals
from deploycli.exporters.target.product import RTX
from deploycli.exporters.tensorrt.compilers.rtx import as_inspector_json
from deploycli.exporters.tensorrt.inspector import parse_layers
from deploycli.exporters.tensorrt.traffic import read_engine
from tests.exporters.lint.cases_compiled import MIXED, NARROW, WIDE, perceptrons, projected, quantized, windowed
from tests.exporters.lint.judge import Judge
from tests.exporters.lint.rtx import WHY
from tests.exporters.lint.texts import F16, weight

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.exporters.lint.judge import Verdict
    from tests.exporters.lint.texts import Graph

pytestmark = pytest.mark.skipif(importlib.util.find_spec(RTX.module) is None, reason=WHY)


@pytest.fixture(scope="module")
def judge() -> Iterator[Judge]:
    with Judge(((8, 9),)) as made:
        yield made


def launches(verdict: Verdict) -> int:
    assert not verdict.refused, verdict.message
    return len(parse_layers(as_inspector_json(verdict.layers)).launched)


def moved(graph: Graph, verdict: Verdict, file: Path) -> float:
    """Return the activations that all kernels move for one image of eight, kB."""
    onnx.save(graph.proto(), file)
    (reading,) = read_engine(file, [(parse_layers(as_inspector_json(verdict.layers)), 8)])
    totals = KernelTotals.of(reading.kernels)
    assert not totals.unknown
    return totals.moved / 1000


def says(graph: Graph, rule: int, level: str) -> bool:
    return any((found.number, found.level) == (rule, level) for found in graph.lint().findings)


def test_scales_of_two_types_are_refused(judge: Judge) -> None:
    assert "type mismatch between matmul operand scales" in judge(MIXED.proto()).message


@pytest.mark.parametrize(
    "graph",
    [
        quantized("float16", "float", channels=False),
        quantized("float16", "float", operator="Gemm"),
        quantized("float", "float16", operator="Conv"),
    ],
    ids=["one scale each", "Gemm", "Conv"],
)
def test_these_of_two_types_are_taken(judge: Judge, graph: Graph) -> None:
    assert not judge(graph.proto()).refused
    assert graph.lint().errors == ()


def test_fp32_scales_move_more_bytes(judge: Judge, tmp_path: Path) -> None:
    found = [(launches(v), moved(g, v, tmp_path / "m.onnx")) for g in (WIDE, NARROW) for v in [judge(g.proto())]]
    assert found == [(3, 21.504), (3, 15.36)]


@pytest.mark.parametrize("batch", ["8", "batch"])
@pytest.mark.parametrize(("bias", "mask"), [(False, False), (True, False), (False, True)])
def test_the_operator_attention_copies_what_products_made(judge: Judge, batch: str, bias: bool, mask: bool) -> None:
    operator, products = (projected(form, batch, bias=bias, mask=mask) for form in ("operator", "products"))
    more = launches(judge(operator.proto())) - launches(judge(products.proto()))
    assert more == (3 if not bias and (mask or batch == "batch") else 0)
    assert says(operator, 16, "warning") is (more > 0)
    assert not says(products, 16, "warning")


@pytest.mark.parametrize("rows", ["8, 14, 14", "batch, 14, 14", "8, 2, 7, 14"])
def test_a_product_on_four_axes_leaves_its_bias_to_another_kernel(judge: Judge, rows: str) -> None:
    deep, flat = perceptrons(rows), perceptrons("batch, 196" if "batch" in rows else "8, 196")
    assert (launches(judge(deep.proto())), launches(judge(flat.proto()))) == (9, 7)
    assert [f.node for f in deep.lint(rules=[19]).findings] == ["MatMul.2", "MatMul.9"]
    assert flat.lint(rules=[19]).findings == ()


def test_it_moves_more_bytes(judge: Judge, tmp_path: Path) -> None:
    graphs = perceptrons("8, 14, 14"), perceptrons("8, 196")
    assert [moved(g, judge(g.proto()), tmp_path / "m.onnx") for g in graphs] == [1731.072, 1128.96]


def test_four_axes_of_one_image_are_three(judge: Judge) -> None:
    graph = perceptrons("1, 14, 14")
    assert launches(judge(graph.proto())) == 7
    assert graph.lint(rules=[19]).findings == ()


def test_what_no_product_computes_is_not_missed(judge: Judge) -> None:
    deep, flat = (perceptrons(rows, activation="Tanh") for rows in ("8, 14, 14", "8, 196"))
    assert launches(judge(deep.proto())) == launches(judge(flat.proto())) == 9
    assert deep.lint(rules=[19]).findings == ()


@pytest.mark.parametrize("heads", [1, 2])
def test_the_builder_fails_at_one_head_where_the_lint_says_so(judge: Judge, heads: int) -> None:
    said = {}
    for scores in map("".join, permutations("BWh")):
        graph = windowed(scores, heads=heads)
        verdict = judge(graph.proto())
        said[scores] = says(graph, 16, "error")
        assert said[scores] is verdict.refused, (scores, verdict)
        assert not verdict.refused or "CHECK(new_stride_order[i1] != new_stride_order[i2])" in verdict.message
    assert sum(said.values()) == (4 if heads == 1 else 0)


@pytest.mark.parametrize("mask", [(4, 1, 2, 16, 16), (4, 1, 1, 16, 16), (1, 1, 2, 16, 16), (4, 1, 2, 1, 16)])
def test_a_mask_may_be_one_between_windows_and_heads(judge: Judge, mask: tuple[int, ...]) -> None:
    """Scores [W, B, h, N, N] take any mask that broadcasts to them."""
    graph = windowed("WBh", heads=2)
    graph = replace(graph, constants={**graph.constants, "m": weight(*mask, dtype=F16)})
    verdict = judge(graph.proto())
    assert parse_layers(as_inspector_json(verdict.layers)).fused_attention
    assert graph.lint().findings == ()
