"""What NVIDIA's compiler will make of a graph: a prediction of its kernels, without the compiler.

TensorRT turns a graph into far fewer kernels than it has operators, and what costs time between two products is what a
kernel writes and the next one reads. Both are predicted here by the compiler's own rules, as far as they show in the
lists of layers that TensorRT for RTX 1.7 prints (`tests/benchmarks/kernel_costs.py` compares the two):

- A product by a constant, a convolution and an attention are kernels of their own: the *anchors*.
- A product adds its bias, applies an activation and adds a residual while it writes its result; not if the result has
  more than three axes, if its operands are quantized, or if one normalisation alone reads what comes out, which adds
  them itself. It adds no residual that would have to be moved or rounded for it.
- Products of one operand, by constants of one shape and with nothing to add, are one kernel.
- An attention is one kernel from queries by keys to probabilities by values. It reads an operand in place if a product
  that adds nothing made it, and only heads are split off behind it; whatever else is copied, by one kernel for all that
  is cut from one value.
- All else is generated: one kernel for whatever is connected and between the same anchors. A normalisation that
  movement follows is two of them, with numbers of 32 bits between; a reduction over many axes ends a kernel.
- What is moved for a later kernel alone is moved by that kernel.

A graph whose numbers have 32 bits is predicted as what its cast to 16 bits becomes.
"""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, TypeAlias

import onnx_ir as ir

from deploycli.exporters.graph.attention import find_attention
from deploycli.exporters.graph.lowerings import LAUNCH
from deploycli.exporters.graph.operators import (
    COPIES,
    ELEMENTWISE,
    QDQ,
    REDUCTIONS,
    SOFTMAX,
    TRAILING_NORMALIZATIONS,
    VIEWS,
    is_onnx,
)
from deploycli.exporters.graph.shapes import elements, item_bytes
from deploycli.exporters.graph.steps import KernelFigures

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Iterator

    from deploycli.exporters.graph.analysis import Analysis
    from deploycli.exporters.graph.attention import Attention
    from deploycli.exporters.graph.shapes import Dims

Kind: TypeAlias = Literal["attention", "convolution", "generated", "pooling", "product"]

_WIDE, _HALF = 4, 2
"""Bytes of a number of 32 and of 16 bits."""

_STEPS = 24
"""So many operators may stand between a Softmax and the products around it."""

_PRODUCT_AXES = 3
"""A product whose result has more axes adds nothing to it."""

_HEADS = (9, 256)
"""Heads of fewer or more channels have no kernel that does all of an attention."""

_IMAGE_CHANNELS = 4
"""A convolution of fewer channels reads them padded to so many."""

_CHANNELS_FIRST = (0, 3, 1, 2)
"""The permutation that a convolution reads through."""

_FP8 = (ir.DataType.FLOAT8E4M3FN, ir.DataType.FLOAT8E5M2)

_REDUCED = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)


@dataclass(frozen=True)
class Kernel:
    """A kernel that the compiler will make.

    Attributes:
        kind: what is in it.
        nodes: its operators, in the order of the data.
        moved: bytes of activations that it reads and writes for one sample.
    """

    kind: Kind
    nodes: tuple[ir.Node, ...]
    moved: float


@dataclass(frozen=True)
class KernelCost:
    """The kernels of a graph.

    Attributes:
        kernels: all of them.
    """

    kernels: tuple[Kernel, ...]

    @property
    def figures(self) -> KernelFigures:
        """Their sums."""
        return KernelFigures(
            launches=len(self.kernels),
            moved_bytes=math.ceil(sum(sorted(kernel.moved for kernel in self.kernels))),
            attentions=sum(kernel.kind == "attention" for kernel in self.kernels),
        )


_IMAGES = 8
"""A launch is weighed against what it takes to work on so many images, as they are run at once."""

PRODUCTS_PER_BYTE = 100
"""Multiply-adds in 16 bits that take a GPU the time of moving one byte.

By their data sheets it is 78 for an A100, 82 for an RTX 4090, 103 for an H100 and an H200, 200 for an L4.
"""


