"""Networks of all families, cast: valid, minimal, within the budget in the simulation, and as TensorRT takes them."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from deploycli.exporters.lint import lint
from deploycli.exporters.precision.policy import REDUCED_TYPES
from deploycli.exporters.verification.compare import BUDGETS, compare
from tests.exporters.passes.graphs import session
from tests.exporters.precision.casts import simulated, typed
from tests.exporters.precision.networks import family, images

if TYPE_CHECKING:
    from tests.exporters.precision.casts import Typed


NAMES = ("swin", "vit", "deit distilled", "crossformer", "crossformer++", "transformers Swin V2")


def network(name: str) -> onnx.ModelProto:
    model = ir.to_proto(family(name))
    assert isinstance(model, onnx.ModelProto)
    return model


def assert_within_budget(graph: Typed, precision: str, name: str) -> None:
    inputs = images(name, 3)
    runtime = session(graph.source)
    names = [value.name for value in graph.source.graph.output]
    expected = dict(zip(names, runtime.run(names, inputs), strict=True))
    found = simulated(graph.proto, **inputs)
    for comparison in compare(expected, found, BUDGETS[precision]):
        assert comparison.passed, comparison.reasons
    assert any(not np.array_equal(found[name], expected[name]) for name in names), "nothing was rounded"


@pytest.mark.parametrize("name", NAMES)
def test_family(name: str) -> None:
    graph = typed(network(name))
    before, after = (Counter(node.op_type for node in g.graph.node) for g in (graph.source, graph.proto))
    assert after - before == Counter(Cast=after["Cast"] - before["Cast"])
    assert before - after == Counter()
    stays = [node.op_type for node in graph.source.graph.node if node.name in graph.notes]
    assert "LayerNormalization" in stays
    assert "Softmax" not in stays
    # Each has a Cast before it and one behind it, but for those that follow each other; the rest is at the ends.
    assert after["Cast"] - before["Cast"] <= 2 * len(stays) + len(graph.source.graph.output) + 1
    assert_no_new_errors(graph)
    assert_within_budget(graph, "fp16", name)
    modules = {node.name.rpartition("/")[0] for node in graph.source.graph.node} | {"images"}
    casts = [node.name for node in graph.proto.graph.node if node.op_type == "Cast"]
    assert {name.rpartition("/")[0] for name in casts} <= modules


@pytest.mark.parametrize("name", ["swin", "vit", "crossformer++"])
def test_family_in_bf16(name: str) -> None:
    graph = typed(network(name), "bf16")
    assert_no_new_errors(graph)
    assert_within_budget(graph, "bf16", name)
    assert {tensor.data_type for tensor in graph.proto.graph.initializer} >= {int(REDUCED_TYPES["bf16"])}


@pytest.mark.parametrize("name", ["swin", "vit"])
def test_family_without_optional_rules_and_with_fp16_ends(name: str) -> None:
    graph = typed(network(name), io=True, allow=frozenset({"layer-norm", "softmax", "reduction"}))
    assert graph.ops["Cast"] == 0
    assert_no_new_errors(graph)


def assert_no_new_errors(graph: Typed) -> None:
    """All rules of the lint, not only those of typing."""
    before, after = (lint(ir.from_proto(proto)) for proto in (graph.source, graph.proto))
    assert after.errors == before.errors == ()
    warnings = [[finding.number for finding in report.warnings] for report in (before, after)]
    rules = Counter(warnings[1]) - Counter(warnings[0])
    assert set(rules) <= {14, 16}  # weights that are subnormal; heads that are narrow
