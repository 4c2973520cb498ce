"""An engine beside the graph that it computes: the ONNX nodes and PyTorch module of each kernel, the bytes it moves.

An engine says of a dynamic axis only that it is one: rows of batch and tokens together are ``[-1, 96]``. How many there
are for one image is taken from the graph: what a kernel writes are those values of its nodes that others read. All
that is counted are activations; weights are left out, and caches are not known of, so the bytes are an upper bound.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from deploycli.exporters.bundle.engine import Kernel
from deploycli.exporters.graph.onnx_file import quiet, read
from deploycli.exporters.graph.products import COUNTED
from deploycli.exporters.lint.rules import DEFAULT_VERSION
from deploycli.exporters.lint.subject import Subject, inlined
from deploycli.exporters.lint.versions import parse_version
from deploycli.exporters.target.product import RTX
from deploycli.exporters.tensorrt.child import run_build
from deploycli.exporters.tensorrt.inspector import EngineLayers, parse_layers
from deploycli.models.errors import BuildError

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping, Sequence
    from pathlib import Path

    import onnx_ir as ir

    from deploycli.exporters.target.settings import BuildSettings, ShapeRange
    from deploycli.exporters.target.targets import Capability
    from deploycli.exporters.tensorrt.inspector import EngineTensor, Layer

_PROFILE = re.compile(r"_myl(\d+)_\d+\Z")
"""At the end of a layer's name: the number of the graph that it was compiled for."""

_OF_A_PROFILE = re.compile(r" \[profile \d+\]")

_BYTES: Mapping[str, float] = {
    **{"int4": 0.5, "fp4": 0.5, "int8": 1, "uint8": 1, "fp8": 1, "bool": 1},
    **{"fp16": 2, "bf16": 2, "fp32": 4, "int32": 4, "int64": 8},
}


@dataclass(frozen=True)
class Reading:
    """What is known of an engine once it is read beside its graph.

    Attributes:
        layers: of the engine; those are products, too, that alone hold one of the graph, whatever their kernel is.
        kernels: those that run one.
        missing: products of the graph that no layer names.
    """

    layers: EngineLayers
    kernels: tuple[Kernel, ...]
    missing: tuple[str, ...]


def read_engine(onnx: Path, parts: Iterable[tuple[EngineLayers, int | None]]) -> list[Reading]:
    """Read an engine beside the graph that it was built from.

    Args:
        onnx: the graph.
        parts: of every optimization profile, or of the whole engine where they are not told apart: the layers in the
            order of execution, and the one batch that it takes, or None where it takes several.

    Returns:
        One reading a part.
    """
    with quiet():
        graph = _Graph(Subject(inlined(read(onnx)[0]), parse_version(DEFAULT_VERSION)))
        return [_read(layers, graph, batch) for layers, batch in parts]


def _read(layers: EngineLayers, graph: _Graph, batch: int | None) -> Reading:
    sizes = _Sizes(graph, batch or 1)
    open_ = graph.products - {node for layer in layers.layers if layer.product for node in layer.nodes}
    # A product of few channels is multiplied and added up by a generated kernel, which is not called one.
    known = EngineLayers(
        tuple(
            replace(layer, product=layer.product or (layer.launches and not open_.isdisjoint(layer.nodes)))
            for layer in layers.layers
        )
    )
    kernels = tuple(_kernel(layer, graph, sizes) for layer in known.launched)
    named = {node for layer in known.layers for node in layer.nodes}
    return Reading(known, kernels, tuple(sorted(open_ - named)))


