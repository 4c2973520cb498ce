"""Rules 7 and 16: what the parser takes of the operator Attention, and whether the compiler makes one kernel of an
attention, be it that operator or made of others.

What is said of kernels was seen in what TensorRT for RTX 1.7.1 compiles for SM75, SM86, SM89 and SM120:
kernels `_gemm_mha_v2` and the like (`tests/exporters/lint/corpus/attentions.py`). It is wider than what TensorRT
documents: scales, choices and several masks may stand between the products, in FP32 between Casts, in
four dimensions or more.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import onnx_ir as ir

from deploycli.exporters.graph.analysis import dynamic_axes
from deploycli.exporters.graph.operators import is_onnx, operand
from deploycli.exporters.graph.unique import listed
from deploycli.exporters.lint.attention_layout import copied_operands, lone_heads
from deploycli.exporters.lint.element_types import attribute
from deploycli.exporters.lint.report import AttentionBlock, differs, error, name_of, shape_text, type_name, warning
from deploycli.exporters.lint.subject import MOVES, is_fixed, quantized_type, requantized

if TYPE_CHECKING:
    from collections.abc import Iterator

    from deploycli.exporters.graph.attention import Attention, Step
    from deploycli.exporters.graph.shapes import Dims
    from deploycli.exporters.lint.inference import Known
    from deploycli.exporters.lint.report import Problem
    from deploycli.exporters.lint.subject import Subject
    from deploycli.exporters.target.targets import Capability

HEAD_DIMS = range(9, 257)
FP8_HEAD_DIMS = range(8, 257)
INT8_HEAD_DIMS = (16, 32, 64)
INT8_KEYS = 512
FP8_KEYS = 32

_ALONE = "it has one head and one image"
_ONE_HEAD = "it has one head, a mask and a dynamic batch"

_FLAT: Capability = (8, 9)
"""From this compute capability on a kernel is made of every 3-D attention."""

_HALF = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)

_BEFORE = (
    *("Abs", "Add", "Cast", "Clip", "DequantizeLinear", "Div", "Dropout", "Exp", "Gelu", "Identity", "Max", "Min"),
    *("Mul", "Neg", "Sqrt", "Sub", "Where"),
)
"""Operators that the kernel computes between the first product and the Softmax."""

_AFTER = ("Cast", "DequantizeLinear", "Dropout", "Identity", "QuantizeLinear")
"""Operators that it computes after the Softmax, or that have rules of their own; scales are seen apart."""

_PRECISIONS = {
    ir.DataType.FLOAT: "fp32",
    ir.DataType.FLOAT16: "fp16",
    ir.DataType.BFLOAT16: "bf16",
    ir.DataType.INT8: "int8",
    ir.DataType.FLOAT8E4M3FN: "fp8",
}


@dataclass(frozen=True)
class Reason:
    """Why no kernel is made of an attention.

    Attributes:
        text: what was found.
        hint: what to do.
        is_finding: whether to warn of it: that an FP32 graph is not FP16 is no news to its owner.
    """

    text: str
    hint: str
    is_finding: bool = True


def attention_form(subject: Subject) -> Iterator[Problem]:
    """Rule 16: every attention becomes one kernel, which reads what products have made where it lies.

    Source: what TensorRT for RTX 1.7.1 compiles; TensorRT documentation, "Transformers and Fused Attention" (11.x) and
    release notes of 10.14 (head sizes); issues 2981 and 4167 of NVIDIA/TensorRT (INT8).
    """
    for found in subject.attentions:
        for reason in _reasons(found, subject):
            if reason.is_finding:
                yield warning(found.softmax, f"the attention does not become one kernel: {reason.text}", reason.hint)
        yield from lone_heads(found.operands[0], found.softmax, subject)
    yield from copied_operands(subject)


def attention_blocks(subject: Subject) -> list[AttentionBlock]:
    """Return every attention block with the verdict of rules 7 and 16 on it."""
    blocks = {found.softmax: _block(found, subject) for found in subject.attentions}
    problems = [p for p in attention_operator(subject) if p.level == "error"]
    for node in subject.nodes:
        if is_onnx(node, "Attention"):
            query, key = (subject.inference[operand(node, i)] for i in (0, 1))
            heads = attribute(node, "q_num_heads", 0)
            width = None if query.dims is None or not query.dims or not is_fixed(query.dims[-1]) else query.dims[-1]
            size = width // heads if width is not None and query.rank == 3 and heads > 0 else width
            refused = [p.message for p in problems if p.where == name_of(node)]
            reasons = (*refused, *_of_operator(query, size, heads, operand(node, 3) is not None))
            blocks[node] = AttentionBlock(
                name_of(node),
                _PRECISIONS.get(query.dtype, "") if query.dtype is not None else "",
                size,
                _tokens(None if query.dims is None or key.dims is None else (*query.dims[-2:-1], *key.dims[-2:-1])),
                _bytes(operand(node, 3), subject),
                reasons,
            )
    return [blocks[node] for node in subject.nodes if node in blocks]


def _of_operator(query: Known, size: int | None, heads: int, is_masked: bool) -> Iterator[str]:
    """Why the operator Attention is taken apart: FP32, and heads for which there is no kernel."""
    if query.dtype is not None and not _is_half(query.dtype):
        yield f"it is {_PRECISIONS.get(query.dtype, query.dtype.name).upper()}, for which there is no kernel"
    if size is not None and size not in HEAD_DIMS:
        yield f"its heads have {size} channels"
    if query.dims is None or query.rank not in (3, 4):  # what else it is, the rule on the operator says
        return
    batch, count = query.dims[:2] if query.rank == 4 else (query.dims[0], heads)
    if batch == count == 1:
        yield _ALONE
    elif count == 1 and is_masked and not is_fixed(batch):
        yield _ONE_HEAD


def _block(found: Attention, subject: Subject) -> AttentionBlock:
    query = found.operands[0]
    dtype = quantized_type(query, subject) or subject.inference.dtype(query)
    added = [_bytes(_other(s), subject) for s in found.before if is_onnx(s.node, "Add", "Sub")]
    return AttentionBlock(
        name_of(found.softmax),
        "" if dtype is None else _PRECISIONS.get(dtype, dtype.name.lower()),
        head_dim(found, subject),
        _tokens(subject.inference.dims(found.scores.outputs[0])),
        sum(added),
        tuple(reason.text for reason in _reasons(found, subject)),
    )


def head_dim(found: Attention, subject: Subject) -> int | None:
    """Return the channels of one head; None where they are not known or grow with the batch."""
    dims = subject.inference.dims(found.scores.inputs[0])
    is_known = dims is not None and len(dims) > 1 and _is_contracted_last(found.scores) and is_fixed(dims[-1])
    return dims[-1] if dims is not None and is_known else None


def _is_contracted_last(product: ir.Node) -> bool:
    """Whether a product sums over the last axis of its first operand."""
    if product.op_type == "MatMul":
        return True
    operands, _, result = attribute(product, "equation", "").replace(" ", "").partition("->")
    first = operands.partition(",")[0]
    return bool(first) and first[-1].isalpha() and bool(result) and first[-1] not in result


def _tokens(dims: Dims | None) -> tuple[int, int] | None:
    if dims is None or len(dims) < 2 or not all(is_fixed(d) for d in dims[-2:]):
        return None
    return dims[-2], dims[-1]


def _bytes(value: ir.Value | None, subject: Subject) -> int:
    tensor = subject.stored(value)
    sized = tensor is not None and tensor.dtype not in (ir.DataType.STRING, ir.DataType.UNDEFINED)
    return int(tensor.nbytes) if tensor is not None and sized else 0


def _other(step: Step) -> ir.Value | None:
    """Return the operand of a sum or product that does not lead on."""
    return operand(step.node, 1 - step.position)


def _reasons(found: Attention, subject: Subject) -> list[Reason]:
    reasons = [*_of_shape(found, subject), *_of_batch(found, subject), *_of_neighbours(found, subject)]
    reasons += [*_of_sharing(found), *_of_quantization(found, subject), *_of_type(found, subject)]
    return [*reasons, *_of_size(found, subject)]


def _of_shape(found: Attention, subject: Subject) -> Iterator[Reason]:
    scores = subject.inference[found.scores.outputs[0]]
    axis = attribute(found.softmax, "axis", -1 if subject.opset >= 13 else 1)
    if axis != -1 and axis + 1 != (scores.rank or 4):
        yield Reason(f"its Softmax is on axis {axis}", "put the keys on the last axis")
    dims = scores.dims
    if dims is None or len(dims) < 2:  # of which rule 10 speaks
        return
    lead = dims[:-2]
    masks = [step for step in found.before if is_onnx(step.node, "Add") and not _is_number(_other(step), subject)]
    if all(d == 1 for d in lead):
        yield Reason(_ALONE, "more of either, or a dynamic batch")
    elif len(lead) > 1 and lead[-1] == 1 and not is_fixed(lead[0]) and len(masks) == 1:
        yield Reason(_ONE_HEAD, "a fixed batch, or Where in place of the sum")
    elif len(lead) == 1 and not _is_flat_fused(found, lead[0], subject):
        yield Reason("its products are 3-D", "reshape queries, keys and values to [batch, heads, tokens, D]")


def _is_flat_fused(found: Attention, batch: int, subject: Subject) -> bool:
    """Whether a kernel is made of a 3-D attention: for SM89 and later, of INT8, and of FP16 with a fixed batch."""
    if subject.targets and min(subject.targets) >= _FLAT:
        return True
    query = found.operands[0]
    if _is_quantized(found, subject):
        return True
    return is_fixed(batch) and subject.inference.dtype(query) == ir.DataType.FLOAT16


def _of_batch(found: Attention, subject: Subject) -> Iterator[Reason]:
    """Keys and values are of every image, and what is added to the scores makes no more of them."""
    shapes = [subject.inference.dims(found.operands[i]) for i in (0, 1, 3)]
    ranks = {len(dims) for dims in shapes if dims is not None}
    if len(ranks) > 1 or len({dims[0] for dims in shapes if dims is not None and len(dims) > 2}) > 1:
        yield Reason("all images share its keys or values", "keys and values for every image: Expand")
    given = subject.inference.dims(found.scores.outputs[0])
    for step in found.before:
        before, after = given, subject.inference.dims(step.node.outputs[0])
        given = after
        if is_onnx(step.node, *MOVES) or before is None or after is None or before == after:
            continue
        yield Reason(f"its {step.node.op_type} makes {_text(after)} of its scores {_text(before)}", "[1, N, Sq, Skv]")


def _of_neighbours(found: Attention, subject: Subject) -> Iterator[Reason]:
    """What else stands between the products."""
    others = []
    for step in found.before:
        node = step.node
        if is_onnx(node, "QuantizeLinear"):
            yield Reason("its scores are quantized before the Softmax", "remove that Q/DQ pair")
        elif _is_turned(node, subject) or not (is_onnx(node, *_BEFORE) or is_onnx(node, *MOVES)):
            others.append(node.op_type)
    if others:
        yield Reason(f"{listed(others)} between the first product and the Softmax", "move it out of the attention")
    after = [
        step.node.op_type
        for step in found.after
        if _is_turned(step.node, subject)
        or not (is_onnx(step.node, *_AFTER) or is_onnx(step.node, *MOVES) or _is_scale(step, subject))
    ]
    if after:
        yield Reason(
            f"{listed(after)} between the Softmax and the second product", "one number may be multiplied there"
        )


def _is_turned(node: ir.Node, subject: Subject) -> bool:
    """Whether a Transpose moves the last axis."""
    if not is_onnx(node, "Transpose"):
        return False
    rank = subject.inference[node.inputs[0]].rank
    perm: list[int] = attribute(node, "perm", [])
    return not perm or (rank is not None and perm[-1] != rank - 1)


def _is_scale(step: Step, subject: Subject) -> bool:
    """Whether all is multiplied or divided by one stored number."""
    if not is_onnx(step.node, "Mul", "Div") or (is_onnx(step.node, "Div") and step.position != 0):
        return False
    return _is_number(_other(step), subject)


def _is_number(value: ir.Value | None, subject: Subject) -> bool:
    tensor = subject.stored(value)
    return tensor is not None and tensor.size == 1


def _of_sharing(found: Attention) -> Iterator[Reason]:
    inside = [found.scores, *(s.node for s in found.before), found.softmax, *(s.node for s in found.after)]
    for node, reader in zip(inside, [*inside[1:], found.mix], strict=True):
        value = node.outputs[0]
        is_twice = node is found.scores and len(value.uses()) > 1
        if is_twice or value.is_graph_output() or any(use.node is not reader for use in value.uses()):
            yield Reason(f"{value.name} is read elsewhere too", "a fused attention keeps no such tensor")


def _is_quantized(found: Attention, subject: Subject) -> bool:
    """Whether the products are computed in the quantized type; else a Q/DQ pair rounds in front of the kernel."""
    queries, keys, probabilities, _ = (quantized_type(value, subject) for value in found.operands)
    return (queries is not None and keys is not None) or probabilities is not None


def _of_quantization(found: Attention, subject: Subject) -> Iterator[Reason]:
    if not _is_quantized(found, subject):
        return
    types = [quantized_type(value, subject) for value in found.operands]
    names = ("queries", "keys", "probabilities", "values")
    missing = [name for name, dtype in zip(names, types, strict=True) if dtype is None]
    if missing:
        yield Reason(
            f"it is quantized, its {listed(missing, 4)} are not", "a Q/DQ pair at each operand of both products"
        )
    elif types[0] == ir.DataType.INT8 and not requantized(found.mix.outputs[0]):
        yield Reason("it is quantized, its result is not", "a Q/DQ pair after the second product")


def _of_type(found: Attention, subject: Subject) -> Iterator[Reason]:
    if _is_quantized(found, subject):
        return
    for value in (found.operands[0], found.operands[3]):
        dtype = subject.inference.dtype(value)
        if dtype is not None and not _is_half(dtype):
            found_type = _PRECISIONS.get(dtype, dtype.name).upper()
            hint = "convert the model to FP16, BF16 or INT8"
            yield Reason(f"its products are {found_type}; fused kernels are FP16, BF16, INT8 and FP8", hint, False)
            return


def _of_size(found: Attention, subject: Subject) -> Iterator[Reason]:
    query, dims = found.operands[0], subject.inference.dims(found.scores.outputs[0])
    size, tokens = head_dim(found, subject), _tokens(dims)
    quantized = quantized_type(query, subject) if _is_quantized(found, subject) else None
    is_half = quantized is not None or _is_half(subject.inference.dtype(query))
    if size is None:
        if subject.inference.dims(query) is not None and _is_contracted_last(found.scores):
            yield Reason("the channels of its heads are not constant", "give the heads a fixed size")
    else:
        values = subject.inference.dims(found.mix.outputs[0])
        if values and values[-1] != size:
            text = f"its heads have {size} channels, their values {_text(values[-1:])[1:-1]}"
            yield Reason(text, "as many channels in both", is_half)
        if quantized == ir.DataType.INT8:
            yield from (Reason(text, "keep this attention in FP16") for text in int8_limits(found, subject))
        elif size not in (HEAD_DIMS if quantized is None else FP8_HEAD_DIMS):
            yield Reason(f"its heads have {size} channels", f"{HEAD_DIMS.start} to {HEAD_DIMS.stop - 1}", is_half)
        elif size % 8 and subject.version < (10, 14):
            yield Reason(f"its heads have {size} channels", "a multiple of 8, or TensorRT 10.14", is_half)
    if tokens is None:
        return
    queries, keys = tokens
    if quantized is None and keys == 1:
        yield Reason("it has one key: its Softmax is 1", "its values are its result", is_half)
    elif quantized == ir.DataType.INT8 and queries == 1:
        yield Reason("it is quantized and has one query", "keep this attention in FP16")
    elif quantized == ir.DataType.FLOAT8E4M3FN and keys < FP8_KEYS and queries > 1:
        yield Reason(f"it is FP8 and has {keys} keys, a fused one {FP8_KEYS}", "keep this attention in FP16")


def int8_limits(found: Attention, subject: Subject) -> Iterator[str]:
    """Say which limits of the fused INT8 kernels an attention exceeds."""
    size, dims = head_dim(found, subject), subject.inference.dims(found.scores.outputs[0])
    if size is not None and size not in INT8_HEAD_DIMS:
        yield f"its heads have {size} channels, fused INT8 attention has {', '.join(map(str, INT8_HEAD_DIMS))}"
    tokens = _tokens(dims)
    if tokens is not None and tokens[1] > INT8_KEYS:
        yield f"it has {tokens[1]} tokens, fused INT8 attention at most {INT8_KEYS}"


def _is_half(dtype: ir.DataType | None) -> bool:
    return dtype in _HALF


def _text(dims: Dims) -> str:
    return "[" + ", ".join(str(d) if is_fixed(d) else "batch" for d in dims) + "]"


_FORBIDDEN_OPERANDS = ("past_key", "past_value")

_PASSED_OVER = ("left_window_size", "right_window_size")


def attention_operator(subject: Subject) -> Iterator[Problem]:
    """Rule 7: ONNX's Attention has the operands, attributes and single result that the parser takes.

    Of what it does not take it passes over some in silence, and the engine would compute something else.

    Source: onnx-tensorrt docs/operators.md, row Attention; NVIDIA/TensorRT issues 4738 and 4739 (several results, and
    Attention inside an If); TensorRT's ``IAttention``: a mask or a causal one, keys and values of one shape. The parser
    of TensorRT for RTX 1.7 reads neither ``nonpad_kv_seqlen`` nor the window sizes. ``TRT_decomposable`` and
    ``TRT_normalization_op`` are the parser's own attributes: ONNX's checker and ONNX Runtime refuse a model that has
    them.
    """
    for node in subject.nodes:
        if not is_onnx(node, "Attention"):
            continue
        if len(node.outputs) > 1:  # with a name or without
            extra = listed(o.name or "one without a name" for o in node.outputs[1:])
            yield error(node, f"it has more than one result: {extra}", "keep the first only")
        for i, name in enumerate(_FORBIDDEN_OPERANDS, 4):
            if operand(node, i) is not None:
                yield error(node, f"its operand {name} is not supported")
        if operand(node, 6) is not None:
            yield differs(node, "TensorRT passes over its operand nonpad_kv_seqlen", "give it a mask")
        for name in _PASSED_OVER:
            if attribute(node, name, -1) >= 0:
                yield differs(node, f"TensorRT passes over its attribute {name}", "give it a mask")
        if "softmax_precision" in node.attributes:
            yield error(node, "its attribute softmax_precision is not supported", "leave it out")
        if attribute(node, "softcap", 0.0):
            yield error(node, "its attribute softcap is not supported")
        for name in ("TRT_decomposable", "TRT_normalization_op"):
            if name in node.attributes:
                hint = "set it on the layer of the TensorRT network; ONNX's checker and ONNX Runtime refuse it here"
                yield warning(node, f"{name} is no attribute of ONNX", hint)
        if node.graph is not subject.graph:
            make = error if subject.version < (11,) else warning  # seen to fail in 10.16
            yield make(node, "Attention inside the body of a control-flow operator", "move it out")
        yield from _attention_operands(node, subject)
        yield from _attention_shapes(node, subject)


def _attention_operands(node: ir.Node, subject: Subject) -> Iterator[Problem]:
    inference = subject.inference
    heads = attribute(node, "q_num_heads", 0) and attribute(node, "kv_num_heads", 0)
    for name, value in zip(("Q", "K", "V"), node.inputs, strict=False):
        rank = inference[value].rank
        if rank is not None and rank != 4 and not (rank == 3 and heads):
            yield error(node, f"{name} has {rank} dimensions", "[batch, heads, tokens, channels]")
    mask = inference[operand(node, 3)]
    if mask.rank is not None and mask.rank > 4:
        yield error(node, f"its mask has {mask.rank} dimensions", "at most 4, broadcastable to [B, N, Sq, Skv]")
    query = inference.dtype(operand(node, 0))
    if mask.dtype is not None and query is not None and mask.dtype not in (ir.DataType.BOOL, query):
        yield error(node, f"its mask is {type_name(mask.dtype)}, Q is {type_name(query)}", "BOOL, or the type of Q")
    if operand(node, 3) is not None and attribute(node, "is_causal", 0):
        yield error(node, "it has a mask and is causal", "add the causal mask to the other one")


def _attention_shapes(node: ir.Node, subject: Subject) -> Iterator[Problem]:
    """Keys and values have one shape, heads are shared evenly, and the mask broadcasts to the scores."""
    shapes = [_by_head(node, i, subject) for i in range(3)]
    if any(shape is None for shape in shapes):
        return
    query, key, value = (shape for shape in shapes if shape is not None)
    if key != value:
        yield error(
            node, f"K has shape {shape_text(key)}, V has {shape_text(value)}", "TensorRT takes one shape for both"
        )
        return
    if key[1] and query[1] % key[1]:
        yield error(node, f"{query[1]} heads of Q for {key[1]} of K", "a multiple")
    is_plain = operand(node, 3) is None and not attribute(node, "is_causal", 0) and query[1] == key[1]
    is_lone = subject.inference[operand(node, 0)].rank == 3 and query[2] == 1 and not dynamic_axes(query)
    if is_plain and is_lone and (query[1] == 1 or query[3] % 8):
        found = f"one query in three dimensions, with {query[1]} heads of {query[3]} channels"
        yield error(node, found, "four dimensions, [batch, heads, 1, channels]: the builder has no kernel for it")
    mask, scores = subject.inference[operand(node, 3)].dims, (*query[:3], key[2])
    if mask is not None and len(mask) <= len(scores):
        pairs = zip(reversed(mask), reversed(scores), strict=False)
        if any(size not in (1, wanted) for size, wanted in pairs):
            found = f"its mask has shape {shape_text(mask)}"
            yield error(node, found, f"broadcastable to {shape_text(scores)}: batch, heads, queries, keys")


def _by_head(node: ir.Node, position: int, subject: Subject) -> Dims | None:
    """Return the shape of Q, K or V as [batch, heads, tokens, channels]; None where it is not known, or is no such."""
    dims = subject.inference[operand(node, position)].dims
    if dims is None or len(dims) == 4:
        return dims
    heads = attribute(node, "kv_num_heads" if position else "q_num_heads", 0)
    if len(dims) != 3 or heads <= 0 or dims[2] % heads:
        return None
    return dims[0], heads, dims[1], dims[2] // heads
