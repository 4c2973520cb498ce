"""Rules 1 and 9 to 13: what the file is, where its data lie, and what of it is static."""

from __future__ import annotations

import graphlib
from itertools import pairwise
from typing import TYPE_CHECKING

import onnx
import onnx_ir as ir

from deploycli.exporters.graph.analysis import dynamic_axes
from deploycli.exporters.graph.onnx_file import span
from deploycli.exporters.graph.operators import BROADCASTING, QDQ, is_onnx, operand
from deploycli.exporters.graph.shapes import grows
from deploycli.exporters.graph.unique import listed
from deploycli.exporters.lint.element_types import attribute, formal, schema_of
from deploycli.exporters.lint.operator_support import MAX_RANK
from deploycli.exporters.lint.report import differs, error, shape_text, type_name, warning
from deploycli.models.errors import first_line

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from deploycli.exporters.lint.report import Problem
    from deploycli.exporters.lint.subject import Subject

RECOMMENDED_OPSETS = range(19, 23)
"""From 19 on Q/DQ scales may be FP16; above 22 few runtimes follow."""

NEWEST_IR = 10

MAX_TOP_K = 3840
"""The parser takes more, the builder does not."""

_NEEDED_OPSETS = {"LayerNormalization": 17, "Gelu": 20, "RMSNormalization": 23, "Attention": 23, "Swish": 24}

_BROADCASTING_OPSET = 7
"""The first with NumPy's broadcasting."""

_VARIADIC = BROADCASTING - {"BitwiseAnd", "BitwiseOr", "BitwiseXor", "Mod", "Where"}
"""But for Pow the parser takes any number of operands, and returns one as it is."""

_QUANTIZED_OPSETS = {
    ir.DataType.FLOAT8E4M3FN: 19,
    ir.DataType.INT4: 21,
    ir.DataType.FLOAT4E2M1: 23,
}


def opset_and_ir(subject: Subject) -> Iterator[Problem]:
    """Rule 1: the opset and the IR version are those that the parser reads.

    Source: onnx-tensorrt docs/operators.md (opsets 9 to 24). Outside of them the parser of TensorRT for RTX 1.7 reads
    on, and it does not look at the IR version; an older one may stumble over either. Below opset 7 it refuses every
    elementwise operator with two operands, for they had another broadcasting (``elementwiseHelper`` of
    ``importerUtils.cpp``). An operator or a type that is newer than the opset is read; ONNX Runtime refuses the file.
    """
    where, opset, supported = subject.name, subject.opset, subject.operators.opsets
    if opset not in supported:
        found = f"opset {opset}" if opset else "no opset of the ONNX domain"
        make = warning if opset else error
        yield make(where, found, f"convert it to an opset from {supported.start} to {supported.stop - 1}")
    elif opset not in RECOMMENDED_OPSETS:
        recommended = f"{RECOMMENDED_OPSETS.start} to {RECOMMENDED_OPSETS.stop - 1}"
        yield warning(where, f"opset {opset} is read, {recommended} is what most models use", "--opset 20")
    version = subject.model.ir_version
    if not 3 <= version <= NEWEST_IR:
        yield warning(where, f"IR version {version}", f"write IR version {NEWEST_IR}: the graph needs no newer one")
    for node in subject.nodes:
        needed = _NEEDED_OPSETS.get(node.op_type, 0) if is_onnx(node) else 0
        if 0 < opset < _BROADCASTING_OPSET and is_onnx(node, *_VARIADIC):
            found = f"{node.op_type} of opset {opset} has a broadcasting that the parser does not take"
            yield error(node, found, f"opset {_BROADCASTING_OPSET} or above")
        if opset < needed:
            found = f"{node.op_type} does not exist in opset {opset}: TensorRT reads it, ONNX Runtime does not"
            yield warning(node, found, f"opset {needed} or above")
        elif is_onnx(node, *QDQ):
            yield from _opset_of_quantization(node, subject)


def _opset_of_quantization(node: ir.Node, subject: Subject) -> Iterator[Problem]:
    opset, dtype = subject.opset, subject.inference.dtype
    scale, data = dtype(operand(node, 1)), dtype(operand(node, 0))
    if scale in (ir.DataType.FLOAT16, ir.DataType.BFLOAT16) and opset < 19:
        yield warning(node, f"a scale of type {type_name(scale)} in opset {opset}", "opset 19 or above, or FP32 scales")
    quantized = data if node.op_type == "DequantizeLinear" else dtype(node.outputs[0])
    needed = 0 if quantized is None else _QUANTIZED_OPSETS.get(quantized, 0)
    if attribute(node, "block_size", 0):
        needed = max(needed, 21)
    if opset < needed:
        yield warning(node, f"{type_name(quantized)} quantization in opset {opset}", f"opset {needed} or above")


