"""Rule 2: which operators the parser has, and what it and the builder do not take of one that they have.

Sources: onnx-tensorrt docs/operators.md, column "Restrictions"; ``onnxOpCheckers.cpp`` and ``onnxOpImporters.cpp``; and
the parser and the builder of TensorRT for RTX 1.7, for what these do not say.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import onnx_ir as ir

from deploycli.exporters.graph.analysis import dynamic_axes
from deploycli.exporters.graph.operators import ONNX_DOMAINS, is_onnx, operand
from deploycli.exporters.graph.shapes import BATCH
from deploycli.exporters.graph.unique import listed
from deploycli.exporters.lint.element_types import attribute
from deploycli.exporters.lint.report import differs, error, type_name, warning
from deploycli.exporters.lint.types import FLOATS
from deploycli.exporters.lint.versions import PARSER_PLUGINS
from deploycli.exporters.target.settings import DEFAULT_BATCH

MAX_RANK = 8
"""``Dims::MAX_DIMS`` of TensorRT."""

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from deploycli.exporters.graph.shapes import Dims
    from deploycli.exporters.lint.report import Problem
    from deploycli.exporters.lint.subject import Subject

    Restriction = Callable[[ir.Node, Subject], str | None]


NOT_IN_RTX = frozenset({"DFT", "DeformConv", "NonMaxSuppression", "NonZero", "RoiAlign"})
"""Operators, most of them plugins, that TensorRT has and TensorRT for RTX 1.7 was seen to lack."""


def lacking_in_rtx(node: ir.Node) -> bool:
    """Say whether TensorRT has an operator that TensorRT for RTX lacks."""
    return is_onnx(node, *NOT_IN_RTX) or (
        is_onnx(node, "ScatterElements") and attribute(node, "reduction", "none") != "none"
    )


def operator_support(subject: Subject) -> Iterator[Problem]:
    """Rule 2: the parser of the TensorRT version has every operator, with the attributes that it has here.

    Source: onnx-tensorrt docs/operators.md, columns "Supported" and "Restrictions".
    """
    known = subject.operators
    for node in subject.nodes:
        name = node.op_type
        if name in subject.plugins:
            continue
        if node.domain not in ONNX_DOMAINS:
            if name in known.types:
                found = f"{name} of domain {node.domain!r} is taken for ONNX's {name}: the parser reads no domains"
                yield differs(node, found, "express it in ONNX operators")
            elif name not in PARSER_PLUGINS:
                hint = f"express it in ONNX operators, or load a plugin and name it: --plugin {name}"
                yield error(node, f"{name} of domain {node.domain!r} is no operator of the parser", hint)
        elif name in known.since:
            found = ".".join(map(str, subject.version))
            yield error(node, f"{name} is supported from TensorRT {known.since[name]} on, this is for {found}")
        elif name not in known.types:
            yield error(node, f"{name} is not supported", "express it in supported operators")
        else:
            reason = restriction(node, subject)
            if reason:
                yield error(node, reason)
            elif lacking_in_rtx(node):
                yield warning(
                    node, f"{name} is in TensorRT, and not in TensorRT for RTX", "express it in other operators"
                )


def restriction(node: ir.Node, subject: Subject) -> str | None:
    """Return which restriction a node of the ONNX domain breaks, or None."""
    check = _some_dimension if node.op_type.startswith("Reduce") else _RESTRICTIONS.get(node.op_type)
    return None if check is None else check(node, subject)


def _data(node: ir.Node, subject: Subject) -> Dims | None:
    return subject.inference[operand(node, 0)].dims


def _channels(node: ir.Node, subject: Subject) -> int | None:
    dims = _data(node, subject)
    return dims[1] if dims is not None and len(dims) > 1 and 1 not in dynamic_axes(dims) else None


def _pool(node: ir.Node, subject: Subject) -> str | None:
    name, rank = node.op_type, subject.inference[operand(node, 0)].rank
    if any(d != 1 for d in attribute(node, "dilations", [1])):
        return f"{name} with dilations"
    if name == "LpPool" and (problem := _norm(node, subject)):
        return problem
    least = 2 if name == "LpPool" else 1
    if rank is not None and not least <= rank - 2 <= 3:
        return f"{name} over {rank - 2} dimensions: it takes {least} to 3"
    kernel = attribute(node, "kernel_shape", [0])
    pads = attribute(node, "pads", [0] * 2 * len(kernel))
    if name == "AveragePool" and not attribute(node, "count_include_pad", 0) and len(pads) == 2 * len(kernel):
        for axis, size in enumerate(kernel):
            if max(pads[axis], pads[axis + len(kernel)] + _rounded_up(node, axis, subject)) >= size:
                return "AveragePool with a padding as wide as its kernel, which it does not count"
    return None


def _rounded_up(node: ir.Node, axis: int, subject: Subject) -> int:
    """Return by how much the last window of an axis reaches beyond it, where the number of windows is rounded up."""
    dims, kernel = _data(node, subject), attribute(node, "kernel_shape", [0])
    if not attribute(node, "ceil_mode", 0) or dims is None or len(dims) != len(kernel) + 2:
        return 0
    pads, stride = attribute(node, "pads", [0] * 2 * len(kernel)), attribute(node, "strides", [1] * len(kernel))[axis]
    span = dims[axis + 2] + pads[axis] + pads[axis + len(kernel)] - kernel[axis]
    return -span % stride


def _norm(node: ir.Node, _subject: Subject) -> str | None:
    p = attribute(node, "p", 2)
    return None if p in (1, 2) else f"{node.op_type} with p {p}: it is 1 or 2"


def _convolution(node: ir.Node, subject: Subject) -> str | None:
    name, weight = node.op_type, subject.inference[operand(node, 1)].dims
    rank = subject.inference[operand(node, 0)].rank
    if rank is not None and not 1 <= rank - 2 <= 3:
        return f"{name} over {rank - 2} dimensions: it takes 1 to 3"
    bias, group = subject.inference[operand(node, 2)].rank, attribute(node, "group", 1)
    if bias not in (None, 1):
        return f"{name} with a bias of {bias} dimensions"
    channels = _channels(node, subject)
    if channels is None or weight is None or len(weight) < 3:
        return None
    wanted = weight[1] * group if name == "Conv" else weight[0]
    return f"{name} of {channels} channels with a weight for {wanted}" if channels != wanted else None


def _transposed_convolution(node: ir.Node, subject: Subject) -> str | None:
    strides, dilations = attribute(node, "strides", [1]), attribute(node, "dilations", [1])
    if max(strides, default=1) > 1 and max(dilations, default=1) > 1:
        return "ConvTranspose with strides and dilations"
    return _convolution(node, subject) or _padding_of_transposed(node, subject)


def _padding_of_transposed(node: ir.Node, subject: Subject) -> str | None:
    """Where the shape of the result is given, the padding follows from it; before the data it is not negative."""
    dims, weight = _data(node, subject), subject.inference[operand(node, 1)].dims
    shape = attribute(node, "output_shape", list[int]())
    if dims is None or weight is None or not len(shape) == len(dims) - 2 == len(weight) - 2:
        return None
    if attribute(node, "auto_pad", "NOTSET") != "NOTSET":
        return None
    ones, zeros = [1] * len(shape), [0] * len(shape)
    strides, dilations = attribute(node, "strides", ones), attribute(node, "dilations", ones)
    extra = attribute(node, "output_padding", zeros)
    for i, wanted in enumerate(shape):
        full = strides[i] * (dims[i + 2] - 1) + extra[i] + (weight[i + 2] - 1) * dilations[i] + 1
        if full + 1 < wanted:  # of an odd number the larger half is behind the data
            return f"ConvTranspose to {wanted}, which makes {full + 1} at most: a padding cannot be negative"
    return None


def _local_response(node: ir.Node, subject: Subject) -> str | None:
    size, rank = attribute(node, "size", 1), subject.inference[operand(node, 0)].rank
    if not (1 <= size <= _WIDEST_LRN and size % 2):
        return f"LRN with size {size}: it is odd and at most {_WIDEST_LRN}"
    return f"LRN of {rank} dimensions: it takes 4 or more" if rank is not None and rank < 4 else None


_WIDEST_LRN = 15


def _group_norm(node: ir.Node, subject: Subject) -> str | None:
    """The scale has an element for each channel; before opset 21 that of GroupNormalization for each group. Where there
    is one group, or one for each channel, what can be broadcast serves too.
    """
    name, rank = node.op_type, subject.inference[operand(node, 0)].rank
    if rank is not None and rank < 3:
        return f"{name} of {rank} dimensions: it takes 3 or more"
    channels = wanted = _channels(node, subject)
    what, groups = "channels", 1
    if name == "GroupNormalization":
        groups = attribute(node, "num_groups", 0)
        if groups < 1 or (channels is not None and channels % groups):
            return f"GroupNormalization of {channels} channels in {groups} groups"
        if subject.opset < 21:
            wanted, what = groups, "groups"
    fitting = {wanted} if groups > 1 else {1, channels}
    for position in (1, 2):
        dims = subject.inference[operand(node, position)].dims
        if dims is not None and None not in fitting and math.prod(dims) not in fitting:
            return f"{name} of {wanted} {what} with {math.prod(dims)} factors"
    return None


def _eye(node: ir.Node, subject: Subject) -> str | None:
    """The parser asks whether a dimension is dynamic; here one that is unknown is."""
    known = subject.inference[operand(node, 0)]
    if known.dtype == ir.DataType.UINT8:
        return "EyeLike of UINT8"
    is_dynamic = bool(dynamic_axes(known.dims)) if known.dims is not None else known.rank is not None
    return "EyeLike of a dynamic shape" if is_dynamic else None


def _mean_variance(node: ir.Node, subject: Subject) -> str | None:
    rank, axes = subject.inference[operand(node, 0)].rank, attribute(node, "axes", [0, 2, 3])
    if rank is None or all(-rank <= axis < rank for axis in axes):
        return None
    return f"{node.op_type} over axes {axes} of {rank}"


def _depth(node: ir.Node, subject: Subject) -> str | None:
    dims, size = _data(node, subject), attribute(node, "blocksize", 1)
    if dims is None or len(dims) != 4 or size < 1 or not math.prod(dims):
        return None
    if node.op_type == "DepthToSpace":
        return f"DepthToSpace of {dims[1]} channels by {size}" if dims[1] % size**2 else None
    return f"SpaceToDepth of {dims[2]} x {dims[3]} by {size}" if dims[2] % size or dims[3] % size else None


def _reshape(node: ir.Node, subject: Subject) -> str | None:
    """The result holds as many elements; a 0 stands for a dimension that is there. The builder asks at the batch that
    it tunes for.
    """
    dims, goal = _data(node, subject), subject.inference[operand(node, 1)].constant
    if goal is None or goal.dtype.kind not in "iu":
        return None
    wanted = [int(size) for size in goal.reshape(-1)]
    if len(wanted) > MAX_RANK:
        return f"Reshape to {len(wanted)} dimensions: at most {MAX_RANK}"
    if dims is None:
        return None
    usual = [size // BATCH * DEFAULT_BATCH[1] if i in dynamic_axes(dims) else size for i, size in enumerate(dims)]
    shape = wanted
    if not attribute(node, "allowzero", 0):
        if 0 in wanted[len(dims) :]:
            return f"Reshape of {len(dims)} dimensions to {wanted}: a 0 stands for none"
        shape = [size or usual[i] for i, size in enumerate(wanted)]
    return None if _holds(math.prod(usual), shape) else f"Reshape of {usual} to {wanted}"


def _holds(elements: int, shape: list[int]) -> bool:
    """Say whether a shape holds so many elements, with a size for -1 that follows."""
    volume = math.prod(size for size in shape if size != -1)
    if -1 not in shape:
        return volume == elements
    return elements % volume == 0 if volume else elements == 0


def _pad(node: ir.Node, subject: Subject) -> str | None:
    """The importer makes a value that is a float INT32 for integers; one of 0 it leaves out."""
    data, value = operand(node, 0), operand(node, 2)
    dtype = subject.inference.dtype(data)
    if dtype not in (ir.DataType.INT64, ir.DataType.BOOL) or subject.stored(data) is not None:
        return None
    if subject.opset < 11:
        is_filled = bool(attribute(node, "value", 0.0))
    else:
        stored = subject.constant(value)
        is_float = subject.inference.dtype(value) in FLOATS and attribute(node, "mode", "constant") == "constant"
        is_filled = is_float and stored is not None and bool(stored.any())
    return f"Pad of {type_name(dtype)} with a float" if is_filled else None


def _clip(node: ir.Node, subject: Subject) -> str | None:
    if subject.inference.dtype(operand(node, 0)) == ir.DataType.INT8 and len(node.inputs) > 1:
        return "Clip of INT8 with places for limits"
    if subject.opset >= 11 and len(node.inputs) == 2 and node.inputs[1] is None:
        return "Clip with one limit that is absent: leave it out"
    return None


def _slice(node: ir.Node, subject: Subject) -> str | None:
    """Without axes there is a start for each axis; no axis comes twice."""
    rank, starts = subject.inference[operand(node, 0)].rank, subject.inference[operand(node, 1)].dims
    if rank is None:
        return None
    if subject.opset < 10:
        starts_given = attribute(node, "starts", list[int]())
        axes = attribute(node, "axes", list(range(len(starts_given))))
    else:
        known = subject.inference[operand(node, 3)].constant
        axes = [] if known is None else [int(axis) for axis in known.reshape(-1)]
        count = starts[0] if starts is not None and len(starts) == 1 else rank
        if operand(node, 3) is None and count != rank:
            return f"Slice without axes of {rank} dimensions, with {count} starts"
    if any(not -rank <= axis < rank for axis in axes):
        return f"Slice of axes {axes} of {rank} dimensions"
    if len({axis % rank for axis in axes if rank}) < len(axes):
        return f"Slice of axes {axes}: one comes twice"
    return None


def _recurrent(node: ir.Node, subject: Subject) -> str | None:
    name, direction = node.op_type, attribute(node, "direction", "forward")
    if "hidden_size" not in node.attributes:
        return f"{name} without hidden_size"
    if direction not in ("forward", "reverse", "bidirectional"):
        return f"{name} with direction {direction}"
    if attribute(node, "input_forget", 0) and name == "LSTM":
        return "LSTM with input_forget"
    dtype = subject.inference.dtype(operand(node, 0))
    if operand(node, 4) is not None and dtype not in (None, ir.DataType.FLOAT):
        return f"{name} of {type_name(dtype)} with sequence_lens"
    activations = attribute(node, "activations", list[str]())
    half = len(activations) // 2
    if direction == "bidirectional" and activations[:half] != activations[half:]:
        return f"{name} with other activations backwards"
    return None


def _unsqueeze(node: ir.Node, subject: Subject) -> str | None:
    is_attribute = subject.opset < 13
    return "Unsqueeze without axes" if is_attribute and "axes" not in node.attributes else None


def _some_dimension(node: ir.Node, subject: Subject) -> str | None:
    return f"{node.op_type} of a scalar" if subject.inference[operand(node, 0)].rank == 0 else None


def _lp_norm(node: ir.Node, subject: Subject) -> str | None:
    return _norm(node, subject) or _some_dimension(node, subject)


def _softmax(node: ir.Node, subject: Subject) -> str | None:
    """Before opset 13 it is one of a matrix, which the importer makes."""
    return _two_dimensions(node, subject) if subject.opset >= 13 else None


def _two_dimensions(node: ir.Node, subject: Subject) -> str | None:
    rank = subject.inference[operand(node, 0)].rank
    return f"{node.op_type} of {rank} dimensions: it takes 2 or more" if rank is not None and rank < 2 else None


def _cumulate(node: ir.Node, subject: Subject) -> str | None:
    rank, axis = subject.inference[operand(node, 0)].rank, subject.inference[operand(node, 1)].constant
    if rank is None or axis is None or axis.size != 1 or -rank <= int(axis.reshape(-1)[0]) < rank:
        return None
    return f"CumSum along axis {int(axis.reshape(-1)[0])} of {rank}"


def _expand(node: ir.Node, subject: Subject) -> str | None:
    """An axis that grows cannot be made one of a fixed size, other than that which engines are tuned for."""
    dims, goal = _data(node, subject), subject.constant(operand(node, 1))
    if dims is None or goal is None or node in subject.inference.fitting:
        return None
    pairs = zip(reversed(dims), reversed(goal.reshape(-1).tolist()), strict=False)
    wrong = [size for dim, size in pairs if size != 1 and dim and dim % BATCH == 0]
    return f"Expand of a dynamic axis to {wrong[0]}" if wrong else None


def _rotary(node: ir.Node, subject: Subject) -> str | None:
    """The tables and the positions are for as many batches as the data."""
    dims, tables = _data(node, subject), subject.inference[operand(node, 1)].dims
    positions = subject.inference[operand(node, 3)].dims
    if dims is None or tables is None:
        return None
    if operand(node, 3) is None and len(tables) == 3 and tables[0] != dims[0]:
        return "RotaryEmbedding with tables for another batch"
    if positions is not None and len(positions) == 2 and positions[0] != dims[0]:
        return "RotaryEmbedding with positions for another batch"
    heads = attribute(node, "num_heads", 0)
    size = dims[3] if len(dims) == 4 else dims[2] // heads if heads else 0
    half = (attribute(node, "rotary_embedding_dim", 0) or size) // 2
    return (
        f"RotaryEmbedding of {2 * half} channels with tables for {tables[-1]}" if size and tables[-1] != half else None
    )


def _layer_norm(node: ir.Node, subject: Subject) -> str | None:
    """The scale and the bias broadcast to the axes that are normalized; of RMSNormalization either to the other."""
    is_rms = node.op_type == "RMSNormalization"
    dims, rank = subject.inference[operand(node, 0)].dims, subject.inference[operand(node, 0)].rank
    axis = attribute(node, "axis", -1)
    if dims is None or rank is None or not -rank <= axis < rank:
        return None
    for position in (1, 2):
        factor = subject.inference[operand(node, position)].dims
        pairs = zip(reversed(factor or ()), reversed(dims), strict=False)
        is_longer = len(factor or ()) > rank and not is_rms
        if is_longer or any(a not in (1, b) and not (is_rms and b == 1) for a, b in pairs):
            return f"{node.op_type} of {list(dims[axis:])} with factors of shape {list(factor or ())}"
    return None


def _older(node: ir.Node, _subject: Subject) -> str | None:
    """Operators that ONNX no longer has: nothing else asks for their attributes."""
    needed = ("bias",) if node.op_type == "ImageScaler" else ("alpha", "beta")
    missing = [name for name in needed if name not in node.attributes]
    return f"{node.op_type} without {' and '.join(missing)}" if missing else None


def _gather(node: ir.Node, subject: Subject) -> str | None:
    dims, indices = _data(node, subject), subject.inference[operand(node, 1)].dims
    axis = attribute(node, "axis", 0)
    if dims is None or indices is None or not -len(dims) <= axis < len(dims):
        return None
    return f"{node.op_type} from an empty axis" if dims[axis] == 0 and 0 not in indices else None


def _split(node: ir.Node, subject: Subject) -> str | None:
    return _axis_there(node, subject) or _all_named(node, subject)


def _axis_there(node: ir.Node, subject: Subject) -> str | None:
    rank, axis = subject.inference[operand(node, 0)].rank, attribute(node, "axis", 0)
    return f"{node.op_type} along axis {axis} of {rank}" if rank is not None and not -rank <= axis < rank else None


def _matrix_product(node: ir.Node, subject: Subject) -> str | None:
    """The importer makes a vector in front a matrix, and takes away the first axis of the result instead of the last
    but one.
    """
    first, second = (subject.inference[operand(node, i)] for i in (0, 1))
    if first.rank != 1 or second.dims is None or len(second.dims) < 3 or 0 in dynamic_axes(second.dims):
        return None
    return "MatMul of a vector and a stack of matrices" if second.dims[0] != 1 else None


def _gemm(node: ir.Node, subject: Subject) -> str | None:
    """What is added can be broadcast; ONNX's inference does not look at it."""
    added, result = subject.inference[operand(node, 2)].dims, subject.inference[node.outputs[0]].dims
    if added is None or result is None:
        return None
    fixed = [1 if axis in dynamic_axes(result) else size for axis, size in enumerate(result)]
    pairs = zip(reversed(added), reversed(fixed), strict=False)
    is_wrong = any(a != b and 1 not in (a, b) for a, b in pairs)
    return f"Gemm of {list(result)} that adds {list(added)}" if is_wrong else None


