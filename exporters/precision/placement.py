"""Where INT8 or FP8 goes: the operators whose operands are quantised, and why the others' are not.

An operator runs in 8 bits where all the operands that it multiplies come from Q/DQ pairs. Sources of the rules:
TensorRT, "Working with quantized types" (explicit quantisation, fused attention), onnx-tensorrt's
QuantDequantLinearHelper, and NVIDIA Model Optimizer (LayerNorm outputs share one pair; the softmax's scale is known).

    LayerNorm -> Q/DQ -> MatMul(W: int8 -> DQ) -> Add bias -> GELU -> Q/DQ -> MatMul -> Add bias -> Add residual
    q -> Q/DQ -\\
    k -> Q/DQ -> MatMul -> Add -> Softmax -> Q/DQ (1/127) -\\
    v -> Q/DQ ----------------------------------------------> MatMul

Nothing stands on a LayerNorm's input, on a bias, between a GEMM and its activation, or around data movement.

The scheme `AUTO` quantises what makes fewer bytes and no further kernel. In 8 bits a product ends with one scale for
the whole tensor and nothing else: a bias, a residual, a GELU and scales by channel are a kernel of their own unless one
follows anyway. So INT8 is for the query, key and value that an attention reads in place. FP8 is written by a product in
FP16 as it ends, which INT8 is not: the projection of an attention and the second layer of an MLP gain as well, as a
LayerNormalization follows them, and the first layer never does. Seen with TensorRT for RTX 1.7.1 on Swin, ViT and
CrossFormer: `PARTS`.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from deploycli.exporters.graph.operators import PRODUCTS
from deploycli.exporters.graph.steps import Remark
from deploycli.exporters.graph.unique import Names
from deploycli.exporters.lint.fused_attention import FP8_HEAD_DIMS, FP8_KEYS, INT8_HEAD_DIMS, INT8_KEYS
from deploycli.exporters.precision.number_format import FP8, INT8, NumberFormat
from deploycli.exporters.precision.roles import Roles, Stage, Weight
from deploycli.exporters.target.targets import NEEDS, TARGETS, dotted, lacking, named
from deploycli.models.errors import UsageError

if TYPE_CHECKING:
    import re
    from collections.abc import Collection, Iterator, Mapping, Sequence

    import onnx_ir as ir

    from deploycli.exporters.target.targets import Capability

AUTO = "auto"

SCHEMES = (AUTO, "gemm", "attention", "full")
"""What is quantised: what makes an engine move fewest bytes; all matrix products with weights; those of the attention
too; residual branches too."""


class Part(enum.Enum):
    """A product with a weight that stands where 8 bits may cost no kernel."""

    PROJECTIONS = "query, key and value that an attention reads in place"
    AFTER_ATTENTION = "the projection of an attention's heads"
    MLP_FC2 = "the second layer of an MLP"


PARTS: Mapping[str, tuple[tuple[Capability, frozenset[Part]], ...]] = {
    INT8.name: (((7, 5), frozenset({Part.PROJECTIONS})),),
    # From Blackwell on, FP8 products of query, key and value are three kernels.
    FP8.name: (((8, 9), frozenset(Part)), ((12, 0), frozenset({Part.AFTER_ATTENTION, Part.MLP_FC2}))),
}
"""Precision -> lowest compute capability -> what to quantise from there on, the lowest first."""

SMALLEST_GEMM = 16
"""INT8 tensor cores work on at least so many channels; below, quantising costs more than it saves."""

PROBABILITY_MAX = 1.0
"""A softmax ends at 1: its range needs no data."""

_LEFT_ALONE = frozenset({"Attention", "ConvTranspose", "Einsum"})


DEFAULT_HIGH_PRECISION = frozenset({Stage.PATCH_EMBED, Stage.HEAD})
"""Stages that are left alone unless asked for."""


@dataclass(frozen=True)
class Site:
    """An operator to run in 8 bits, or half of one: what is quantised together, and reverted together.

    Attributes:
        node: the operator.
        group: name of what is reverted together: a GEMM, query, key and value, both products of an attention, a
            residual addition.
        activations: operand positions that get a Q/DQ pair for the whole tensor.
        axis: where operand 1 is a weight, its axis of output channels, each of which has a scale; else None.
        known: operand position -> largest magnitude, where no data is needed.
        alike: the weights, its own among them, that have one scale together; empty where each channel has its own.
    """

    node: ir.Node
    group: str
    activations: tuple[int, ...]
    axis: int | None = None
    known: Mapping[int, float] = field(default_factory=dict)
    alike: tuple[ir.Value, ...] = ()


@dataclass(frozen=True)
class Placement:
    """The sites in the order of the graph, and the operators that were left alone.

    Attributes:
        sites: where 8 bits go.
        remarks: matrix products, convolutions and attentions that stay in high precision, with the reason.
        scheme: by which they were chosen; ``gemm`` where `AUTO` found nothing.
    """

    sites: tuple[Site, ...]
    remarks: tuple[Remark, ...]
    scheme: str

    @property
    def groups(self) -> tuple[str, ...]:
        """The groups, in the order of the graph, each once."""
        return tuple(dict.fromkeys(site.group for site in self.sites))

    @property
    def calibrated(self) -> tuple[str, ...]:
        """The values whose ranges must come from data, in the order of the graph, each once."""
        names = (site.node.inputs[i] for site in self.sites for i in site.activations if i not in site.known)
        return tuple(dict.fromkeys(value.name or "" for value in names if value is not None))


def parts_for(number_format: NumberFormat, targets: Sequence[Capability] = ()) -> frozenset[Part]:
    """Return what to quantise for some GPUs: what is right for each of them.

    Args:
        number_format: what is quantised to.
        targets: compute capabilities; none for all that compute in the format.

    Raises:
        UsageError: one of them does not compute in the format.
    """
    known = PARTS[number_format.name]
    lowest = known[0][0]
    if below := lacking(targets, {number_format.name} & NEEDS.keys()):
        (lack,) = below.values()
        raise UsageError(
            f"{number_format.title} was asked for, which {named(lack)} does not compute",
            expected=f"compute capability {dotted(lowest)} or later",
            hint="another --gpu, or --precision int8",
        )
    wanted = targets or tuple(target for target in TARGETS if target >= lowest)
    chosen = [[parts for since, parts in known if since <= target][-1] for target in wanted]
    return frozenset.intersection(*chosen)


def place(
    graph: ir.Graph,
    *,
    scheme: str,
    number_format: NumberFormat = INT8,
    targets: Sequence[Capability] = (),
    exclude: tuple[re.Pattern[str], ...] = (),
    high_precision: frozenset[Stage] = DEFAULT_HIGH_PRECISION,
) -> Placement:
    """Choose the sites.

    Args:
        graph: an FP32 graph with constants as initializers. Graphs inside an If or a Loop are left alone.
        scheme: one of `SCHEMES`. Where `AUTO` finds nothing, it is ``gemm``.
        number_format: what is quantised to.
        targets: compute capabilities that `AUTO` chooses for, see `parts_for`.
        exclude: an operator whose name one of these finds is left alone.
        high_precision: stages of the network that are left alone.

    Raises:
        UsageError: a target does not compute in the format.
    """
    parts = parts_for(number_format, targets)
    chooser = _Chooser(Roles(graph), number_format, exclude, high_precision)
    if scheme == AUTO:
        for node in graph:
            if node.domain == "" and node.op_type in PRODUCTS:
                chooser.part(node, parts)
        if chooser.found:
            return _placement(chooser, graph, scheme)
        chooser = _Chooser(Roles(graph), number_format, exclude, high_precision)
        scheme = "gemm"
    for node in graph:
        if node.domain != "":
            continue
        if node.op_type in PRODUCTS:
            chooser.product(node, alone=scheme == "gemm")
        elif node.op_type in _LEFT_ALONE:
            chooser.refuse(node, f"form: {node.op_type} has no 8-bit form here")
        elif node.op_type == "Softmax" and scheme != "gemm":
            chooser.attention(node)
        elif node.op_type == "Add" and scheme == "full":
            chooser.residual(node)
    return _placement(chooser, graph, scheme)


def _placement(chooser: _Chooser, graph: ir.Graph, scheme: str) -> Placement:
    for inner in graph.subgraphs():
        for node in inner:
            if node.op_type in PRODUCTS | _LEFT_ALONE:
                chooser.refuse(node, "form: it stands in a branch or a loop")
    return Placement(tuple(chooser.in_order(graph)), tuple(chooser.remarks), scheme)


class _Chooser:
    def __init__(
        self,
        roles: Roles,
        number_format: NumberFormat,
        exclude: tuple[re.Pattern[str], ...],
        high_precision: frozenset[Stage],
    ) -> None:
        self.remarks: list[Remark] = []
        self._roles = roles
        self._format = number_format
        self._exclude = exclude
        self._high_precision = high_precision
        self._groups = Names(())
        self._sites: dict[ir.Node, Site] = {}

    def in_order(self, graph: ir.Graph) -> Iterator[Site]:
        return (self._sites[node] for node in graph if node in self._sites)

    def refuse(self, node: ir.Node, reason: str) -> None:
        self.remarks.append(Remark(_name(node), reason))

    @property
    def found(self) -> bool:
        """Whether there is a site."""
        return bool(self._sites)

    def part(self, node: ir.Node, parts: Collection[Part]) -> None:
        """A product, if it is one of these parts."""
        if node in self._sites:
            return  # beside another one
        if self._roles.weight(node) is None:
            self.refuse(node, f"scheme: {AUTO} leaves products of two activations alone")
            return
        projections = self._roles.projections(node)
        if projections and Part.PROJECTIONS in parts:
            self._together(projections)
        elif (Part.AFTER_ATTENTION in parts and self._roles.ends_attention(node)) or (
            Part.MLP_FC2 in parts and self._roles.stage(node) == Stage.MLP_FC2
        ):
            self.product(node, alone=True)
        else:
            self.refuse(node, f"scheme: in {self._format.title} it would be a kernel more, or move no fewer bytes")

    def _together(self, projections: tuple[ir.Node, ...]) -> None:
        """Query, key and value: one scale for the weights of all of them, or none is quantised."""
        reasons = ((node, self._reason(node)) for node in projections)
        if (found := next(((node, reason) for node, reason in reasons if reason is not None), None)) is not None:
            node, reason = found
            self.refuse(node, reason)
            return
        group = self._groups.unique(_name(projections[0]))
        alike = tuple(value for node in projections if (value := node.inputs[1]) is not None)
        for node in projections:
            weight = self._roles.weight(node)
            assert isinstance(weight, Weight), "there was no reason against it"
            self._sites[node] = Site(node, group, (0,), weight.axis, alike=alike)

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
        elif (reason := self._reason(node)) is not None:
            self.refuse(node, reason)
        else:
            assert isinstance(weight, Weight), "there was no reason against it"
            self._sites[node] = Site(node, self._groups.unique(_name(node)), (0,), weight.axis)

    def _reason(self, node: ir.Node) -> str | None:
        """Return why a product with a weight stays in high precision, if it does."""
        weight = self._roles.weight(node)
        if (reason := self._excluded(node)) is not None:
            return reason
        if not isinstance(weight, Weight):
            return f"form: {weight}"
        if (stage := self._roles.stage(node)) in self._high_precision:
            return f"{stage}: stays in high precision"
        if min(weight.rows, weight.columns) < SMALLEST_GEMM:
            return f"size: {weight.rows} x {weight.columns} channels, below {SMALLEST_GEMM}"
        return None

    def attention(self, softmax: ir.Node) -> None:
        """Both products of an attention, or neither: 8 bits fuse at all of its points or at none."""
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
        elif (limit := _beyond(self._format, queries, keys, head_size)) is not None:
            self.refuse(softmax, f"attention: {shape}; fused {self._format.title} attention {limit}")
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


def _beyond(number_format: NumberFormat, queries: int | None, keys: int | None, head_size: int | None) -> str | None:
    """Return the limit of fused attention in a format that an attention exceeds."""
    head_sizes = FP8_HEAD_DIMS if number_format is FP8 else INT8_HEAD_DIMS
    if head_size not in head_sizes or queries is None or keys is None:
        return f"takes head sizes {head_sizes}"
    if number_format is FP8:
        return f"begins at {FP8_KEYS} tokens" if keys < FP8_KEYS else None
    return f"ends at {INT8_KEYS} tokens" if max(queries, keys) > INT8_KEYS else None


def _name(node: ir.Node) -> str:
    """Return a node's name, or that of its first result, which every node has."""
    return node.name or node.outputs[0].name or node.op_type
