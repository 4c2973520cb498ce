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

from exporters.precision.roles import Roles, Stage
from exporters.steps import Refusal

if TYPE_CHECKING:
    import re
    from collections.abc import Iterator, Mapping

    import onnx_ir as ir

SCHEMES = ("gemm", "attention", "full")
"""What is quantised: matrix products with weights; those of the attention too; residual branches too."""

SMALLEST_GEMM = 16
"""INT8 tensor cores work on at least so many channels; below, quantising costs more than it saves."""

INT8_HEAD_SIZES = (16, 32, 64)
INT8_LONGEST_SEQUENCE = 512
"""What TensorRT's fused INT8 attention takes: head sizes, and tokens."""

PROBABILITY_MAX = 1.0
"""A softmax ends at 1: its range needs no data."""


@dataclass(frozen=True)
class Site:
    """An operator to run in INT8, or half of one: what is quantised together, and reverted together.

    Attributes:
        node: the operator.
        group: name of what is reverted together: a GEMM, both products of an attention, a residual addition.
        activations: operand positions that get a Q/DQ pair for the whole tensor.
        weight: operand position of the weight, or None.
        axis: the weight's output channels.
        known: operand position -> largest magnitude, where no data is needed.
    """

    node: ir.Node
    group: str
    activations: tuple[int, ...]
    weight: int | None = None
    axis: int = 0
    known: Mapping[int, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Placement:
    """The sites in the order of the graph, and the operators that were left alone.

    Attributes:
        sites: where INT8 goes.
        refusals: matrix products, convolutions and attentions that stay in high precision, with the reason.
    """

    sites: tuple[Site, ...]
    refusals: tuple[Refusal, ...]

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
    high_precision: frozenset[Stage] = frozenset({Stage.PATCH_EMBED, Stage.HEAD}),
) -> Placement:
    """Choose the sites.

    Args:
        graph: an FP32 graph with constants as initializers; nodes have names.
        scheme: one of `SCHEMES`.
        exclude: an operator whose name one of these finds is left alone.
        high_precision: stages of the network that are left alone.
    """
    chooser = _Chooser(Roles(graph), exclude, high_precision)
    for node in graph:
        if node.op_type in ("MatMul", "Gemm", "Conv") and node.domain == "":
            if chooser.roles.weight(node) is not None:
                chooser.gemm(node)
            elif scheme == "gemm":
                chooser.refuse(node, "scheme: gemm leaves products of two activations alone")
        elif node.op_type == "Softmax" and scheme != "gemm":
            chooser.attention(node)
        elif node.op_type == "Add" and scheme == "full":
            chooser.residual(node)
    return Placement(tuple(chooser.in_order(graph)), tuple(chooser.refusals))


class _Chooser:
    def __init__(self, roles: Roles, exclude: tuple[re.Pattern[str], ...], high_precision: frozenset[Stage]) -> None:
        self.roles = roles
        self.refusals: list[Refusal] = []
        self._exclude = exclude
        self._high_precision = high_precision
        self._sites: dict[ir.Node, Site] = {}

    def in_order(self, graph: ir.Graph) -> Iterator[Site]:
        return (self._sites[node] for node in graph if node in self._sites)

    def refuse(self, node: ir.Node, reason: str) -> None:
        self.refusals.append(Refusal(node.name or node.op_type, reason))

    def gemm(self, node: ir.Node) -> None:
        """A product with a constant: per-channel weights, the activation as a whole."""
        weight = self.roles.weight(node)
        assert weight is not None
        stage = self.roles.stage(node)
        if (reason := self._excluded(node)) is not None:
            self.refuse(node, reason)
        elif stage in self._high_precision:
            self.refuse(node, f"{stage}: stays in high precision")
        elif weight.position == 0:
            self.refuse(node, "form: its weight stands on the left")
        elif min(weight.rows, weight.columns) < SMALLEST_GEMM:
            self.refuse(node, f"size: {weight.rows} x {weight.columns} is below {SMALLEST_GEMM}")
        else:
            self._sites[node] = Site(node, node.name or "", (0,), weight.position, weight.axis)

    def attention(self, softmax: ir.Node) -> None:
        """Both products of an attention, or neither: INT8 fuses at all of its points or at none."""
        attention = self.roles.attention(softmax)
        if attention is None:
            self.refuse(softmax, "form: no attention: its operand or its result is not one product of two activations")
            return
        shape = f"{attention.queries} x {attention.keys} tokens, head size {attention.head_size}"
        if (reason := self._excluded(attention.scores) or self._excluded(attention.mix)) is not None:
            self.refuse(softmax, reason)
        elif attention.head_size not in INT8_HEAD_SIZES or None in (attention.queries, attention.keys):
            self.refuse(softmax, f"attention: {shape}; fused INT8 attention takes head sizes {INT8_HEAD_SIZES}")
        elif max(attention.queries or 0, attention.keys or 0) > INT8_LONGEST_SEQUENCE:
            self.refuse(softmax, f"attention: {shape}; fused INT8 attention ends at {INT8_LONGEST_SEQUENCE} tokens")
        else:
            group = softmax.name or ""
            self._sites[attention.scores] = Site(attention.scores, group, (0, 1))
            known = {attention.probability: PROBABILITY_MAX}
            self._sites[attention.mix] = Site(attention.mix, group, (0, 1), known=known)

    def residual(self, node: ir.Node) -> None:
        """The branch of a residual addition; the stream itself stays in high precision."""
        branch = self.roles.residual_branch(node)
        if branch is None:
            return
        if (reason := self._excluded(node)) is not None:
            self.refuse(node, reason)
        else:
            self._sites[node] = Site(node, node.name or "", (branch,))

    def _excluded(self, node: ir.Node) -> str | None:
        pattern = next((p for p in self._exclude if p.search(node.name or "")), None)
        return None if pattern is None else f"user: matches {pattern.pattern!r}"