def run_cost(figures: KernelFigures, multiply_adds: int | None) -> float:
    """Return the time that a run of some images takes on a GPU, as the bytes that it could move meanwhile.

    Launches, bytes and products are added. Within a kernel the GPU multiplies while it moves, so that the sum is more
    than the time; but forms are compared by their difference, and what is saved of either is saved wherever it is what
    the kernel waits for. One that multiplies less and launches more is worth it for large models only.

    Args:
        figures: the kernels.
        multiply_adds: of one sample; None where they are not known, and taken for none.
    """
    return figures.launches * LAUNCH + _IMAGES * (figures.moved_bytes + (multiply_adds or 0) / PRODUCTS_PER_BYTE)


def predict(graph: ir.Graph, analysis: Analysis) -> KernelCost:
    """Predict the kernels of a graph.

    Args:
        graph: the main graph of a model, in order.
        analysis: what is known of its values; one of unknown shape counts nothing.
    """
    units = _Units(graph, analysis)
    _Anchors(units).set()
    return KernelCost(tuple(_Generated(units).kernels()))


# --- operators as the compiler sees them -----------------------------------------------------------------------------

_Key: TypeAlias = "ir.Value | tuple[str, ir.Node]"
"""A value, seen through views; or one that the compiler adds."""


@dataclass(eq=False, slots=True)
class _Unit:
    """An operator, or half of one: it reads values and makes some.

    Attributes:
        node: the operator.
        reads: activations that it reads, each once.
        makes: what it makes.
        anchor: the kernel of its own that it belongs to; None where its kernel is generated.
        stage: how many kernels must have run before.
    """

    node: ir.Node
    reads: list[_Key]
    makes: list[_Key]
    anchor: _Anchor | None = None
    stage: int = 0

    @property
    def is_copy(self) -> bool:
        """Whether it moves data and computes nothing."""
        return is_onnx(self.node) and self.node.op_type in COPIES

    @property
    def is_norm(self) -> bool:
        """Whether it normalises rows."""
        return is_onnx(self.node) and self.node.op_type in TRAILING_NORMALIZATIONS


@dataclass(eq=False, slots=True)
class _Anchor:
    """A kernel of its own."""

    kind: Kind
    units: list[_Unit] = field(default_factory=list)


