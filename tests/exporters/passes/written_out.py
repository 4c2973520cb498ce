"""Operators that an exporter wrote out, in the opset that it had, and how far a fusion is from them."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper

from tests.exporters.passes.graphs import apply, ops, reasons, session

RNG = np.random.default_rng(0)


def parse_at(opset: int, text: str, **constants: Any) -> onnx.ModelProto:
    """Parse a graph of an older opset."""
    model = onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["" : {opset}]>\n{text}')
    model.graph.initializer.extend(numpy_helper.from_array(np.asarray(v), k) for k, v in constants.items())
    onnx.checker.check_model(model, full_check=True)
    return model


def deviation(plain: onnx.ModelProto, rewritten: onnx.ModelProto) -> float:
    """Largest difference on random data, relative to the largest value; what is no number must be none in both."""
    shapes = [[d.dim_value or 3 for d in value.type.tensor_type.shape.dim] for value in plain.graph.input]
    feeds = {
        v.name: 3 * RNG.standard_normal(s).astype(np.float32) for v, s in zip(plain.graph.input, shapes, strict=True)
    }
    results = [session(model).run(None, feeds) for model in (plain, rewritten)]
    found = 0.0
    for x, y in zip(*results, strict=True):
        if not np.array_equal(np.isnan(x), np.isnan(y)):
            return math.inf
        found = max(found, float(np.nanmax(np.abs(x - y), initial=0) / np.nanmax(np.abs(x), initial=1e-9)))
    return found


def fuse(make: Any, plain: onnx.ModelProto) -> tuple[dict[str, int], list[str], bool]:
    rewritten, graph_pass, modified = apply(make, plain)
    assert deviation(plain, rewritten) < 1e-6
    assert not apply(make, rewritten)[2], "a second run changes something"
    return ops(rewritten), reasons(graph_pass), modified