def _top_k(node: ir.Node, subject: Subject) -> str | None:
    """K is no more than there is; ONNX's inference looks at that where K is an operand, and not an attribute."""
    dims, axis, k = _data(node, subject), attribute(node, "axis", -1), attribute(node, "k", 0)
    if dims is None or not -len(dims) <= axis < len(dims) or axis % len(dims) in dynamic_axes(dims):
        return None
    return f"TopK of {k} among {dims[axis]}" if k > dims[axis] else None


def _equal(node: ir.Node, subject: Subject) -> str | None:
    """The importer gives operands as many dimensions, which it cannot with UINT8."""
    known = [subject.inference[operand(node, i)] for i in (0, 1)]
    is_uint8 = all(value.dtype == ir.DataType.UINT8 for value in known)
    return "Equal of UINT8 in other dimensions" if is_uint8 and known[0].rank != known[1].rank else None


def _mod(node: ir.Node, subject: Subject) -> str | None:
    dtype = subject.inference.dtype(operand(node, 0))
    if attribute(node, "fmod", 0) or dtype in (None, ir.DataType.INT32, ir.DataType.INT64):
        return None
    return f"Mod of {type_name(dtype)} without fmod"


def _constant(node: ir.Node, subject: Subject) -> str | None:
    if subject.opset < 12 and "value" not in node.attributes:
        return f"a Constant without a tensor in opset {subject.opset}"
    is_plain = node.attributes.keys().isdisjoint({"sparse_value", "value_string", "value_strings"})
    return None if is_plain else "a constant of strings or a sparse one"