def compiled(
    onnx: Path, settings: BuildSettings, folder: Path, targets: tuple[Capability, ...], timeout: float | None = None
) -> Reading:
    """Compile a graph with TensorRT for RTX, for shapes of one profile, and read what it makes of it.

    Args:
        onnx: the graph; nodes without names cannot be told apart.
        settings: the shapes.
        folder: where the build is left.
        targets: compute capabilities to compile for.
        timeout: seconds, or None for as long as it takes.

    Raises:
        BuildError, EnvironmentUnsuitable: see `run_build`; also where the compiler lists no layers.
    """
    result = run_build(onnx, settings, folder, compiler=RTX.key, targets=targets, timeout=timeout)
    if result.layers is None:
        raise BuildError("the compiler lists no layers", expected="a version of TensorRT for RTX that lists them")
    (profile,) = settings.profiles
    (reading,) = read_engine(onnx, [(parse_layers(result.layers.read_text("utf-8")), one_batch(profile))])
    return reading


def one_batch(profile: Mapping[str, ShapeRange]) -> int | None:
    """Return the batch of an engine that takes only one."""
    sizes = {shape[0] for shapes in profile.values() for shape in (shapes.min, shapes.max)}
    return sizes.pop() if len(sizes) == 1 else None


def by_profile(layers: EngineLayers, profiles: int) -> tuple[EngineLayers, ...]:
    """Return the layers of every optimization profile: TensorRT for RTX compiles each by itself, and numbers them."""
    if profiles == 1:
        return (layers,)
    groups: list[list[Layer]] = [[] for _ in range(profiles)]
    for layer in layers.layers:
        found = _PROFILE.search(layer.name)
        place = int(found[1]) if found else profiles
        if place >= profiles:  # of another version: which is whose is not known
            return (layers,)
        groups[place].append(layer)
    return tuple(EngineLayers(tuple(group)) for group in groups)


def _kernel(layer: Layer, graph: _Graph, sizes: _Sizes) -> Kernel:
    nodes = graph.in_order(layer.nodes)
    products = [node for node in nodes if node in graph.products]
    home = products[:1] if layer.product and products else nodes[-1:]
    return Kernel(
        layer.name,
        layer.kind,
        layer.precision,
        layer.product,
        layer.fused_attention,
        tuple(map(str, layer.reads)),
        tuple(map(str, layer.writes)),
        nodes,
        module_of(home[0]) if home else "",
        sizes.moved(layer),
    )


class _Graph:
    """What is asked of the graph that an engine was built from."""

    def __init__(self, subject: Subject) -> None:
        self._subject = subject
        self._nodes = {node.name: node for node in subject.nodes if node.name}
        self._place = {name: place for place, name in enumerate(self._nodes)}
        self.products = {
            name
            for name, node in self._nodes.items()
            if node.op_type in COUNTED and any(not self._is_constant(value) for value in node.inputs)
        }
        inputs = [value for value in subject.graph.inputs if value.const_value is None]
        first = inputs[0].shape[0] if inputs and inputs[0].shape is not None and len(inputs[0].shape) else 1
        self._batch = first if isinstance(first, int) else 1
        self.io = {value.name or "": self._elements(value) for value in (*inputs, *subject.graph.outputs)}

    def in_order(self, names: Iterable[str]) -> tuple[str, ...]:
        """Return nodes in the order of the graph; what the graph does not have comes first."""
        return tuple(sorted(names, key=lambda name: self._place.get(name, -1)))

    def written(self, names: Collection[str]) -> list[int]:
        """Return the elements, for one image, of every value that these nodes make and others read."""
        chosen = {name for name in names if name in self._nodes}
        outputs = set(self._subject.graph.outputs)
        values = [
            value
            for name in chosen
            for value in self._nodes[name].outputs
            if value in outputs or any(use.node.name not in chosen for use in value.uses())
        ]
        return [elements for value in values if (elements := self._elements(value)) is not None]

    def _elements(self, value: ir.Value) -> int | None:
        ends = self._subject.inference[value].extremes
        if ends is None:
            return None
        return math.prod(ends[0]) // self._batch  # ends[0]: at batch 1, where the graph takes any

    def _is_constant(self, value: ir.Value | None) -> bool:
        return value is None or self._subject.stored(value) is not None


