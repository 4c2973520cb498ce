"""Tokens that are the same in every sample are added, not concatenated.

Before -> after, for the class token of a ViT::

    Shape(x), ..., Expand(token [1, 1, C], [B, 1, C]), Concat(token, x) [B, 1 + T, C], Add(position [1, 1 + T, C])
    -> Pad(x) [B, 1 + T, C], Add(constant [1, 1 + T, C])

The padded row is zero, and the constant holds the token there and zero elsewhere; it then meets the position embedding.
The batch size is no longer computed in the graph. Equal, but for the sign of a zero. Refused, for one: a token that
stands between two parts of what varies.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from deploycli.exporters.graph.analysis import dynamic_axes
from deploycli.exporters.graph.builder import Builder
from deploycli.exporters.graph.rewiring import remove, replace
from deploycli.exporters.graph.steps import Refusal
from deploycli.exporters.graph.unique import label
from deploycli.exporters.passes.graph_pass import GraphPass

if TYPE_CHECKING:
    import onnx_ir as ir

    from deploycli.exporters.graph.analysis import Dims, Facts
    from deploycli.exporters.graph.movement_ops import Array


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

    def transform(self, graph: ir.Graph, facts: Facts) -> bool:
        """Run the pass; see the module's documentation."""
        builder = Builder(graph, facts)
        modified = False
        for node in list(graph):
            tokens = self._read(node, facts)  # which may stand behind those that were written before
            if tokens is not None:
                _write(tokens, builder)
                modified = True
        return modified

    def _read(self, node: ir.Node, facts: Facts) -> _Tokens | None:
        dims = facts.dims(node.outputs[0]) if node.op_type == "Concat" and node.domain == "" else None
        fact = facts[node.outputs[0]] if dims is not None else None
        if dims is None or fact is None or not fact.dtype.is_floating_point() or dynamic_axes(dims) != [0]:
            return None
        axis = node.attributes.get_int("axis", 0) % len(dims)
        tokens = [None if value is None else _same_in_every_sample(value, facts) for value in node.inputs]
        varying = [i for i, token in enumerate(tokens) if token is None]
        if axis == 0 or len(varying) == len(tokens) or not varying:
            return None
        if len(varying) > 1:
            if varying[-1] - varying[0] >= len(varying):
                self.refusals.append(Refusal(label(node), "a token stands between two parts of what varies"))
            return None
        value = node.inputs[varying[0]]
        parts = [token for token in tokens if token is not None]
        if value is None:
            return None
        return _Tokens(node, axis, value, parts[: varying[0]], parts[varying[0] :])


def _same_in_every_sample(value: ir.Value, facts: Facts) -> Array | None:
    """Return what an Expand repeats for every sample, ``[1, ...]``, or None where it is something else."""
    node, dims = value.producer(), facts.dims(value)
    if node is None or node.op_type != "Expand" or node.domain != "" or dims is None or dynamic_axes(dims) != [0]:
        return None
    constant = facts.constant(node.inputs[0])
    if constant is None or (constant.ndim == len(dims) and constant.shape[0] != 1):
        return None
    try:
        return np.broadcast_to(constant, (1, *dims[1:]))
    except ValueError:
        return None


def _write(tokens: _Tokens, builder: Builder) -> None:
    concat, axis = tokens.concat, tokens.axis
    dims = builder.facts.dims(concat.outputs[0])
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