def _grid_sample(node: ir.Node, subject: Subject) -> str | None:
    rank = subject.inference[operand(node, 0)].rank
    if rank not in (None, 4, 5):
        return f"GridSample of {rank} dimensions: it takes 4 or 5"
    if rank == 5 and subject.version < (11, 2, 1):
        return "GridSample of a volume is supported from TensorRT 11.2.1 on"
    return None


def _scatter_nd(node: ir.Node, _subject: Subject) -> str | None:
    reduction = attribute(node, "reduction", "none")
    return None if reduction == "none" else f"ScatterND with reduction {reduction}"


def _all_named(node: ir.Node, _subject: Subject) -> str | None:
    return None if all(output.name for output in node.outputs) else f"{node.op_type} with a result that has no name"


def _einsum(node: ir.Node, _subject: Subject) -> str | None:
    strange = {c for c in attribute(node, "equation", "") if not (c.islower() and c.isascii()) and c not in "->., "}
    return f"Einsum with {listed(sorted(strange))}: it takes small letters" if strange else None


def _if(node: ir.Node, subject: Subject) -> str | None:
    """One BOOL decides; the branches give tensors of one type, and of as many dimensions where it is an input."""
    condition = operand(node, 0)
    dims, dtype = subject.inference[condition].dims, subject.inference.dtype(condition)
    if dims is not None and math.prod(dims) != 1:
        return f"If with {math.prod(dims)} conditions"
    if dtype not in (None, ir.DataType.BOOL):
        return f"If with a condition of type {type_name(dtype)}"
    if subject.stored(condition) is not None:
        return None
    branches = [
        a.value.outputs for a in node.attributes.values() if a.type == ir.AttributeType.GRAPH and not a.is_ref()
    ]
    for pair in zip(*branches, strict=False):
        types = {subject.inference.dtype(value) for value in pair} - {None}
        if len(types) > 1:
            return f"If with branches that give {' and '.join(sorted(type_name(t) for t in types))}"
        ranks = {rank for value in pair if (rank := subject.inference[value].rank) is not None}
        if len(ranks) > 1:
            return f"If with branches that give {' and '.join(map(str, sorted(ranks)))} dimensions"
    return None


