"""Rule 16: has an attention the form that TensorRT documents as fusable?

The products are FP16, BF16 or between Q/DQ pairs; the scale multiplies the queries or keys before the first product; a
mask is added and broadcasts to [B or 1, N or 1, Sq, Skv]; a head has 16 to 256 channels, before TensorRT 10.14 in steps
of 8. INT8 attention has heads of 16, 32 or 64 channels and at most 512 tokens, and is quantized before the first
product, after the Softmax and after the second product.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import onnx_ir as ir

from exporters.tensorrt.lint.attention import (
    MOVES,
    Attention,
    Step,
    find_attention,
    is_fixed,
    made_by,
    quantized_type,
    requantized,
)
from exporters.tensorrt.lint.element_types import attribute, is_onnx
from exporters.tensorrt.lint.problem import listed, name_of, warning
from exporters.tensorrt.lint.report import AttentionBlock
from exporters.tensorrt.lint.subject import operand
from exporters.tensorrt.lint.types import attention_operator

if TYPE_CHECKING:
    from collections.abc import Iterator

    from exporters.rewrite.facts import Dims
    from exporters.tensorrt.lint.problem import Problem
    from exporters.tensorrt.lint.subject import Subject

HEAD_DIMS = range(16, 257)
INT8_HEAD_DIMS = (16, 32, 64)
INT8_TOKENS = 512

_HALF = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)

_HARMLESS = ("Add", "Cast", "DequantizeLinear", "Dropout", "Identity")
"""Operators between the products that have rules of their own, or do nothing."""

_PRECISIONS = {
    ir.DataType.FLOAT: "fp32",
    ir.DataType.FLOAT16: "fp16",
    ir.DataType.BFLOAT16: "bf16",
    ir.DataType.INT8: "int8",
    ir.DataType.FLOAT8E4M3FN: "fp8",
}


@dataclass(frozen=True)
class Reason:
    """Why an attention has no documented form.

    Attributes:
        text: what was found.
        hint: what to do.
        is_finding: whether to warn of it: that an FP32 graph is not FP16 is no news to its owner.
    """

    text: str
    hint: str
    is_finding: bool = True


def attention_form(subject: Subject) -> Iterator[Problem]:
    """Rule 16: every attention made of primitive operators has the documented form.

    Source: TensorRT documentation, "Transformers and Fused Attention" (11.x) and "Multi-Head Attention Fusion" (10.x);
    release notes of 10.14 (head sizes) and 11.3 (FP32 accumulation); issues 2981 and 4167 of NVIDIA/TensorRT (INT8).
    """
    for found in find_attention(subject):
        for reason in _reasons(found, subject):
            if reason.is_finding:
                yield warning(found.softmax, f"the attention has no documented form: {reason.text}", reason.hint)


def attention_blocks(subject: Subject) -> list[AttentionBlock]:
    """Return every attention block with the verdict of rules 7 and 16 on it."""
    blocks = {found.softmax: _block(found, subject) for found in find_attention(subject)}
    problems = [p for p in attention_operator(subject) if p.level == "error"]
    for node in subject.nodes:
        if is_onnx(node, "Attention"):
            reasons = tuple(p.message for p in problems if p.where == name_of(node))
            query, key = (subject.inference[operand(node, i)] for i in (0, 1))
            heads = attribute(node, "q_num_heads", 0)
            width = None if query.dims is None or not query.dims or not is_fixed(query.dims[-1]) else query.dims[-1]
            blocks[node] = AttentionBlock(
                name_of(node),
                _PRECISIONS.get(query.dtype, "") if query.dtype is not None else "",
                width // heads if width is not None and query.rank == 3 and heads > 0 else width,
                _tokens(None if query.dims is None or key.dims is None else (*query.dims[-2:-1], *key.dims[-2:-1])),
                _bytes(operand(node, 3), subject),
                reasons,
            )
    return [blocks[node] for node in subject.nodes if node in blocks]


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
    is_known = dims is not None and len(dims) > 1 and found.scores.op_type == "MatMul" and is_fixed(dims[-1])
    return dims[-1] if dims is not None and is_known else None


def _tokens(dims: Dims | None) -> tuple[int, int] | None:
    if dims is None or len(dims) < 2 or not all(is_fixed(d) for d in dims[-2:]):
        return None
    return dims[-2], dims[-1]


def _bytes(value: ir.Value | None, subject: Subject) -> int:
    tensor = subject.stored(value)
    return 0 if tensor is None or tensor.dtype.is_string() else int(tensor.nbytes)


def _other(step: Step) -> ir.Value | None:
    """Return the operand of a sum or product that does not lead on."""
    return operand(step.node, 1 - step.position)


def _reasons(found: Attention, subject: Subject) -> list[Reason]:
    reasons = [*_of_shape(found, subject), *_of_mask(found, subject), *_of_neighbours(found, subject)]
    reasons += [*_of_sharing(found), *_of_quantization(found, subject), *_of_size(found, subject)]
    return reasons


def _of_shape(found: Attention, subject: Subject) -> Iterator[Reason]:
    for node in (found.scores, found.context):
        if node.op_type == "Einsum":
            yield Reason("its products are Einsum", "write them as MatMul")
            break
    dims = subject.inference.dims(found.scores.outputs[0])
    if dims is None:
        yield Reason("its shapes are not known", "see rule 10")
    elif len(dims) != 4:
        yield Reason(f"its products are {len(dims)}-D", "reshape queries, keys and values to [batch, heads, tokens, D]")
    axis = attribute(found.softmax, "axis", -1 if subject.opset >= 13 else 1)
    rank = subject.inference[found.softmax.inputs[0]].rank
    if axis != -1 and axis + 1 != rank:
        yield Reason(f"its Softmax is on axis {axis}", "put the keys on the last axis")


def _of_mask(found: Attention, subject: Subject) -> Iterator[Reason]:
    inference = subject.inference
    sums = [step for step in found.before if is_onnx(step.node, "Add")]
    scores = inference.dims(found.scores.outputs[0])
    if len(sums) > 1:
        yield Reason(f"{len(sums)} terms are added to its scores", "sum bias and mask into one constant")
    for step in sums:
        mask, given = inference.dims(_other(step)), inference.dims(operand(step.node, step.position))
        if mask is None or given is None or scores is None:
            continue
        if len(given) > max(len(scores), 4) or len(mask) > 4:
            name = "[B, nW, N, S, S]" if len(given) == 5 else f"{len(given)} dimensions"
            hint = "fold the windows into the heads: q, k, v [B, nW*N, S, D] and one constant [1, nW*N, S, S]"
            yield Reason(f"its mask is added in {len(given)}-D, {name}, between Reshapes", hint)
        elif inference.dims(step.node.outputs[0]) != given:
            yield Reason(f"its mask {_text(mask)} does not broadcast to its scores {_text(given)}", "[1, N, Sq, Skv]")
        elif given != scores:
            yield Reason("its mask is added between Reshapes", "add it in the shape of the scores")


def _of_neighbours(found: Attention, subject: Subject) -> Iterator[Reason]:
    """What else stands between the products."""
    dtype = subject.inference.dtype
    is_fp8 = quantized_type(found.operands[0], subject) == ir.DataType.FLOAT8E4M3FN
    is_mask_moved = any(is_onnx(step.node, "Add") for step in found.before)
    others = []
    for step in found.before:
        node = step.node
        if is_onnx(node, "Mul", "Div"):
            if not is_fp8:
                yield Reason(
                    f"its scale ({node.op_type}) comes after the first product", "multiply the queries by it instead"
                )
        elif is_onnx(node, "QuantizeLinear"):
            yield Reason("its scores are quantized before the Softmax", "remove that Q/DQ pair")
        elif not is_onnx(node, *_HARMLESS) and not (is_mask_moved and is_onnx(node, *MOVES)):
            others.append(node.op_type)
    if others:
        yield Reason(f"{listed(others)} between the first product and the Softmax", "only a mask may be added there")
    casts = [any(is_onnx(step.node, "Cast") for step in steps) for steps in (found.before, found.after)]
    if casts[0] and dtype(found.scores.outputs[0]) in _HALF and dtype(found.softmax.inputs[0]) == ir.DataType.FLOAT:
        hint = "--allow-fp16 softmax, where verify shows that the numbers stay within their budget"
        yield Reason("its Softmax runs in FP32 between Casts", hint)
    elif casts[0] or (casts[1] and not is_fp8):
        yield Reason("a Cast stands between its products", "compute all of it in one type")
    after = [s.node.op_type for s in found.after if not is_onnx(s.node, "QuantizeLinear", *_HARMLESS)]
    if after:
        yield Reason(f"{listed(after)} between the Softmax and the second product", "nothing may stand there")


def _of_sharing(found: Attention) -> Iterator[Reason]:
    inside = [found.scores, *(s.node for s in found.before), found.softmax, *(s.node for s in found.after)]
    for node in inside:
        value = node.outputs[0]
        if len(value.uses()) > 1 or value.is_graph_output():
            yield Reason(f"{value.name} is read elsewhere too", "a fused attention keeps no such tensor")


def _of_quantization(found: Attention, subject: Subject) -> Iterator[Reason]:
    types = [quantized_type(value, subject) for value in found.operands]
    if not any(types):
        return
    names = ("queries", "keys", "probabilities", "values")
    missing = [name for name, dtype in zip(names, types, strict=True) if dtype is None]
    if missing:
        yield Reason(
            f"it is quantized, its {listed(missing, 4)} are not", "a Q/DQ pair at each operand of both products"
        )
    elif not requantized(found.context.outputs[0]):
        yield Reason("it is quantized, its result is not", "a Q/DQ pair after the second product")


def _of_size(found: Attention, subject: Subject) -> Iterator[Reason]:
    query = found.operands[0]
    dtype, quantized = subject.inference.dtype(query), quantized_type(query, subject)
    size = head_dim(found, subject)
    if size is None:
        if found.scores.op_type == "MatMul" and subject.inference.dims(query) is not None:
            yield Reason("the channels of its heads are not constant", "give the heads a fixed size")
    elif quantized == ir.DataType.INT8:
        yield from (Reason(text, "keep this attention in FP16") for text in int8_limits(found, subject))
    elif size not in HEAD_DIMS:
        yield Reason(f"its heads have {size} channels", f"{HEAD_DIMS.start} to {HEAD_DIMS.stop - 1}", _is_half(dtype))
    elif size % 8 and subject.version < (10, 14):
        yield Reason(f"its heads have {size} channels", "a multiple of 8, or TensorRT 10.14", _is_half(dtype))
    if quantized is None and dtype is not None and not _is_half(dtype) and not _accumulates_in_fp32(found, subject):
        hint = "convert the model to FP16, BF16 or INT8"
        found_type = _PRECISIONS.get(dtype, dtype.name).upper()
        yield Reason(f"its products are {found_type}; fused kernels are FP16, BF16, INT8 and FP8", hint, False)


def int8_limits(found: Attention, subject: Subject) -> Iterator[str]:
    """Say which limits of the fused INT8 kernels an attention exceeds."""
    size, dims = head_dim(found, subject), subject.inference.dims(found.scores.outputs[0])
    if size is not None and size not in INT8_HEAD_DIMS:
        yield f"its heads have {size} channels, fused INT8 attention has {', '.join(map(str, INT8_HEAD_DIMS))}"
    tokens = _tokens(dims)
    if tokens is not None and max(tokens) > INT8_TOKENS:
        yield f"it has {max(tokens)} tokens, fused INT8 attention at most {INT8_TOKENS}"


def _is_half(dtype: ir.DataType | None) -> bool:
    return dtype in _HALF


def _accumulates_in_fp32(found: Attention, subject: Subject) -> bool:
    """From 11.3 on queries, keys and values that are cast up around an FP32 attention ask for FP32 accumulation."""
    if subject.version < (11, 3):
        return False
    for value in (*found.operands[:2], found.operands[3]):
        node = made_by(value, "Mul", "Div")
        if node is None or not is_onnx(node, "Cast") or not _is_half(subject.inference.dtype(operand(node, 0))):
            return False
    return True


def _text(dims: Dims) -> str:
    return "[" + ", ".join(str(d) if is_fixed(d) else "batch" for d in dims) + "]"
