"""A constant that is repeated for every sample of a batch is read as it is.

Before -> after, for the mask of a shifted window as transformers writes it::

    Expand(mask [1, nW, 1, S, S]) [B, nW, 1, S, S], Reshape [B*nW, 1, S, S], Add(bias), Add(scores [B*nW, N, S, S])
    -> Reshape(scores) [B, nW, N, S, S], Add(constant [1, nW, N, S, S]), Reshape [B*nW, N, S, S]

What is made of constants and of the batch size alone is run at two batch sizes; if both are one and the same block for
every sample, the block is the constant. A sum with zeros goes. Bit-equal, but for the sign of a zero. Refused, for one:
a constant that is cut by the batch size, such as one row of a table for each sample.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from deploycli.exporters.graph.analysis import GROWTH, dynamic_axes
from deploycli.exporters.graph.builder import Builder, replace
from deploycli.exporters.graph.evaluate import can_evaluate, evaluate
from deploycli.exporters.graph.operators import ARITHMETIC
from deploycli.exporters.graph.shapes import BATCH, elements, grows
from deploycli.exporters.graph.steps import Remark
from deploycli.exporters.graph.unique import label
from deploycli.exporters.passes.fold_constants import narrowed
from deploycli.exporters.passes.graph_pass import GraphPass

if TYPE_CHECKING:
    from deploycli.exporters.graph.analysis import Analysis
    from deploycli.exporters.graph.movement_ops import Array
    from deploycli.exporters.graph.shapes import Dims

RUNS = (2, 3)
"""Batch sizes at which such a constant is computed. Not 1, where all samples are one."""

_ELEMENTWISE = frozenset(ARITHMETIC) | {"And", "Cast", "Equal", "Greater", "Less", "Neg", "Not", "Or", "Where"}
_SIZED = frozenset({"Expand", "Reshape"})
"""Movement whose result may grow with the batch by repetition alone."""


class UnrepeatConstants(GraphPass):
    """Let no constant be repeated for every sample."""

    def transform(self, graph: ir.Graph, analysis: Analysis) -> bool:
        """Run the pass; see the module's documentation."""
        builder = Builder(graph, analysis)
        modified = False
        self._hopeless = set[ir.Value]()  # asked in the order of the graph, so that no chain is followed twice
        for node in list(graph):
            if node.op_type not in ARITHMETIC or node.domain != "" or node.outputs[0].is_graph_output():
                continue
            for position in (0, 1):
                block = self._block(node, position, analysis)
                if block is not None:
                    _write(node, position, block, builder)
                    modified = True
                    break
        return modified

    def _block(self, node: ir.Node, position: int, analysis: Analysis) -> Array | None:
        """Return what an operand is for every sample, of shape [rows a sample, ...]."""
        value, other = node.inputs[position], node.inputs[1 - position]
        dims, result = analysis.dims(value), analysis.dims(node.outputs[0])
        if value is None or value.is_initializer() or dims is None or result is None or analysis.dims(other) != result:
            return None
        if dynamic_axes(dims) != [0] or len(dims) != len(result) or dims[0] != result[0]:
            return None
        if elements(dims) > GROWTH or analysis.constant(value) is not None:
            return None
        runs = [run for batch in RUNS if (run := _computed(value, batch, analysis, {}, self._hopeless)) is not None]
        if len(runs) < len(RUNS):
            return None
        rows = dims[0] // BATCH
        block = runs[0][:rows]
        if any(not np.array_equal(run, np.concatenate([block] * batch)) for run, batch in zip(runs, RUNS, strict=True)):
            self.remarks.append(Remark(label(node), "its constant is not the same for every sample"))
            return None
        return block


def _computed(
    value: ir.Value, batch: int, analysis: Analysis, known: dict[ir.Value, Array | None], hopeless: set[ir.Value]
) -> Array | None:
    """Compute a value at a batch size, if that and constants are all that it is made of."""
    fact = analysis[value]
    if fact is not None and fact.extremes is not None:
        return fact.value(batch)
    if value not in known and value not in hopeless:
        known[value] = _made(value, batch, analysis, known, hopeless)
        if known[value] is None:
            hopeless.add(value)
    return known.get(value)


def _made(
    value: ir.Value, batch: int, analysis: Analysis, known: dict[ir.Value, Array | None], hopeless: set[ir.Value]
) -> Array | None:
    node = value.producer()
    if node is None or not can_evaluate(node) or not _repeats(node, analysis):
        return None
    operands = [
        None if operand is None else _computed(operand, batch, analysis, known, hopeless) for operand in node.inputs
    ]
    if any(array is None and operand is not None for array, operand in zip(operands, node.inputs, strict=True)):
        return None
    assert node.graph is not None, "it stands in the graph"
    try:
        results = evaluate(node, operands, node.graph.opset_imports, GROWTH)
    except ValueError:
        return None
    known.update(zip(node.outputs, results, strict=True))
    return known[value]


def _repeats(node: ir.Node, analysis: Analysis) -> bool:
    """Say whether a node does the same to every sample: the batch size may say how often, not which."""
    if node.op_type in _ELEMENTWISE:
        return True
    if node.op_type == "Expand":  # its size decides, of which no result is kept
        fact = None if node.inputs[1] is None else analysis[node.inputs[1]]
        return fact is not None and fact.extremes is not None
    if not analysis.only_moves(node):
        return False
    others = [analysis[value] for value in node.inputs[1:] if value is not None]
    return node.op_type in _SIZED or not any(fact is None or grows(fact.extremes) for fact in others)


def _write(node: ir.Node, position: int, block: Array, builder: Builder) -> None:
    analysis = builder.analysis
    x, result = node.inputs[1 - position], node.outputs[0]
    dims = analysis.dims(result)
    assert x is not None, "_block looked at it"
    assert dims is not None, "_block looked at it"
    if node.op_type in ("Add", "Sub") and not block.any() and (node.op_type == "Add" or position == 1):
        replace(result, x)
        return
    rows = len(block)
    split: Dims = dims if rows == 1 else (BATCH, rows, *dims[1:])
    # [rows, ...] -> [1, rows, ...]
    constant = builder.constant(narrowed(block if rows == 1 else block[None]))
    seen = x if rows == 1 else builder.reshape(x, split, node)
    operands = [constant, seen] if position == 0 else [seen, constant]
    value = builder.value(node.op_type, operands, node)
    replace(result, value if rows == 1 else builder.reshape(value, dims, node))