def _loop(node: ir.Node, _subject: Subject) -> str | None:
    body = node.attributes.get("body")
    if body is None or body.type != ir.AttributeType.GRAPH:
        return None
    if operand(node, 1) is None and any(value.uses() or value.is_graph_output() for value in body.value.inputs[1:2]):
        return "Loop without a condition whose body reads it"
    if operand(node, 0) is None and any(value.name for value in node.outputs[len(body.value.inputs) - 2 :]):
        return "Loop that collects results without a number of iterations"
    return None


def _tensor_scatter(node: ir.Node, subject: Subject) -> str | None:
    """It is a cache of keys or values, written along its tokens."""
    rank, axis = subject.inference[operand(node, 0)].rank, attribute(node, "axis", -2)
    if attribute(node, "mode", "linear") != "linear":
        return f"TensorScatter with mode {attribute(node, 'mode', '')}"
    if rank is not None and (rank != 4 or axis % rank != rank - 2):
        return f"TensorScatter along axis {axis} of {rank}: it takes the tokens of [batch, heads, tokens, channels]"
    return None


_RESIZED_AXES = {"linear": 3, "cubic": 2}
"""How many of the last axes such a Resize with scales may change; the nearest one may change any."""

_RESIZE_COORDINATES = ("half_pixel", "pytorch_half_pixel", "align_corners", "asymmetric", "tf_half_pixel_for_nn")