_CONSTANT_OPERANDS = {
    "CumSum": (1,),
    "OneHot": (1,),
    "Pad": (1, 3),
    "Resize": (2, 3),
    "STFT": (1, 2, 3),
    "Squeeze": (1,),
    "Tile": (1,),
    "TopK": (1,),
    "Unsqueeze": (1,),
}
"""Operands that the parser must know while it builds."""

_SHAPING_OPERANDS = {
    "BlackmanWindow": (0,),
    "ConstantOfShape": (0,),
    "Expand": (1,),
    "HammingWindow": (0,),
    "HannWindow": (0,),
    "Range": (0, 1, 2),
    "Reshape": (1,),
    "Slice": (1, 2, 3, 4),
    "Split": (1,),
}
"""Operands whose values decide the shape of the result, and may be computed from shapes."""


def constant_positions(node: ir.Node) -> tuple[int, ...]:
    """Return which operands of a node the parser must know while it builds."""
    if not is_onnx(node):
        return ()
    return (1,) if node.op_type.startswith("Reduce") else _CONSTANT_OPERANDS.get(node.op_type, ())


_ONE_VALUE = ("CumSum", "OneHot", "Squeeze", "Unsqueeze")
"""Their axes and depth are one value, the same for every batch."""


def constant_operands(subject: Subject) -> Iterator[Problem]:
    """Rule 9: axes, paddings, repeats, scales, K, depth and whatever decides shapes are known at the build.

    It may be computed, from constants and from shapes; not from the values of an input: these would be in the
    optimization profile, which has none here. The axes of a reduction are stored; the parser sees through Casts alone.

    Source: onnx-tensorrt docs/operators.md: "axes must be an initializer", "must be resolvable to a constant",
    "K input must be less than 3840"; TensorRT documentation, "Shape Tensors".
    """
    for node in subject.nodes:
        if not is_onnx(node):
            continue
        name = node.op_type
        if name.startswith("Reduce"):
            if operand(node, 1) is not None and _seen_through_casts(operand(node, 1), subject) is None:
                yield error(node, f"the axes of {name} are computed", "store them as an initializer")
            continue
        positions = (*constant_positions(node), *_SHAPING_OPERANDS.get(name, ()))
        if name == "Loop" and _collects(node):
            positions = (0,)
        for position in positions:
            read = _input_read_by([operand(node, position)], subject)
            if read is not None:
                found = f"operand {position} of {name} is computed from data, the values of {read.name}"
                yield error(node, found, "make it a constant: an optimization profile has shapes, and no values")
            elif name in _ONE_VALUE and grows(subject.inference[operand(node, position)].values):
                yield error(node, f"operand {position} of {name} grows with the batch", "make it a constant")
        if name == "TopK":
            known = subject.inference[operand(node, 1)].constant
            is_number = known is not None and known.size > 0 and known.dtype.kind in "iu"
            k = int(known.reshape(-1)[0]) if known is not None and is_number else attribute(node, "k", 0)
            if k > MAX_TOP_K:
                yield error(node, f"K is {k}", f"at most {MAX_TOP_K}")


def _seen_through_casts(value: ir.Value | None, subject: Subject) -> ir.TensorProtocol | None:
    """Return the tensor of a stored value that is cast."""
    for _ in range(_MOST_CASTS):
        producer = None if value is None else value.producer()
        if producer is None or not is_onnx(producer, "Cast", "Identity"):
            break
        value = operand(producer, 0)
    return subject.stored(value)


_MOST_CASTS = 8


def _collects(loop: ir.Node) -> bool:
    """Say whether a Loop has results whose first dimension is the number of its iterations."""
    body = loop.attributes.get("body")
    if body is None or body.type != ir.AttributeType.GRAPH:
        return False
    return len(loop.outputs) > max(len(body.value.inputs) - 2, 0)