class _Units:
    """The operators of a graph that work on activations, without views, and who reads what."""

    def __init__(self, graph: ir.Graph, analysis: Analysis) -> None:
        self.analysis = analysis
        self.units: dict[_Unit, None] = {}
        self.of: dict[ir.Node, _Unit] = {}
        self.maker: dict[_Key, _Unit] = {}
        self.readers: dict[_Key, list[_Unit]] = defaultdict(list)
        self.sizes: dict[_Key, float] = {}
        self.is_reduced = any(value.dtype in _REDUCED for value in graph.initializers.values())
        self._root: dict[ir.Value, ir.Value] = {}
        self._computed: set[ir.Value] = set()
        self._take_in(graph)
        self.outputs: set[_Key] = {self._root.get(value, value) for value in graph.outputs}

    def _take_in(self, graph: ir.Graph) -> None:
        for node in graph:
            if self._is_unfolded(node):
                self._computed.update(node.outputs)
        needed, live = set(graph.outputs), list[ir.Node]()
        for node in reversed(graph):
            if any(output in needed and not self.is_constant(output) for output in node.outputs):
                live.append(node)
                needed.update(value for value in node.inputs if value is not None)
        for node in reversed(live):
            reads = list(dict.fromkeys(self._activations(node)))
            if reads and self._is_view(node):
                self._root.update((output, reads[0]) for output in node.outputs)
            elif reads or node.outputs[0] in self._computed:
                self.of[node] = self.add(_Unit(node, [*reads], [output for output in node.outputs if output in needed]))

    def _is_unfolded(self, node: ir.Node) -> bool:
        """Say whether a node looks up or multiplies constants, which no compiler does ahead, or goes on with that."""
        fact = self.analysis[node.outputs[0]]
        if fact is None or fact.extremes is None or not fact.dtype.is_floating_point() or not fact.dims:
            return False
        begins = is_onnx(node, "MatMul", "Gemm", "GatherND", "Gather") and len(fact.dims) > 1
        return begins or any(value in self._computed for value in node.inputs)

    def add(self, unit: _Unit) -> _Unit:
        """Add a unit."""
        self.units[unit] = None
        for key in unit.makes:
            self.maker[key] = unit
        for key in unit.reads:
            self.readers[key].append(unit)
        return unit

    def insert(self, unit: _Unit, key: _Key, new: tuple[str, ir.Node], size: float) -> None:
        """Let a unit read a value that another one makes of what it has read."""
        self.sizes[new] = size
        self.readers[key].remove(unit)
        unit.reads = [new if read is key else read for read in unit.reads]
        self.readers[new].append(unit)
        self.add(_Unit(new[1], [key], [new]))

    def see_through(self, unit: _Unit) -> None:
        """Take a movement of one value for a view."""
        (source,) = unit.reads
        del self.units[unit]
        self.readers[source].remove(unit)
        for made in unit.makes:
            for reader in self.readers.pop(made, []):
                reader.reads = list(dict.fromkeys(source if read is made else read for read in reader.reads))
                if reader not in self.readers[source]:
                    self.readers[source].append(reader)
            if made in self.outputs:
                self.outputs.add(source)

    def is_constant(self, value: ir.Value | None) -> bool:
        """Say whether a value is stored, or follows from what is stored and from shapes; also if it is dequantized."""
        if value is None or value in self._computed:
            return value is None
        fact = self.analysis[value]
        if (fact is not None and fact.extremes is not None) or value.is_initializer():
            return True
        node = value.producer()
        return node is not None and is_onnx(node, "DequantizeLinear") and self.is_constant(node.inputs[0])

    def _activations(self, node: ir.Node) -> Iterator[ir.Value]:
        for value in node.inputs:
            if value is not None and not self.is_constant(value):
                yield self._root.get(value, value)

    def _is_view(self, node: ir.Node) -> bool:
        if not is_onnx(node):
            return False
        dims = self.dims(node.inputs[0])
        if node.op_type == "Transpose" and dims is not None:
            order = node.attributes.get_ints("perm", None) or range(len(dims))[::-1]
            moved = [axis for axis in order if dims[axis] != 1]
            return moved == sorted(moved)
        if node.op_type == "DequantizeLinear":  # products read what is quantized
            return all(is_onnx(reader, "MatMul", "Gemm", "Conv") for reader in _readers(node.outputs[0]))
        if node.op_type == "Gather" and dims:
            return dims[node.attributes.get_int("axis", 0)] == 1
        return node.op_type in VIEWS or (node.op_type in ("Expand", "Slice") and dims == self.dims(node.outputs[0]))

    def dims(self, value: _Key | None) -> Dims | None:
        """Return the shape of a value."""
        return None if value is None or isinstance(value, tuple) else self.analysis.dims(value)

    def size(self, key: _Key) -> float:
        """Return the bytes of a value for one sample."""
        if key not in self.sizes:
            assert not isinstance(key, tuple), "what the compiler adds has its size"
            fact = self.analysis[key]
            item = 0.0 if fact is None else item_bytes(fact.dtype)
            is_at_border = key in self.outputs or key.producer() is None
            if fact is not None and fact.dtype == ir.DataType.FLOAT and not (self.is_reduced or is_at_border):
                item = _WIDE if self.stays_wide(key) else _HALF
            dims = self.dims(key)
            self.sizes[key] = 0 if dims is None else elements(dims) * item
        return self.sizes[key]

    def stays_wide(self, key: _Key) -> bool:
        """Say whether a value keeps 32 bits: one that is normalised, and at once again for another layout."""
        maker = self.maker.get(key)
        if maker is None or not maker.is_norm or self.is_reduced:
            return False
        again = (reader for reader in self.readers[key] if reader.is_norm)
        return any(reader.is_copy and reader.anchor is None for norm in again for reader in self.readers[norm.makes[0]])


def _readers(value: ir.Value) -> Iterator[ir.Node]:
    """Yield what reads a value, seen through views."""
    waiting = list(value.consumers())
    while waiting:
        node = waiting.pop()
        if node.op_type in VIEWS:
            waiting += node.outputs[0].consumers()
        else:
            yield node


# --- kernels of their own --------------------------------------------------------------------------------------------


