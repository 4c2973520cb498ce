"""Whatever a program of movement does, the passes keep it, bit by bit."""

from __future__ import annotations

import os
from typing import Any

import onnx
import onnx_ir as ir
import pytest
from hypothesis import HealthCheck, given, note, settings
from hypothesis import strategies as st

from deploycli.exporters.graph import lowerings as forms
from deploycli.exporters.graph import regions
from deploycli.exporters.passes import fold_movement as movement
from deploycli.exporters.passes.drop_no_ops import DropNoOps
from deploycli.exporters.passes.fold_constants import FoldConstants
from deploycli.exporters.passes.fold_movement import FoldMovement
from deploycli.exporters.passes.pipeline import rewrite
from deploycli.exporters.passes.sum_additive_constants import SumAdditiveConstants
from tests.exporters.passes.graphs import differences, load, ops
from tests.exporters.passes.programs import programs

PASSES: list[Any] = [DropNoOps, FoldConstants, FoldMovement, SumAdditiveConstants]

QUICK_LAUNCH = 64
"""A launch this cheap, in bytes, makes the small programs as bytes-bound as the large tensors of real models."""


def examples(count: int) -> settings:
    """So many random examples in each run, times ``$DEPLOYCLI_EXAMPLES``; test_mutants.py shows what they find."""
    count *= int(os.environ.get("DEPLOYCLI_EXAMPLES", "1"))
    suppressed = [HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.function_scoped_fixture]
    return settings(max_examples=count, deadline=None, suppress_health_check=suppressed)


def set_launch(monkeypatch: pytest.MonkeyPatch, launch: int) -> None:
    for module in (forms, movement):
        monkeypatch.setattr(module, "LAUNCH", launch)
        monkeypatch.setattr(module, "VIEW", launch // 32)


@pytest.fixture(params=[forms.LAUNCH, QUICK_LAUNCH], ids=["real launch", "quick launch"])
def launch(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    set_launch(monkeypatch, request.param)
    return int(request.param)


def rewritten(plain: onnx.ModelProto) -> ir.Model:
    note(onnx.printer.to_text(plain))
    model = load(plain)
    rewrite(model)
    note(onnx.printer.to_text(ir.to_proto(model)))
    return model


def as_bytes(model: ir.Model) -> bytes:
    return ir.to_proto(model).SerializeToString(deterministic=True)


@pytest.mark.usefixtures("launch")
@examples(60)
@given(programs())
def test_a_rewritten_program_is_bit_equal(plain: onnx.ModelProto) -> None:
    assert differences(plain, ir.to_proto(rewritten(plain))) == []


@pytest.mark.usefixtures("launch")
@examples(40)
@given(programs(chain=True))
def test_a_rewritten_chain_is_bit_equal(plain: onnx.ModelProto) -> None:
    assert differences(plain, ir.to_proto(rewritten(plain))) == []


@pytest.mark.usefixtures("launch")
@examples(30)
@given(programs())
def test_a_second_run_changes_nothing(plain: onnx.ModelProto) -> None:
    model = rewritten(plain)
    once = as_bytes(model)
    assert [make.__name__ for make in PASSES if make()(model).modified] == []
    rewrite(model)
    assert as_bytes(model) == once


@examples(20)
@given(programs())
def test_the_same_program_gives_the_same_bytes(plain: onnx.ModelProto) -> None:
    assert as_bytes(rewritten(plain)) == as_bytes(rewritten(plain))


@st.composite
def reordered(draw: Any) -> tuple[onnx.ModelProto, onnx.ModelProto]:
    """A program, and the same one with its nodes in another valid order."""
    plain = draw(programs())
    waiting, order = list(plain.graph.node), []
    known = {"x", ""} | {tensor.name for tensor in plain.graph.initializer}
    while waiting:
        ready = [node for node in waiting if known.issuperset(node.input)]
        node = draw(st.sampled_from(ready)) if len(ready) > 1 else ready[0]
        waiting.remove(node)
        order.append(node)
        known.update(node.output)
    other = onnx.ModelProto()
    other.CopyFrom(plain)
    del other.graph.node[:]
    other.graph.node.extend(order)
    return plain, other


@pytest.mark.usefixtures("launch")
@examples(20)
@given(reordered())
def test_the_order_of_nodes_does_not_matter(pair: tuple[onnx.ModelProto, onnx.ModelProto]) -> None:
    plain, other = map(rewritten, pair)
    assert ops(plain) == ops(other)
    assert differences(pair[0], ir.to_proto(other)) == []


@examples(20)
@given(programs())
def test_where_no_form_is_cheaper_every_node_stays_as_it_was(plain: onnx.ModelProto) -> None:
    model = load(plain)
    before = as_bytes(model)
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(regions, "_for_every_batch", lambda *_: "no proof")
        graph_pass = FoldMovement()
        assert not graph_pass(model).modified
    assert as_bytes(model) == before