def static_shapes(subject: Subject) -> Iterator[Problem]:
    """Rule 10: no tensor has more than 8 dimensions, and only the batch is dynamic.

    The parser takes other dynamic axes, so these are warnings: an engine needs an optimization profile for each. So is
    what fits at some batch sizes only.

    Source: TensorRT ``Dims::MAX_DIMS``; the documentation of dynamic shapes ("every dynamic axis needs an
    optimization profile").
    """
    inference = subject.inference
    for value in subject.graph.inputs:
        yield from _dynamic_input(value, subject)
    for name, tensor in subject.tensors:
        if len(tensor.shape) > MAX_RANK:
            yield error(name, f"it has {len(tensor.shape)} dimensions", f"at most {MAX_RANK}")
    for node in subject.nodes:
        ranks = [(output, inference[output].rank) for output in node.outputs]
        for output, rank in ranks:
            if rank is not None and rank > MAX_RANK:
                yield error(node, f"{output.name} has {rank} dimensions", f"at most {MAX_RANK}")
        if node in inference.refusals:
            if _INFERENCE_ERROR in inference.refusals[node]:
                is_taken = node in inference.fitting or _takes_what_onnx_does_not(node, subject)
                make = warning if is_taken else error
                yield make(node, f"ONNX refuses it: {inference.refusals[node]}", "the shapes must fit")
            continue
        yield from _unknown_shapes(node, subject)
        for output in node.outputs:
            yield from _declared_shape(output, subject)


def _takes_what_onnx_does_not(node: ir.Node, subject: Subject) -> bool:
    """Say whether the importer makes something of it: an uneven Split, or one of an axis of unknown size; in old opsets
    a Flatten from behind and a Softmax after the last axis.
    """
    known = subject.inference[operand(node, 0)]
    rank = known.rank
    if is_onnx(node, "Split"):
        growing = dynamic_axes(known.dims or ())
        return "evenly" in subject.inference.refusals[node] or attribute(node, "axis", 0) % (rank or 1) in growing
    is_old = subject.opset < 13 and is_onnx(node, "Flatten", "Hardmax", "LogSoftmax", "Softmax")
    return is_old and rank is not None and -rank <= attribute(node, "axis", 1) <= rank


def _unknown_shapes(node: ir.Node, subject: Subject) -> Iterator[Problem]:
    inference = subject.inference
    unknown = [o.name or "" for o in node.outputs if o.name and inference[o].dims is None]
    if not unknown or schema_of(node, subject.opset) is None:  # rules 1 and 2 speak of operators that are foreign
        return
    if node.graph is subject.graph and all(v is None or inference[v].dims is not None for v in node.inputs):
        hint = "fold what computes its shape; only the batch may be dynamic"
        yield warning(node, f"the shape of {listed(unknown)} does not follow from the batch size", hint)


def _input_read_by(values: Iterable[ir.Value | None], subject: Subject) -> ir.Value | None:
    """Return an input of the graph of which values are computed, other than from its shape."""
    inputs = {value for value in subject.graph.inputs if value.const_value is None}
    stack = [value for value in values if value is not None]
    seen = set(stack)
    while stack:
        value = stack.pop()
        if value in inputs:
            return value
        producer = value.producer()
        if producer is None or is_onnx(producer, "Shape", "Size"):
            continue
        bodies = [a.value for a in producer.attributes.values() if a.type == ir.AttributeType.GRAPH and not a.is_ref()]
        readers = [producer, *(node for body in bodies for node in body.all_nodes())]
        found = [read for node in readers for read in node.inputs if read is not None and read not in seen]
        seen.update(found)
        stack += found
    return None


def _dynamic_input(value: ir.Value, subject: Subject) -> Iterator[Problem]:
    name = value.name or ""
    if value.const_value is not None:
        return
    if value.shape is None:
        yield differs(name, "the shape of this input is not declared: TensorRT takes it for a scalar", "declare it")
        return
    if len(value.shape) > MAX_RANK:
        yield error(name, f"it has {len(value.shape)} dimensions", f"at most {MAX_RANK}")
    batch = subject.inference.batch_name
    for axis, dim in enumerate(value.shape):
        if isinstance(dim, int):
            if dim < 0:
                yield warning(name, f"axis {axis} has size {dim}", "declare its size")
        elif (dim.value is None or dim.value != batch) and dim.value not in subject.profiled:
            hint = "declare its size, or name the axis and give it an optimization profile"
            yield warning(name, f"axis {axis} is dynamic ({dim.value or 'without a name'})", hint)


def _declared_shape(value: ir.Value, subject: Subject) -> Iterator[Problem]:
    """A declaration that lies: runtimes that read it refuse the file."""
    dims = subject.inference[value].dims
    if dims is None or value.shape is None:
        return
    declared = [dim if isinstance(dim, int) else None for dim in value.shape]
    growing = dynamic_axes(dims)
    if len(declared) != len(dims) or any(
        d is not None and (i in growing or d != dims[i]) for i, d in enumerate(declared)
    ):
        found = f"its declared shape is {list(value.shape)}, it has {shape_text(dims)}"
        yield warning(value.name or "", found, "infer it anew")