class _Anchors:
    """Finds products, convolutions and attentions, and what else they do."""

    def __init__(self, units: _Units) -> None:
        self._units = units
        self._places = {unit: i for i, unit in enumerate(units.units)}
        self._padded: dict[_Key, tuple[str, ir.Node]] = {}

    def set(self) -> None:
        """Give every unit of such a kernel its anchor."""
        for unit in list(self._units.units):
            if is_onnx(unit.node, *SOFTMAX):
                self._set_attention(unit)
            elif is_onnx(unit.node, "Attention"):
                self._anchor("attention", [unit])
        for unit in self._of("AveragePool", "MaxPool"):
            self._anchor("pooling", [unit])
        convolutions = self._of("Conv", "ConvTranspose")
        products = self._of("MatMul", "Gemm", "Einsum")
        for unit in (*convolutions, *products):
            self._anchor("convolution" if unit in convolutions else "product", [unit])
        for unit in (*products, *(unit for unit in self._units.units if _is(unit, "attention"))):
            self._round_inputs(unit)
        for unit in convolutions:
            self._read_image(unit)
            self._absorb(unit)
        for unit in products:
            if self._adds(unit):
                self._absorb(unit)
        self._merge(products)
        for unit in list(self._units.units):
            if unit.anchor is not None and unit.anchor.kind == "attention":
                self._read_in_place(unit)

    def _of(self, *op_types: str) -> dict[_Unit, None]:
        found = (unit for unit in self._units.units if unit.anchor is None and is_onnx(unit.node, *op_types))
        return dict.fromkeys(found)

    def _anchor(self, kind: Kind, units: list[_Unit]) -> None:
        anchor = _Anchor(kind, units)
        for unit in units:
            unit.anchor = anchor

    # --- attention ---

    def _set_attention(self, softmax: _Unit) -> None:
        found = find_attention(softmax.node, _leads, self._multiplies_activations, _STEPS)
        units = None if found is None or not self._has_kernel(found) else self._closed(found)
        if units is None or any(unit.anchor is not None for unit in units):
            return
        last = self._units.of[found.mix] if found is not None else softmax
        inner = {key for unit in units if unit is not last for key in unit.makes}
        if not any(key in self._units.outputs or self._leaves(key, units) for key in inner):
            self._anchor("attention", list(units))

    def _closed(self, attention: Attention) -> dict[_Unit, None] | None:
        """Return the units of an attention with all that stands between them; None where something else does."""
        steps = (step.node for step in (*attention.before, *attention.after))
        nodes = (attention.scores, *steps, attention.softmax, attention.mix)
        units = {self._units.of[node]: None for node in nodes if node in self._units.of}
        first, waiting = self._units.of[attention.scores], list(units)
        while waiting:
            unit = waiting.pop()
            if unit is first:
                continue
            for key in unit.reads:
                maker = self._units.maker.get(key)
                if maker is not None and maker not in units and self._follows(key, first):
                    if not is_onnx(maker.node) or maker.node.op_type not in ELEMENTWISE:
                        return None
                    units[maker] = None
                    waiting.append(maker)
        return units

    def _has_kernel(self, attention: Attention) -> bool:
        dims = self._units.dims(attention.scores.inputs[0])
        added = [value for step in attention.before for value in step.node.inputs if self._units.is_constant(value)]
        return (dims is None or _HEADS[0] <= dims[-1] <= _HEADS[1]) and not any(map(_is_turned, added))

    def _leaves(self, key: _Key, inside: Collection[_Unit]) -> bool:
        return any(reader not in inside for reader in self._units.readers[key])

    def _multiplies_activations(self, node: ir.Node) -> bool:
        return node in self._units.of and is_onnx(node, "MatMul") and not any(map(self._units.is_constant, node.inputs))

    def _follows(self, key: _Key, unit: _Unit) -> bool:
        """Say whether a value is made of what a unit makes."""
        waiting, seen = [key], set[_Unit]()
        while waiting:
            maker = self._units.maker.get(waiting.pop())
            if maker is unit:
                return True
            if maker is not None and maker not in seen and self._places.get(maker, 0) > self._places[unit]:
                seen.add(maker)
                waiting += maker.reads
        return False

    def _read_in_place(self, unit: _Unit) -> None:
        """Let an attention read where products wrote, and products read where an attention wrote."""
        if unit.node.op_type not in ("MatMul", "Attention"):
            return
        is_row = self._is_one_query(unit)
        for key in list(unit.reads):
            for move in self._moves_above(key, unit, "Transpose", *(("Split", "Slice", "Gather") if is_row else ())):
                self._units.see_through(move)
        made = unit.makes[0]
        for move in list(self._units.readers[made]):
            behind = [reader for key in move.makes for reader in self._units.readers[key]]
            is_read = all(_is(reader, "product") or self._makes_fp8(reader) for reader in behind)
            if move.node.op_type == "Transpose" and is_read and behind:
                self._units.see_through(move)
        behind = self._units.readers[made]
        if len(behind) == 1 and self._makes_fp8(behind[0]) and unit.anchor is not None:
            behind[0].anchor = unit.anchor
            unit.anchor.units.append(behind[0])

    def _makes_fp8(self, unit: _Unit) -> bool:
        """Say whether a unit quantizes to a type that any kernel can write."""
        fact = None if isinstance(unit.makes[0], tuple) else self._units.analysis[unit.makes[0]]
        return is_onnx(unit.node, "QuantizeLinear") and fact is not None and fact.dtype in _FP8

    def _is_one_query(self, unit: _Unit) -> bool:
        dims = self._units.dims(unit.node.outputs[0])
        return dims is not None and len(dims) > 1 and 1 in dims[-2:]

    def _moves_above(self, key: _Key, reader: _Unit, *op_types: str) -> list[_Unit]:
        """Return the movements between a product that adds nothing and an operand of an attention."""
        moves: list[_Unit] = []
        maker = self._units.maker.get(key)
        while maker is not None and maker.anchor is None and is_onnx(maker.node, *op_types) and maker.reads:
            if any(other.anchor is not reader.anchor and other not in moves for made in maker.makes for other in
                   self._units.readers[made] if not other.is_copy):  # fmt: skip
                return []
            moves.append(maker)
            maker = self._units.maker.get(maker.reads[0])
        return moves if maker is not None and _is(maker, "product") and self._is_plain(maker) else []

    # --- products and convolutions ---

    def _read_image(self, unit: _Unit) -> None:
        """Let a convolution read images in 16 bits and padded, and channels where they are."""
        image = unit.node.inputs[0]
        dims = self._units.dims(image)
        if image is None or dims is None or not unit.reads:
            return
        if dims[1] < _IMAGE_CHANNELS:
            self._pad(unit, unit.reads[0], elements((dims[0], _IMAGE_CHANNELS, *dims[2:])) * _HALF)
            return
        maker = self._units.maker.get(image)
        if maker is None or maker.node.op_type != "Transpose" or len(self._units.readers[image]) > 1:
            return
        if tuple(maker.node.attributes.get_ints("perm", ())) == _CHANNELS_FIRST:
            self._units.see_through(maker)

    def _round_inputs(self, unit: _Unit) -> None:
        """Let a kernel round an input of the graph to 16 bits, if one that generates nothing reads it."""
        for key in list(unit.reads):
            fact = None if isinstance(key, tuple) or key.producer() is not None else self._units.analysis[key]
            if fact is not None and fact.dtype == ir.DataType.FLOAT and not self._units.is_reduced:
                self._pad(unit, key, self._units.size(key) * _HALF / _WIDE)

    def _pad(self, unit: _Unit, image: _Key, size: float) -> None:
        """Let a unit read an input as a kernel in front of it writes it; one does for all readers."""
        if image not in self._padded:
            self._padded[image] = ("padded", unit.node)
            self._units.insert(unit, image, self._padded[image], size)
            return
        self._units.readers[image].remove(unit)
        unit.reads = [self._padded[image] if read is image else read for read in unit.reads]
        self._units.readers[self._padded[image]].append(unit)

    def _adds(self, unit: _Unit) -> bool:
        """Say whether a product adds something while it writes its result."""
        dims = self._units.dims(unit.node.outputs[0])
        if dims is None or len(dims) > _PRODUCT_AXES or len(unit.node.inputs) < 2:
            return False
        first, second = unit.node.inputs[:2]
        if self._units.is_constant(first) or any(map(_is_quantized, (first, second))):
            return False
        return self._units.is_constant(second)

    def _absorb(self, first: _Unit) -> None:
        """Let an anchor do what follows it number by number, up to where one value is left to be read."""
        assert first.anchor is not None
        inside: dict[_Unit, None] = {first: None}
        best: list[_Unit] = []
        waiting = list(first.makes)
        residual = None
        while waiting:
            for unit in self._units.readers[waiting.pop(0)]:
                other = self._residual_of(unit, inside)
                if unit in inside or not self._is_absorbed(unit, first) or (other is not None and residual is not None):
                    continue
                if other is not None and not self._may_be_added(other, unit, first):
                    continue
                residual = residual or other
                inside[unit] = None
                waiting += unit.makes
            ends = [key for unit in inside for key in unit.makes
                    if key in self._units.outputs or self._leaves(key, inside)]  # fmt: skip
            if len(ends) == 1:
                best = list(inside)
                if ends[0] in self._units.outputs:
                    break
        if best and not self._is_normalised_at_once(best):
            self._anchor(first.anchor.kind, best)

    def _is_absorbed(self, unit: _Unit, first: _Unit) -> bool:
        if unit.anchor is not None or not is_onnx(unit.node):
            return False
        if unit.node.op_type not in (*ELEMENTWISE, "BatchNormalization") and not self._makes_fp8(unit):
            return False
        return self._units.dims(unit.makes[0]) == self._units.dims(first.makes[0])

    def _residual_of(self, unit: _Unit, inside: Collection[_Unit]) -> _Key | None:
        return next((key for key in unit.reads if self._units.maker.get(key) not in inside), None)

    def _may_be_added(self, key: _Key, unit: _Unit, first: _Unit) -> bool:
        """Say whether a residual is there, as the kernel can read it, when the anchor has computed the rest."""
        if unit.node.op_type != "Add" or len(unit.reads) > 2:
            return False
        maker = self._units.maker.get(key)
        shapes = {self._units.dims(value) for value in unit.node.inputs}
        if len(shapes) > 1 or self._follows(key, first):
            return False
        is_moved = maker is not None and maker.is_copy and len(self._units.readers[key]) == 1
        return not is_moved and not self._units.stays_wide(key)

    def _is_normalised_at_once(self, best: list[_Unit]) -> bool:
        made = [key for unit in best for key in unit.makes]
        outside = {reader for key in made for reader in self._units.readers[key] if reader not in best}
        return len(outside) == 1 and outside.pop().is_norm and self._units.outputs.isdisjoint(made)

    def _merge(self, products: Iterable[_Unit]) -> None:
        """Make one kernel of the products that multiply one operand by constants of one shape."""
        alike: dict[object, _Unit] = {}
        for unit in products:
            if not unit.reads or not self._is_plain(unit):
                continue
            first = alike.setdefault((unit.reads[0], self._units.dims(unit.node.inputs[1])), unit)
            if first is not unit and first.anchor is not None:
                first.anchor.units.append(unit)
                unit.anchor = first.anchor

    def _is_plain(self, unit: _Unit) -> bool:
        """Say whether a unit is a product by a constant that adds nothing."""
        is_alone = unit.anchor is not None and all(other.node.op_type == "MatMul" for other in unit.anchor.units)
        return is_alone and is_onnx(unit.node, "MatMul") and self._units.is_constant(unit.node.inputs[1])