class _Sizes:
    """Elements of every tensor of an engine for one image, known as the layers are gone through in their order."""

    def __init__(self, graph: _Graph, batch: int) -> None:
        self._graph = graph
        self._batch = batch
        self._elements: dict[str, int] = {name: size for name, size in graph.io.items() if size is not None}
        self._merged: dict[str, int] = {}
        """How many products of one value stand one after the other in a tensor, of which readers take one each."""

    def moved(self, layer: Layer) -> int | None:
        """Return the bytes that a layer reads and writes for one image, or None where they do not follow."""
        candidates = self._graph.written(layer.nodes)
        for tensor in sorted(layer.writes, key=lambda tensor: (_row(tensor), len(tensor.shape)), reverse=True):
            if _key(tensor) not in self._elements and (size := self._written(tensor, candidates, layer)) is not None:
                self._elements[_key(tensor)] = size
                if size in candidates:
                    candidates.remove(size)
        total = 0.0
        for tensor in (*layer.reads, *layer.writes):  # two parts of one tensor look alike
            size = self._seen(tensor)
            if size is None:
                return None
            total += size * _BYTES.get(tensor.dtype, 4)
        return math.ceil(total)

    def _seen(self, tensor: EngineTensor) -> int | None:
        """Return the elements of a tensor that one layer looks at: all, or columns of every row."""
        if min(tensor.shape, default=0) >= 0:
            return math.prod(tensor.shape) // self._batch
        size, parts = self._elements.get(_key(tensor)), self._merged.get(_key(tensor), 1)
        if size is not None and parts > 1:
            return size if tensor.shape[:1] == (parts,) else size // parts
        axis = next(place for place, extent in enumerate(tensor.shape) if extent < 0)
        columns = math.prod(tensor.shape[axis + 1 :])
        stride = tensor.strides[axis] if len(tensor.strides) == len(tensor.shape) else columns
        return size if size is None or stride <= columns else size * columns // stride

    def _written(self, tensor: EngineTensor, candidates: Sequence[int], layer: Layer) -> int | None:
        if min(tensor.shape, default=0) >= 0:
            return self._seen(tensor)
        if len(candidates) > 1 and tensor.shape[:1] == (len(candidates),) and len(set(candidates)) == 1:
            self._merged[_key(tensor)] = len(candidates)
            return sum(candidates)
        row = _row(tensor)
        known = [(t, size) for t in (*layer.reads, *layer.writes) if (size := self._seen(t)) is not None]
        if layer.fused_attention and known and known[0][0].shape == tensor.shape:  # of every query as many channels
            return known[0][1]
        if tensor.shape[-1:] == (1,):  # a mean, or the like, of each row of another one
            for other, size in known:
                if other.shape[:-1] == tensor.shape[:-1] and other.shape[-1] > 0:
                    return size // other.shape[-1]
        if row in candidates:  # as many rows as images
            return row
        fitting = [size for size in candidates if row and size % row == 0]
        moved = next((size for _, size in known if row and size % row == 0), None)  # in another order
        if fitting:
            most = max(fitting, key=lambda size: (fitting.count(size), size))
            whole = layer.product or moved is None or most <= sum(size for _, size in known)
            return most if whole else moved  # of a node that the compiler has split: its part
        for other, size in known:  # padded or cut: as many rows as the other
            if len(other.shape) == len(tensor.shape) and _row(other) and size % _row(other) == 0:
                return size // _row(other) * row
        return moved


def _key(tensor: EngineTensor) -> str:
    """Return the name of a tensor without that of an optimization profile, ``images [profile 1]``."""
    return _OF_A_PROFILE.sub("", tensor.name)


def _row(tensor: EngineTensor) -> int:
    """Return the elements behind the axes that are not fixed."""
    return math.prod(size for size in tensor.shape if size >= 0)


def module_of(node: str) -> str:
    """Return the PyTorch module in the name of a node: ``layers.0.attn/MatMul``, or ``/layers.0/attn/MatMul``."""
    return node.strip("/").rpartition("/")[0].replace("/", ".")