_INFERENCE_ERROR = "InferenceError"
"""Part of what ONNX says where shapes do not fit; what it says of types and attributes is for rules 4 and 12."""

_DYNAMIC = {
    "ConstantOfShape": warning,
    "If": warning,
    "Loop": warning,
    "NonZero": warning,
    "Range": warning,
    "Scan": warning,
    "Shape": warning,
}


def no_dynamic_operators(subject: Subject) -> Iterator[Problem]:
    """Rule 11: nothing computes shapes or decides at run time in a graph that is static but for its batch.

    Source: TensorRT documentation, "Working with Dynamic Shapes": data-dependent shapes (NonZero) and loops synchronise
    with the host and cannot be captured in a CUDA graph.
    """
    left: dict[str, list[ir.Node]] = {}
    for node in subject.nodes:
        if is_onnx(node) and (node.op_type in _DYNAMIC or node.op_type.startswith("Sequence")):
            left.setdefault(node.op_type, []).append(node)
    for op_type, nodes in left.items():
        count = f"{len(nodes)} operators {op_type} are" if len(nodes) > 1 else f"{op_type} is"
        make = _DYNAMIC.get(op_type, error)
        yield make(nodes[0], f"{count} left in the graph", "fold constants, or write the model without it")


def names_and_edges(subject: Subject) -> Iterator[Problem]:
    """Rule 12: nodes have names of their own, and every edge leads from a producer to a reader.

    Source: ONNX IR specification (single assignment, topological order); TensorRT's inspector and profiler know a
    layer by the name of its ONNX node. The parser names and sorts by itself: these are warnings, a circle is none.
    """
    nameless = [node for node in subject.nodes if not node.name]
    if nameless:
        types = dict.fromkeys(node.op_type for node in nameless)
        yield warning(subject.name, f"{len(nameless)} nodes have no name ({listed(types)})", "name them")
    seen: dict[str, int] = {}
    for node in subject.nodes:
        if node.name:
            seen[node.name] = seen.get(node.name, 0) + 1
    for name, count in seen.items():
        if count > 1:
            yield warning(name, f"{count} nodes have this name", "give each a name of its own")
    for node in subject.graph.all_nodes():
        if not node.outputs:
            yield error(node, "it has no result", "leave it out")
    yield from _order(subject)
    for node in subject.nodes:
        yield from _operands(node, subject)
    yield from _outputs(subject)


def _order(subject: Subject) -> Iterator[Problem]:
    made_by = {node: [v.producer() for v in node.inputs if v is not None] for node in subject.graph}
    try:
        graphlib.TopologicalSorter({n: [p for p in made if p in made_by] for n, made in made_by.items()}).prepare()
    except graphlib.CycleError as circle:
        yield error(circle.args[1][0], "its operands follow from its own result", "cut the circle")
        return
    done = set[ir.Node]()
    for node in subject.graph:
        for value in node.inputs:
            producer = None if value is None else value.producer()
            if producer is not None and producer.graph is subject.graph and producer not in done and value is not None:
                yield warning(node, f"it reads {value.name} before it is made", "sort the nodes topologically")
        done.add(node)


_COUNTED = ("Pow", "Slice")
"""Operators whose operands the parser counts."""

_PASSED_OVER = ("Unrecognized attribute", "is deprecated in domain_version", "has inconsistent type")
"""What ONNX's checker refuses and the parser does not look at."""


def _operands(node: ir.Node, subject: Subject) -> Iterator[Problem]:
    for value in node.inputs:
        if value is None or value.producer() is not None or value.is_graph_input() or value.is_initializer():
            continue
        if value.const_value is None:
            yield error(node, f"it reads {value.name}, which nothing makes")
    schema = schema_of(node, subject.opset)
    if schema is None:
        return
    if len(node.inputs) > schema.max_input:
        is_absent = is_onnx(node, *_VARIADIC) and None in node.inputs
        make = error if is_absent or is_onnx(node, *_COUNTED) else warning
        yield make(node, f"it has {len(node.inputs)} operands", f"{node.op_type} takes {schema.max_input}")
        return
    required = onnx.defs.OpSchema.FormalParameterOption.Single
    formals = [(i, formal(schema.inputs, i)) for i in range(max(len(node.inputs), schema.min_input))]
    missing = [p.name for i, p in formals if p is not None and p.option == required and operand(node, i) is None]
    if is_onnx(node, "Resize"):  # opset 11 wants operands that it does not read
        missing = [name for name in missing if name == "X"]
    if missing:
        is_lone = is_onnx(node, *_VARIADIC) and not is_onnx(node, *_COUNTED) and len(node.inputs) == 1
        make = differs if is_lone and operand(node, 0) is not None else error
        yield make(node, f"its operand {listed(missing)} is missing")
        return
    reason = _refused_by_checker(node, subject) or _refused_by_inference(node, subject)
    if reason is not None:
        make = warning if any(text in reason for text in _PASSED_OVER) else error
        yield make(node, f"ONNX's checker refuses it: {reason}")


