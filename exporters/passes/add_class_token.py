"""Tokens that are the same in every sample are added, not concatenated.

Before -> after, for the class token of a ViT::

    Shape(x), ..., Expand(token [1, 1, C], [B, 1, C]), Concat(token, x) [B, 1 + T, C], Add(position [1, 1 + T, C])
    -> Pad(x) [B, 1 + T, C], Add(constant [1, 1 + T, C])

The padded row is zero, and the constant holds the token there and zero elsewhere; it then meets the position embedding.
The batch size is no longer computed in the graph. Equal, but for the sign of a zero. Refused, for one: a token that
stands between two parts of what varies; and one behind which nothing is added, as before rotary embeddings: TensorRT
would make two kernels more of the Pad, if the batch is dynamic, and save none.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from deploycli.exporters.graph.analysis import dynamic_axes
from deploycli.exporters.graph.builder import Builder, remove, replace
from deploycli.exporters.graph.steps import Remark
from deploycli.exporters.graph.unique import label
from deploycli.exporters.passes.graph_pass import GraphPass

if TYPE_CHECKING:
    import onnx_ir as ir

    from deploycli.exporters.graph.analysis import Analysis
    from deploycli.exporters.graph.movement_ops import Array
    from deploycli.exporters.graph.shapes import Dims


@dataclass(frozen=True)
class _Tokens:
    """A Concat of constants around what varies.

    Attributes:
        concat: the operator.
        axis: along which.
        varying: what varies.
        before: constants in front of it, as one; their first axis is 1.
        after: constants behind it.
    """

    concat: ir.Node
    axis: int
    varying: ir.Value
    before: list[Array]
    after: list[Array]


class AddClassToken(GraphPass):
    """Write tokens that are concatenated as a Pad and a constant that is added."""

    def transform(self, graph: ir.Graph, analysis: Analysis) -> bool:
        """Run the pass; see the module's documentation."""
        builder = Builder(graph, analysis)
        modified = False
        for node in list(graph):
            tokens = self._read(node, analysis)  # which may stand behind those that were written before
            if tokens is not None:
                _write(tokens, builder)
                modified = True
        return modified

    def _read(self, node: ir.Node, analysis: Analysis) -> _Tokens | None:
        dims = analysis.dims(node.outputs[0]) if node.op_type == "Concat" and node.domain == "" else None
        fact = analysis[node.outputs[0]] if dims is not None else None
        if dims is None or fact is None or not fact.dtype.is_floating_point() or dynamic_axes(dims) != [0]:
            return None
        axis = node.attributes.get_int("axis", 0) % len(dims)
        tokens = [None if value is None else _same_in_every_sample(value, analysis) for value in node.inputs]
        varying = [i for i, token in enumerate(tokens) if token is None]
        if axis == 0 or len(varying) == len(tokens) or not varying:
            return None
        if len(varying) > 1:
            if varying[-1] - varying[0] >= len(varying):
                self.remarks.append(Remark(label(node), "a token stands between two parts of what varies"))
            return None
        if not _meets_a_constant(node, analysis):
            self.remarks.append(Remark(label(node), "nothing is added behind it that its tokens could be added to"))
            return None
        value = node.inputs[varying[0]]
        parts = [token for token in tokens if token is not None]
        if value is None:
            return None
        return _Tokens(node, axis, value, parts[: varying[0]], parts[varying[0] :])


def _meets_a_constant(concat: ir.Node, analysis: Analysis) -> bool:
    """Say whether a constant is added to what is concatenated, at once or behind more tokens."""
    readers = list(concat.outputs[0].consumers())
    while readers:
        node = readers.pop()
        if node.domain == "" and node.op_type == "Add":
            if any(analysis.constant(value) is not None for value in node.inputs):
                return True
        elif node.domain == "" and node.op_type == "Concat":
            readers += node.outputs[0].consumers()
    return False


def _same_in_every_sample(value: ir.Value, analysis: Analysis) -> Array | None:
    """Return what an Expand repeats for every sample, ``[1, ...]``, or None where it is something else."""
    node, dims = value.producer(), analysis.dims(value)
    if node is None or node.op_type != "Expand" or node.domain != "" or dims is None or dynamic_axes(dims) != [0]:
        return None
    constant = analysis.constant(node.inputs[0])
    if constant is None or (constant.ndim == len(dims) and constant.shape[0] != 1):
        return None
    try:
        return np.broadcast_to(constant, (1, *dims[1:]))
    except ValueError:
        return None


def _write(tokens: _Tokens, builder: Builder) -> None:
    concat, axis = tokens.concat, tokens.axis
    dims = builder.analysis.dims(concat.outputs[0])
    assert dims is not None, "_read has looked at it"
    front, back = (sum(part.shape[axis] for part in parts) for parts in (tokens.before, tokens.after))
    pads = np.zeros((2, len(dims)), np.int64)
    pads[:, axis] = front, back
    padded = builder.value("Pad", [tokens.varying, builder.constant(pads.reshape(-1))], concat)
    middle = _zeros(dims, axis, dims[axis] - front - back, tokens)
    constant = np.concatenate([*tokens.before, middle, *tokens.after], axis)
    replace(concat.outputs[0], builder.value("Add", [padded, builder.constant(constant)], concat))
    remove(builder.graph, [concat])


def _zeros(dims: Dims, axis: int, size: int, tokens: _Tokens) -> Array:
    dtype = (tokens.before or tokens.after)[0].dtype
    return np.zeros((1, *(size if i == axis else d for i, d in enumerate(dims) if i)), dtype)