def _is(unit: _Unit, kind: Kind) -> bool:
    return unit.anchor is not None and unit.anchor.kind == kind


def _is_turned(value: ir.Value | None) -> bool:
    """Say whether a constant is transposed by the graph: few attentions read a bias so."""
    node = None if value is None else value.producer()
    while node is not None and node.op_type in VIEWS:
        value = node.inputs[0]
        node = None if value is None else value.producer()
    return node is not None and is_onnx(node, "Transpose")


def _is_quantized(value: ir.Value | None) -> bool:
    node = None if value is None else value.producer()
    while node is not None and node.op_type in VIEWS:
        value = node.inputs[0]
        node = None if value is None else value.producer()
    return node is not None and is_onnx(node, "DequantizeLinear")


def _leads(node: ir.Node) -> Iterable[int] | None:
    if not is_onnx(node):
        return None
    if node.op_type in VIEWS or node.op_type in ("Transpose", *QDQ, *SOFTMAX):
        return (0,)
    return range(len(node.inputs)) if node.op_type in ELEMENTWISE else None


# --- generated kernels -----------------------------------------------------------------------------------------------


class _Generated:
    """Gathers what is left into kernels, once all others are known."""

    def __init__(self, units: _Units) -> None:
        self._units = units

    def kernels(self) -> Iterator[Kernel]:
        """Yield all kernels, those of anchors too."""
        self._cut_projections()
        self._round_sums()
        self._number()
        self._split_norms()
        self._number()
        groups: dict[object, list[_Unit]] = defaultdict(list)
        top = self._connected()
        for unit in self._units.units:
            groups[unit.anchor or top(unit)].append(unit)
        for units in groups.values():
            kind: Kind = "generated" if units[0].anchor is None else units[0].anchor.kind
            yield Kernel(kind, tuple(dict.fromkeys(unit.node for unit in units)), self._moved(units))

    def _cut_projections(self) -> None:
        """Let queries, keys and values be added to by kernels of their own, if they are cut along the first axis."""
        for move in list(self._units.units):
            if move.anchor is not None or move.node.op_type != "Transpose":
                continue
            maker = self._units.maker.get(move.reads[0])
            pieces = self._units.readers[move.makes[0]]
            if maker is None or not _is(maker, "product") or len(pieces) < 2 or not all(map(self._is_piece, pieces)):
                continue
            for piece in pieces:
                key = ("piece", piece.node)
                self._units.sizes[key] = self._units.size(piece.makes[0])
                piece.reads = [key]
                maker.makes.append(key)
                self._units.maker[key] = maker
                self._units.readers[key] = [piece]
            is_plain = maker.anchor is not None and len(maker.anchor.units) == 1
            self._units.readers.pop(move.makes[0])
            self._units.readers[move.reads[0]].remove(move)
            del self._units.units[move]
            for unit in [*pieces, *(unit for piece in pieces for unit in self._units.readers[piece.makes[0]])]:
                if is_plain and unit.anchor is None and unit.node.op_type != "Mul":
                    self._units.see_through(unit)  # each is a product by a part of the weight

    def _is_piece(self, unit: _Unit) -> bool:
        dims, made = self._units.dims(unit.node.inputs[0]), self._units.dims(unit.makes[0])
        behind = self._units.readers[unit.makes[0]]
        if not is_onnx(unit.node, "Slice", "Gather") or dims is None or made is None or len(behind) != 1:
            return False
        if dims[1:] not in (made, made[1:]) or self._is_scaled(behind[0]):
            return False
        lasts = behind if behind[0].anchor is not None else self._units.readers[behind[0].makes[0]]
        return all(last.anchor is not None and last.anchor.kind != "convolution" for last in lasts)

    def _is_scaled(self, move: _Unit) -> bool:
        """Say whether a unit turns keys that were cut out as they are, and that are scaled behind it."""
        maker = self._units.maker.get(move.reads[0]) if move.reads else None
        return move.node.op_type == "Transpose" and maker is not None and maker.node.op_type == "Slice" and any(
            reader.anchor is None and is_onnx(reader.node, "Mul", "Div") and len(reader.reads) == 1
            for reader in self._units.readers[move.makes[0]]
        )  # fmt: skip

    def _round_sums(self) -> None:
        """Let a reduction that ends a kernel, and that a product reads, be rounded to 16 bits by one more."""
        for unit in list(self._units.units):
            if self._units.is_reduced or not self._ends(unit):
                continue
            made = unit.makes[0]
            size = self._units.size(made)
            for reader in [reader for reader in self._units.readers[made] if reader.anchor is not None]:
                self._units.insert(reader, made, ("rounded", unit.node), size)
                self._units.sizes[made] = size * _WIDE / _HALF

    def _ends(self, unit: _Unit) -> bool:
        """Say whether a kernel ends with a reduction: over more than the last axis."""
        if unit.anchor is not None or not is_onnx(unit.node, *REDUCTIONS, "GlobalAveragePool"):
            return False
        dims, made = (self._units.dims(value) for value in (unit.node.inputs[0], unit.makes[0]))
        return dims is not None and made is not None and dims[:-1] != made[: len(dims) - 1]

    # --- stages ---

    def _number(self) -> None:
        """Number the units: those of one generated kernel stand between the same others."""
        started, done = set[_Unit](), set[_Unit]()
        for unit in self._units.units:
            waiting = [] if unit in done else [unit]  # many products may be one kernel
            while waiting:
                last = waiting[-1]
                group = [last] if last.anchor is None else last.anchor.units
                makers = [maker for member in group for key in member.reads
                          if (maker := self._units.maker.get(key)) is not None and maker not in group]  # fmt: skip
                left = [] if last in started else [maker for maker in makers if maker not in started]
                started.update(group)
                if left:
                    waiting += left
                    continue
                waiting.pop()
                done.update(group)
                stage = max((maker.stage + self._step(maker, last) for maker in makers), default=0)
                for member in group:
                    member.stage = stage
        self._postpone()

    def _step(self, maker: _Unit, unit: _Unit) -> int:
        """Return 1 where two neighbours are in two kernels."""
        if maker.anchor is not None or unit.anchor is not None or maker.node is unit.node or self._ends(maker):
            return 1
        if is_onnx(unit.node, "Expand"):  # of what was summed up
            return int(not maker.is_copy)
        if (maker.is_copy and is_onnx(unit.node, *SOFTMAX)) or (unit.is_copy and is_onnx(maker.node, *SOFTMAX)):
            return 1
        return int(self._is_scaled(maker) or self._is_scaled(unit))

    def _postpone(self) -> None:
        """Let what is moved for later kernels alone be moved by them."""
        by_stage = sorted(self._units.units, key=lambda unit: unit.stage)
        for unit in reversed(by_stage):
            readers = [reader for key in unit.makes for reader in self._units.readers[key]]
            is_inner = unit.anchor is None and readers and self._units.outputs.isdisjoint(unit.makes)
            if not is_inner or not unit.is_copy or self._is_scaled(unit):
                continue
            if all(reader.anchor is None for reader in readers) and self._is_there(unit):
                unit.stage = min(reader.stage for reader in readers)

    def _is_there(self, unit: _Unit) -> bool:
        """Say whether what a unit reads is written in any case."""
        makers = (self._units.maker.get(key) for key in unit.reads)
        return all(maker is None or maker.anchor is not None or maker.stage < unit.stage for maker in makers)

    def _split_norms(self) -> None:
        for unit in list(self._units.units):
            if unit.is_norm and unit.anchor is None and self._is_moved_behind(unit):
                dims = self._units.dims(unit.node.inputs[0])
                size = 0 if dims is None else _WIDE * (elements(dims) + elements(dims[:-1]))
                self._units.insert(unit, unit.reads[0], ("half", unit.node), size)

    def _is_moved_behind(self, norm: _Unit) -> bool:
        """Say whether a kernel that normalises would have to move what comes out, or normalise it in other rows."""
        waiting, seen = [norm], set[_Unit]()
        while waiting:
            for key in waiting.pop().makes:
                for reader in self._units.readers[key]:
                    if reader.anchor is not None or reader.stage != norm.stage or reader in seen:
                        continue
                    if reader.is_copy or self._ends(reader) or (reader.is_norm and reader.node.inputs[0] is not key):
                        return True
                    if not reader.is_norm:
                        seen.add(reader)
                        waiting.append(reader)
        return False

    def _connected(self) -> Callable[[_Unit], _Unit]:
        """Return what says which unit stands for the kernel of another one."""
        above: dict[_Unit, _Unit] = {}

        def top(unit: _Unit) -> _Unit:
            while unit in above:
                unit = above[unit]
            return unit

        def join(first: _Unit, second: _Unit) -> None:
            first, second = top(first), top(second)
            if first is not second:
                above[first] = second

        cut: dict[object, _Unit] = {}
        for unit in self._units.units:
            if unit.anchor is not None:
                continue
            for key in unit.reads:
                maker = self._units.maker.get(key)
                if maker is not None and maker.anchor is None and maker.stage == unit.stage:
                    join(unit, maker)
            if unit.is_copy and unit.reads:
                join(unit, cut.setdefault((unit.node.inputs[0], unit.reads[0], unit.stage), unit))
        return top

    def _moved(self, units: list[_Unit]) -> float:
        inside = set(units)
        made = {key for unit in units for key in unit.makes}
        once: dict[object, _Key] = {}
        for unit in units:
            is_epilogue = unit.anchor is not None and unit is not unit.anchor.units[0] and unit.node.op_type == "Add"
            for key in unit.reads:
                if key not in made:
                    once[(key, unit if is_epilogue else None)] = key
        outputs = self._units.outputs
        written = [
            key for key in made if key in outputs or any(reader not in inside for reader in self._units.readers[key])
        ]
        return sum(sorted(self._units.size(key) for key in (*once.values(), *written)))