_NO_TENSORS = frozenset(
    {ir.AttributeType.INT, ir.AttributeType.INTS, ir.AttributeType.FLOAT, ir.AttributeType.FLOATS}
    | {ir.AttributeType.STRING, ir.AttributeType.STRINGS}
)


def _refused_by_checker(node: ir.Node, subject: Subject) -> str | None:
    """Ask ONNX about the attributes; nodes that hold tensors or graphs are not shown to it."""
    if any(a.is_ref() or a.type not in _NO_TENSORS for a in node.attributes.values()):
        return None
    context = onnx.checker.C.CheckerContext()
    context.ir_version = NEWEST_IR
    schema = schema_of(node, subject.opset)  # of a newer opset, where this one lacks the operator
    opset = max(subject.opset, 1 if schema is None else schema.since_version)
    context.opset_imports = {"": min(opset, onnx.defs.onnx_opset_version())}
    try:
        proto = ir.serde.serialize_node(node)
        if is_onnx(node, "Resize"):  # opset 11 wants operands that it does not read
            proto.input[1:] = [name or "absent" for name in proto.input[1:]]
        for i, _ in reversed([(i, a) for i, a in enumerate(proto.attribute) if a.name.startswith("TRT_")]):
            del proto.attribute[i]  # rule 7 speaks of these
        onnx.checker.check_node(proto, context)
    except Exception as problem:  # ValidationError, or whatever a broken node makes the serialiser raise
        return first_line(problem)
    return None


def _refused_by_inference(node: ir.Node, subject: Subject) -> str | None:
    reason = subject.inference.refusals.get(node, _INFERENCE_ERROR)
    return None if _INFERENCE_ERROR in reason or "unsupported type" in reason else reason


def _outputs(subject: Subject) -> Iterator[Problem]:
    for i, value in enumerate(subject.graph.outputs):
        name = value.name or f"output {i} of {subject.name}"
        if not value.name:
            yield error(name, "it has no name", "name it")
        elif value.is_graph_input():
            yield warning(name, "this output is an input of the graph", "leave it out")
        elif value.is_initializer() or subject.stored(value) is not None:
            yield warning(name, "this output is a constant", "leave it out")
        elif value.producer() is None:
            yield error(name, "nothing makes this output")
        elif not _depends_on_input(value):
            yield warning(name, "this output does not depend on any input", "leave it out")


def _depends_on_input(value: ir.Value) -> bool:
    stack, seen = [value], {value}
    while stack:
        current = stack.pop()
        if current.is_graph_input() and current.const_value is None:
            return True
        producer = current.producer()
        if producer is None:
            continue
        if any(a.type == ir.AttributeType.GRAPH for a in producer.attributes.values()):
            return True  # a body may read anything around it
        for read in producer.inputs:
            if read is not None and read not in seen:
                seen.add(read)
                stack.append(read)
    return False


def external_data(subject: Subject) -> Iterator[Problem]:
    """Rule 13: external data lie in the folder of the model, are there, and are as long as their shapes say.

    An ONNX file from anywhere names other files. They must stay in its folder and must be as long as it says.

    Source: https://github.com/onnx/onnx/blob/main/docs/ExternalData.md; TensorRT documentation, "Security": data paths
    of a model are untrusted input.
    """
    spans: dict[str, list[tuple[int, int, str]]] = {}
    for name, tensor in subject.tensors:
        reason = subject.fault(tensor)
        if reason is not None:
            yield error(name, reason, "write the model anew, its data beside it")
        elif isinstance(tensor, ir.ExternalTensor):
            start, length = span(tensor)
            if length:
                spans.setdefault(str(tensor.location), []).append((start, length, name))
    for location, found in spans.items():
        found.sort()
        for (start, length, name), (following, size, other) in pairwise(found):
            if following < start + length and (following, size) != (start, length):
                yield error(other, f"its data overlap those of {name} in {location}", "write the model anew")
