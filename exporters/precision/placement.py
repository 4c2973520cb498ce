"""Where INT8 goes: the operators whose operands are quantised, and why the others' are not.

An operator runs in INT8 where all the operands that it multiplies come from Q/DQ pairs. Sources of the rules: TensorRT,
"Working with quantized types" (explicit quantisation, fused attention), onnx-tensorrt's QuantDequantLinearHelper, and
NVIDIA Model Optimizer (LayerNorm outputs share one pair; the softmax's scale is known).

    LayerNorm -> Q/DQ -> MatMul(W: int8 -> DQ) -> Add bias -> GELU -> Q/DQ -> MatMul -> Add bias -> Add residual
    q -> Q/DQ -\\
    k -> Q/DQ -> MatMul -> Add -> Softmax -> Q/DQ (1/127) -\\
    v -> Q/DQ ----------------------------------------------> MatMul

Nothing stands on a LayerNorm's input, on a bias, between a GEMM and its activation, or around data movement.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from deploycli.exporters.graph.operators import PRODUCTS
from deploycli.exporters.graph.steps import Remark
from deploycli.exporters.graph.unique import Names
from deploycli.exporters.lint.fused_attention import INT8_HEAD_DIMS, INT8_KEYS
from deploycli.exporters.precision.roles import Roles, Stage, Weight

if TYPE_CHECKING:
    import re
    from collections.abc import Iterator, Mapping

    import onnx_ir as ir

SCHEMES = ("gemm", "attention", "full")
"""What is quantised: matrix products with weights; those of the attention too; residual branches too."""

SMALLEST_GEMM = 16
"""INT8 tensor cores work on at least so many channels; below, quantising costs more than it saves."""

PROBABILITY_MAX = 1.0
"""A softmax ends at 1: its range needs no data."""

_LEFT_ALONE = frozenset({"Attention", "ConvTranspose", "Einsum"})


DEFAULT_HIGH_PRECISION = frozenset({Stage.PATCH_EMBED, Stage.HEAD})
"""Stages that are left alone unless asked for."""


@dataclass(frozen=True)
class Site:
    """An operator to run in INT8, or half of one: what is quantised together, and reverted together.

    Attributes:
        node: the operator.
        group: name of what is reverted together: a GEMM, both products of an attention, a residual addition.
        activations: operand positions that get a Q/DQ pair for the whole tensor.
        axis: where operand 1 is a weight, its axis of output channels, each of which has a scale; else None.
        known: operand position -> largest magnitude, where no data is needed.
    """

    node: ir.Node
    group: str
    activations: tuple[int, ...]
    axis: int | None = None
    known: Mapping[int, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Placement:
    """The sites in the order of the graph, and the operators that were left alone.

    Attributes:
        sites: where INT8 goes.
        remarks: matrix products, convolutions and attentions that stay in high precision, with the reason.
    """

    sites: tuple[Site, ...]
    remarks: tuple[Remark, ...]

    @property
    def groups(self) -> tuple[str, ...]:
        """The groups, in the order of the graph, each once."""
        return tuple(dict.fromkeys(site.group for site in self.sites))

    @property
    def calibrated(self) -> tuple[str, ...]:
        """The values whose ranges must come from data, in the order of the graph, each once."""
        names = (site.node.inputs[i] for site in self.sites for i in site.activations if i not in site.known)
        return tuple(dict.fromkeys(value.name or "" for value in names if value is not None))


def place(
    graph: ir.Graph,
    *,
    scheme: str,
    exclude: tuple[re.Pattern[str], ...] = (),
    high_precision: frozenset[Stage] = DEFAULT_HIGH_PRECISION,
) -> Placement:
    """Choose the sites.

    Args:
        graph: an FP32 graph with constants as initializers. Graphs inside an If or a Loop are left alone.
        scheme: one of `SCHEMES`.
        exclude: an operator whose name one of these finds is left alone.
        high_precision: stages of the network that are left alone.
    """
    chooser = _Chooser(Roles(graph), exclude, high_precision)
    for node in graph:
        if node.domain != "":
            continue
        if node.op_type in PRODUCTS:
            chooser.product(node, alone=scheme == "gemm")
        elif node.op_type in _LEFT_ALONE:
            chooser.refuse(node, f"form: {node.op_type} has no INT8 form here")
        elif node.op_type == "Softmax" and scheme != "gemm":
            chooser.attention(node)
        elif node.op_type == "Add" and scheme == "full":
            chooser.residual(node)
    for inner in graph.subgraphs():
        for node in inner:
            if node.op_type in PRODUCTS | _LEFT_ALONE:
                chooser.refuse(node, "form: it stands in a branch or a loop")
    return Placement(tuple(chooser.in_order(graph)), tuple(chooser.remarks))


class _Chooser:
    def __init__(self, roles: Roles, exclude: tuple[re.Pattern[str], ...], high_precision: frozenset[Stage]) -> None:
        self.remarks: list[Remark] = []
        self._roles = roles
        self._exclude = exclude
        self._high_precision = high_precision
        self._groups = Names(())
        self._sites: dict[ir.Node, Site] = {}

    def in_order(self, graph: ir.Graph) -> Iterator[Site]:
        return (self._sites[node] for node in graph if node in self._sites)

    def refuse(self, node: ir.Node, reason: str) -> None:
        self.remarks.append(Remark(_name(node), reason))

    def product(self, node: ir.Node, *, alone: bool) -> None:
        """A product with a weight: a scale for each output channel, and one for the activation.

        Args:
            node: any product.
            alone: attentions are not looked for, so that what multiplies two activations is refused here.
        """
        weight = self._roles.weight(node)
        if weight is None:
            if alone:
                self.refuse(node, "scheme: gemm leaves products of two activations alone")
        elif (reason := self._excluded(node)) is not None:
            self.refuse(node, reason)
        elif not isinstance(weight, Weight):
            self.refuse(node, f"form: {weight}")
        elif (stage := self._roles.stage(node)) in self._high_precision:
            self.refuse(node, f"{stage}: stays in high precision")
        elif min(weight.rows, weight.columns) < SMALLEST_GEMM:
            self.refuse(node, f"size: {weight.rows} x {weight.columns} channels, below {SMALLEST_GEMM}")
        else:
            self._sites[node] = Site(node, self._groups.unique(_name(node)), (0,), weight.axis)

    def attention(self, softmax: ir.Node) -> None:
        """Both products of an attention, or neither: INT8 fuses at all of its points or at none."""
        found = self._roles.attention(softmax)
        if isinstance(found, str):
            self.refuse(softmax, f"form: {found}")
            return
        queries, keys, head_size = self._roles.sizes(found)
        shape = f"{queries} x {keys} tokens, head size {head_size}"
        reasons = (self._excluded(node) for node in (softmax, found.scores, found.mix))
        if (reason := next(filter(None, reasons), None)) is not None:
            self.refuse(softmax, reason)
        elif found.scores in self._sites or found.mix in self._sites:
            self.refuse(softmax, "form: it shares a product with another attention")
        elif head_size not in INT8_HEAD_DIMS or queries is None or keys is None:
            self.refuse(softmax, f"attention: {shape}; fused INT8 attention takes head sizes {INT8_HEAD_DIMS}")
        elif max(queries, keys) > INT8_KEYS:
            self.refuse(softmax, f"attention: {shape}; fused INT8 attention ends at {INT8_KEYS} tokens")
        else:
            group = self._groups.unique(_name(softmax))
            known = {found.probability: PROBABILITY_MAX}
            self._sites[found.scores] = Site(found.scores, group, (0, 1))
            self._sites[found.mix] = Site(found.mix, group, (0, 1), known=known)

    def residual(self, node: ir.Node) -> None:
        """The branch of a residual addition; the stream itself stays in high precision."""
        branch = self._roles.residual_branch(node)
        if branch is None:
            return
        if (reason := self._excluded(node)) is not None:
            self.refuse(node, reason)
        else:
            self._sites[node] = Site(node, self._groups.unique(_name(node)), (branch,))

    def _excluded(self, node: ir.Node) -> str | None:
        pattern = next((p for p in self._exclude if p.search(_name(node))), None)
        return None if pattern is None else f"user: matches {pattern.pattern!r}"


def _name(node: ir.Node) -> str:
    """Return a node's name, or that of its first result, which every node has."""
    return node.name or node.outputs[0].name or node.op_type