_CUBIC_SINCE = (10, 15)


def _resize(node: ir.Node, subject: Subject) -> str | None:
    mode = attribute(node, "mode", "nearest")
    policy = attribute(node, "keep_aspect_ratio_policy", "stretch")
    antialias = attribute(node, "antialias", 0)
    modes = ("nearest", "linear", "cubic") if subject.version >= _CUBIC_SINCE else ("nearest", "linear")
    if mode not in modes or antialias or policy != "stretch":
        return f"Resize with mode {mode}, antialias {antialias}, policy {policy}"
    coordinates = attribute(node, "coordinate_transformation_mode", "half_pixel")
    has_sizes = operand(node, 3) is not None
    if coordinates not in _RESIZE_COORDINATES:
        return f"Resize with coordinates {coordinates}: it takes {', '.join(_RESIZE_COORDINATES)}"
    if coordinates == "tf_half_pixel_for_nn" and has_sizes:
        return "Resize with coordinates tf_half_pixel_for_nn and sizes: it takes them with scales"
    rounding = attribute(node, "nearest_mode", "round_prefer_floor")
    if coordinates == "tf_half_pixel_for_nn" and rounding != "round_prefer_floor":  # asked in every mode
        return f"Resize with coordinates tf_half_pixel_for_nn and nearest_mode {rounding}"
    if not node.outputs:  # the checker says so
        return None
    before, after = (subject.inference[value].dims for value in (operand(node, 0), node.outputs[0]))
    if before is None or after is None or len(before) != len(after):
        return None
    growing = dynamic_axes(before)
    if has_sizes and "axes" in node.attributes and growing:
        return "Resize to the sizes of some axes, where another is dynamic"
    changed = [i for i, (a, b) in enumerate(zip(before, after, strict=True)) if a != b and i not in growing]
    most = _RESIZED_AXES.get(mode, len(before))
    if mode == "cubic" and has_sizes:
        most = 3
    if changed and changed[0] < len(before) - most:
        return f"{mode} Resize of axis {changed[0]} of {len(before)}: it takes the last {most}"
    return None


