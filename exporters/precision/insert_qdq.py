"""Insert Q/DQ pairs at chosen sites: symmetric INT8 or FP8, as TensorRT reads it.

Before -> after::

    MatMul(x, W: f32)  ->  MatMul(DQ(Q(x, s), s), DQ(W: int8, t))      s: one scale, t: one an output channel

Products that are to be one kernel have weights of one scale, which the kernel multiplies by as it ends: `Site.alike`.

Every zero point is a zero that is written out, so that all runtimes agree. A value has one pair, shared by all that
read it in 8 bits; what reads it in high precision reads the value itself.

Source: onnx-tensorrt, QuantDequantLinearHelper; TensorRT, "Working with quantized types".
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir

from deploycli.exporters.graph.builder import initializer
from deploycli.exporters.graph.unique import Names, value_names
from deploycli.exporters.precision.dtypes import reduced
from deploycli.exporters.precision.number_format import INT8, NumberFormat
from deploycli.models.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    import numpy.typing as npt

    from deploycli.exporters.precision.placement import Site

    Array = npt.NDArray[Any]

OLDEST_OPSET = 19
"""From here on a scale may be FP16."""

_SMALLEST_FP16 = 2.0**-14
"""Smallest normal FP16 value: a smaller scale loses its bits, and at last becomes zero, which no parser takes."""

_WEIGHT = 1
"""Operand position of every weight."""


def insert(
    model: ir.Model,
    sites: Iterable[Site],
    ranges: Mapping[str, float],
    *,
    scale_type: ir.DataType,
    number_format: NumberFormat = INT8,
    float_weights: bool = False,
) -> None:
    """Insert the pairs in place.

    Args:
        model: the FP32 graph in which the sites were found.
        sites: which operands of which operators.
        ranges: value name -> largest magnitude, for every activation whose range is not known.
        scale_type: scales are numbers of this type; they stand as FP32 until the graph is cast.
        number_format: what is quantised to.
        float_weights: keep weights FP32, with Q and DQ; otherwise store them in 8 bits with DQ.

    Raises:
        UsageError: an opset below 19.
    """
    check_opset(model)
    inserter = Inserter(model.graph, scale_type, number_format, float_weights=float_weights)
    for site in sites:
        for position, _value, quantized in inserter.operands(site, ranges):
            site.node.replace_input_with(position, quantized)
    inserter.drop_unused()


def check_opset(model: ir.Model) -> None:
    """Refuse a graph whose operator set has no Q/DQ with FP16 scales.

    Raises:
        UsageError: an opset below 19.
    """
    opset = model.opset_imports.get("", 0)
    if opset < OLDEST_OPSET:
        raise UsageError(
            f"the graph is of opset {opset}",
            expected=f"opset {OLDEST_OPSET} or later, where Q/DQ takes FP16 scales",
            hint="deploycli export MODEL --opset 20",
        )


def scales(amax: Array, scale_type: ir.DataType, number_format: NumberFormat = INT8) -> npt.NDArray[np.float32]:
    """Return the scales of ranges: numbers of the scale type, no smaller than what reaches the ends of the range.

    Args:
        amax: largest magnitudes, any shape, finite, not negative.
        scale_type: FP32, FP16 or BF16. In FP16 a scale is at least the smallest normal number.
        number_format: what is quantised to.
    """
    smallest = _SMALLEST_FP16 if scale_type == ir.DataType.FLOAT16 else np.finfo(np.float32).tiny
    wanted = np.maximum(np.asarray(amax, np.float64) / number_format.largest, smallest)
    near = wanted.astype(scale_type.numpy())
    above = np.nextafter(near, np.asarray(np.inf, near.dtype))
    result: npt.NDArray[np.float32] = np.where(near.astype(np.float64) < wanted, above, near).astype(np.float32)
    return result


class Inserter:
    """Makes pairs, each value's once.

    Args:
        graph: gets the new nodes and constants.
        scale_type: scales are numbers of this type.
        number_format: what is quantised to.
        float_weights: keep weights FP32, with Q and DQ.
    """

    def __init__(
        self,
        graph: ir.Graph,
        scale_type: ir.DataType,
        number_format: NumberFormat = INT8,
        *,
        float_weights: bool = False,
    ) -> None:
        self._graph = graph
        self._scale_type = scale_type
        self._format = number_format
        self._float_weights = float_weights
        self._names = Names(value_names(graph))
        self._node_names = Names(node.name for node in graph if node.name)
        self._pairs: dict[tuple[ir.Value, float], ir.Value] = {}
        self._weights: dict[tuple[ir.Value, int | None, tuple[ir.Value, ...]], ir.Value] = {}
        self._steps: dict[tuple[ir.Value, ...], tuple[ir.Value, ir.Value]] = {}

    def operands(self, site: Site, ranges: Mapping[str, float]) -> Iterator[tuple[int, ir.Value, ir.Value]]:
        """Yield position, value and quantised value of the operands of a site; the caller puts them in place.

        Sites must come in the order of the graph: the pair of a shared weight stands before its first reader.
        """
        for i in site.activations:
            value = _operand(site.node, i)
            amax = site.known[i] if i in site.known else ranges[value.name or ""]
            yield i, value, self._activation(value, amax)
        if site.axis is not None:
            value = _operand(site.node, _WEIGHT)
            axis = None if site.alike else site.axis
            yield _WEIGHT, value, self._weight(value, axis, site.alike, site.node)

    def drop_unused(self) -> None:
        """Remove the FP32 weights that nothing reads any more."""
        for value in dict.fromkeys(value for value, *_ in self._weights):
            if not value.uses() and not value.is_graph_output():
                del self._graph.initializers[value.name or ""]

    def _activation(self, value: ir.Value, amax: float) -> ir.Value:
        """Return a value after its pair, which stands right behind the operator that makes it."""
        found = self._pairs.get((value, amax))
        if found is None:
            parameters = self._parameters(value, self._scales(np.array(amax)))
            producer = value.producer()
            quantize = self._node("QuantizeLinear", [value, *parameters], self._format.dtype, producer)
            dequantize = self._node("DequantizeLinear", [quantize.outputs[0], *parameters], ir.DataType.FLOAT, producer)
            if producer is None:
                self._graph.insert_before(self._graph[0], [quantize, dequantize])
            else:
                self._graph.insert_after(producer, [quantize, dequantize])
            found = self._pairs[value, amax] = dequantize.outputs[0]
        return found

    def _weight(self, value: ir.Value, axis: int | None, alike: tuple[ir.Value, ...], reader: ir.Node) -> ir.Value:
        """Return a weight as its reader gets it: rounded, with a scale for each output channel or one for ``alike``."""
        found = self._weights.get((value, axis, alike))
        if found is None:
            array = self._held(value)
            parameters = self._shared(alike) if axis is None else self._parameters(value, self._channels(array, axis))
            if self._float_weights:
                quantize = self._node("QuantizeLinear", [value, *parameters], self._format.dtype, reader, axis=axis)
                self._graph.insert_before(reader, quantize)
                stored = quantize.outputs[0]
            else:
                assert parameters[0].const_value is not None, "a scale is a constant"
                steps = parameters[0].const_value.numpy()
                if axis is not None:
                    steps = np.expand_dims(steps, _others(array, axis))
                stored = self._constant(f"{value.name}.{self._format.name}", self._format.round(array / steps))
            dequantize = self._node("DequantizeLinear", [stored, *parameters], ir.DataType.FLOAT, reader, axis=axis)
            self._graph.insert_before(reader, dequantize)
            found = self._weights[value, axis, alike] = dequantize.outputs[0]
        return found

    def _held(self, value: ir.Value) -> Array:
        assert value.const_value is not None, "sites name constant weights"
        return _held_as(self._scale_type, value.const_value.numpy())

    def _channels(self, array: Array, axis: int) -> Array:
        """Return a scale for each output channel of a weight."""
        return self._scales(np.abs(array).max(axis=_others(array, axis)))

    def _shared(self, alike: tuple[ir.Value, ...]) -> tuple[ir.Value, ir.Value]:
        """Return scale and zero point of weights that have one scale."""
        if alike not in self._steps:
            amax = max(float(np.abs(self._held(value)).max(initial=0.0)) for value in alike)
            self._steps[alike] = self._parameters(alike[0], self._scales(np.array(amax)))
        return self._steps[alike]

    def _scales(self, amax: Array) -> npt.NDArray[np.float32]:
        return scales(amax, self._scale_type, self._format)

    def _parameters(self, value: ir.Value, steps: Array) -> tuple[ir.Value, ir.Value]:
        """Return scale and zero point, the latter as many zeros."""
        scale = self._constant(f"{value.name}.scale", steps)
        return scale, self._constant(f"{value.name}.zero_point", np.zeros(steps.shape, self._format.dtype.numpy()))

    def _constant(self, wish: str, array: Array) -> ir.Value:
        name = self._names.unique(wish)
        value = initializer(name, ir.tensor(array, name=name))
        self._graph.register_initializer(value)
        return value

    def _node(
        self,
        op_type: str,
        inputs: list[ir.Value],
        dtype: ir.DataType,
        neighbour: ir.Node | None,
        axis: int | None = None,
    ) -> ir.Node:
        """Return a new node, called after the module of a neighbour."""
        module = ((None if neighbour is None else neighbour.name) or "").rpartition("/")[0]
        name = self._node_names.unique(f"{module}/{op_type}" if module else op_type)
        node = ir.node(op_type, inputs, {} if axis is None else {"axis": axis}, name=name)
        output = node.outputs[0]
        output.name, output.dtype, output.shape = self._names.unique(name), dtype, inputs[0].shape
        return node


def _operand(node: ir.Node, position: int) -> ir.Value:
    value = node.inputs[position]
    assert value is not None, "sites name operands that exist"
    return value


def _others(array: Array, axis: int) -> tuple[int, ...]:
    return tuple(i for i in range(array.ndim) if i != axis)


def _held_as(dtype: ir.DataType, array: Array) -> Array:
    """Round a weight as a graph of this type would hold it, so that it matters not which of the two is stored.

    What the type cannot hold stays as it is.
    """
    if dtype == ir.DataType.FLOAT:
        return array
    rounded = reduced(array, dtype).astype(np.float32)
    return np.where(np.isfinite(rounded), rounded, array)