_RESTRICTIONS: Mapping[str, Restriction] = {
    "AveragePool": _pool,
    "ArgMax": _two_dimensions,
    "ArgMin": _two_dimensions,
    "Clip": _clip,
    "Constant": _constant,
    "Conv": _convolution,
    "ConvTranspose": _transposed_convolution,
    "CumSum": _cumulate,
    "DepthToSpace": _depth,
    "Dropout": _all_named,
    "Einsum": _einsum,
    "Expand": _expand,
    "Equal": _equal,
    "EyeLike": _eye,
    "GRU": _recurrent,
    "Gather": _gather,
    "Gemm": _gemm,
    "GridSample": _grid_sample,
    "GroupNormalization": _group_norm,
    "If": _if,
    "Hardmax": _softmax,
    "ImageScaler": _older,
    "InstanceNormalization": _group_norm,
    "LRN": _local_response,
    "LayerNormalization": _layer_norm,
    "LSTM": _recurrent,
    "LogSoftmax": _softmax,
    "Loop": _loop,
    "LpNormalization": _lp_norm,
    "LpPool": _pool,
    "MatMul": _matrix_product,
    "MaxPool": _pool,
    "MeanVarianceNormalization": _mean_variance,
    "Mod": _mod,
    "Pad": _pad,
    "ParametricSoftplus": _older,
    "RMSNormalization": _layer_norm,
    "RNN": _recurrent,
    "Reshape": _reshape,
    "Resize": _resize,
    "RotaryEmbedding": _rotary,
    "ScaledTanh": _older,
    "Scatter": _axis_there,
    "ScatterElements": _axis_there,
    "ScatterND": _scatter_nd,
    "Softmax": _softmax,
    "Slice": _slice,
    "SpaceToDepth": _depth,
    "Split": _split,
    "TensorScatter": _tensor_scatter,
    "TopK": _top_k,
    "Unsqueeze": _unsqueeze,
}
