"""Rules 14 and 17 to 19: stored numbers that a smaller type cannot hold, and what is there for nothing."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from deploycli.exporters.graph.operators import QDQ, is_onnx, operand
from deploycli.exporters.graph.unique import listed
from deploycli.exporters.lint.element_types import attribute
from deploycli.exporters.lint.fused_attention import attention_blocks
from deploycli.exporters.lint.report import type_name, warning
from deploycli.exporters.lint.subject import dequantized, is_weight, pieces
from deploycli.exporters.lint.types import FLOATS

if TYPE_CHECKING:
    from collections.abc import Iterator

    from deploycli.exporters.graph.movement_ops import Array
    from deploycli.exporters.lint.report import Problem
    from deploycli.exporters.lint.subject import Subject

    _Groups = dict[tuple[object, ...], list[tuple[str, ir.TensorProtocol]]]

FP16_MAX = 65504.0
FP16_SMALLEST_NORMAL = 2.0**-14
FP16_HALF_OF_SMALLEST = 2.0**-25
"""What is not above this becomes 0 in FP16."""

MOST_SUBNORMAL = 0.05
"""Share of a tensor's elements. Of normally distributed weights of a vision transformer (sigma 0.02) 0.2 % are."""

MASK_BYTES = 64 * 2**20
"""Constants of all attentions together above this are worth a word, bytes."""

REPEATED_BYTES = 1024
"""Equal tensors below this are not looked at: shapes, scales and zero points, bytes."""

REPEATED_SHARE = 0.001
"""Bytes that are stored again are worth a word from this share of all that is stored: untrained biases are all zero."""

_MANY_INDICES = 4096
"""A Gather of a stored table with more indices than this should have been folded, elements."""

_ACTIVATIONS = ("Add", "Div", "Erf", "Gelu", "HardSwish", "Mul", "Relu")
"""What a product's kernel computes, GELU in one operator or spelled out; Sigmoid and Tanh it does not."""

_WIDER = {
    (ir.DataType.FLOAT, ir.DataType.DOUBLE),
    (ir.DataType.FLOAT16, ir.DataType.FLOAT),
    (ir.DataType.BFLOAT16, ir.DataType.FLOAT),
    (ir.DataType.INT32, ir.DataType.INT64),
    (ir.DataType.BOOL, ir.DataType.INT32),
    (ir.DataType.BOOL, ir.DataType.INT64),
}
"""Casts that lose nothing: the way back returns the operand."""


@dataclass
class _Range:
    """What rule 14 counts of one tensor."""

    size: int = 0
    nan: int = 0
    infinite: int = 0
    masked: int = 0
    above: int = 0
    flushed: int = 0
    subnormal: int = 0

    def add(self, array: Array) -> None:
        magnitude = np.abs(array)
        self.size += array.size
        self.nan += int(np.isnan(magnitude).sum())
        infinite = np.isinf(magnitude)
        self.infinite += int(infinite.sum())
        self.masked += int((infinite & (array < 0)).sum())
        self.above += int(((magnitude > FP16_MAX) & ~infinite).sum())
        self.flushed += int(((magnitude <= FP16_HALF_OF_SMALLEST) & (magnitude > 0)).sum())
        self.subnormal += int(((magnitude < FP16_SMALLEST_NORMAL) & (magnitude > 0)).sum())


def stored_numbers(subject: Subject) -> Iterator[Problem]:
    """Rule 14: stored numbers are finite, and FP16 holds them.

    Source: IEEE 754 binary16: nothing above 65504, below 6.1e-5 fewer digits, below 3e-8 nothing. A mask of -inf gives
    NaN in a row that is masked throughout.
    """
    scales = {operand(n, 1) for n in subject.nodes if is_onnx(n, *QDQ)}
    of_rule_6 = {value.name for value in scales if value is not None}
    for name, tensor in subject.tensors:
        if tensor.dtype not in FLOATS | {ir.DataType.DOUBLE} or name in of_rule_6:
            continue
        array = subject.read(tensor)
        if array is None:
            yield warning(name, "its numbers cannot be read and were not checked", "see rule 13")
            continue
        counts = _Range()
        for piece in pieces(array):
            counts.add(piece.astype(np.float32) if piece.dtype.itemsize == 2 else piece)
        yield from _numbers(name, tensor.dtype, counts)


def _numbers(name: str, dtype: ir.DataType, counts: _Range) -> Iterator[Problem]:
    if counts.nan:
        yield warning(name, f"{counts.nan} of {counts.size} values are NaN", "the weights are broken: load others")
    if counts.masked:
        hint = "mask with a finite value (-100, -1e4): a row that is masked throughout becomes NaN"
        yield warning(name, f"{counts.masked} of {counts.size} values are -inf", hint)
    if counts.infinite > counts.masked:
        found = f"{counts.infinite - counts.masked} of {counts.size} values are infinite"
        yield warning(name, found, "keep in FP32 what overflows in FP16" if dtype == ir.DataType.FLOAT16 else "")
    if counts.above:
        found = f"{counts.above} of {counts.size} values are above {FP16_MAX:g} and become infinite in FP16"
        yield warning(name, found, "keep its reader in FP32")
    if counts.subnormal > MOST_SUBNORMAL * counts.size:
        share = f"{counts.subnormal / counts.size:.0%} of its values are subnormal in FP16"
        lost = f", {counts.flushed} become 0" if counts.flushed else ""
        yield warning(name, share + lost, "scale the tensor, or keep its reader in FP32")


def redundant_pairs(subject: Subject) -> Iterator[Problem]:
    """Rule 17: no two operators undo each other, and attention constants are not stored once a block for nothing.

    Source: TensorRT documentation, "Strongly Typed Networks" (a Cast is a layer of its own); arithmetic.
    """
    dtype = subject.inference.dtype
    for node in subject.nodes:
        source = operand(node, 0)
        before = None if source is None else source.producer()
        if source is None or not is_onnx(node, "Cast", "Reshape", "Transpose"):
            continue
        if node.op_type == "Cast" and dtype(source) == dtype(node.outputs[0]) is not None:
            yield warning(node, f"it casts {type_name(dtype(source))} to itself", "remove it")
        elif before is not None and is_onnx(before, node.op_type):
            yield from _pair(before, node, subject)
    yield from _attention_constants(subject)


def _pair(first: ir.Node, second: ir.Node, subject: Subject) -> Iterator[Problem]:
    dtype = subject.inference.dtype
    if first.op_type == "Cast":
        given, between, made = dtype(operand(first, 0)), dtype(first.outputs[0]), dtype(second.outputs[0])
        if given is None or between is None or given != made:
            return
        if (given, between) in _WIDER:
            yield warning(second, f"it undoes {first.name}", "read what that reads")
        elif given in FLOATS and between in FLOATS:
            found = f"{type_name(given)} is cast to {type_name(between)} and back: that rounds, and saves nothing"
            yield warning(second, found, "keep both neighbours in one type")
    elif first.op_type == "Transpose" and "perm" in first.attributes and "perm" in second.attributes:
        perms = [attribute(node, "perm", [0]) for node in (first, second)]
        is_undone = len(perms[0]) == len(perms[1]) and [perms[0][i] for i in perms[1] if i < len(perms[0])] == sorted(
            perms[0]
        )
        yield warning(second, f"it undoes {first.name}" if is_undone else f"it follows {first.name}", "make them one")
    elif first.op_type == "Reshape" and len(first.outputs[0].uses()) == 1 and not first.outputs[0].is_graph_output():
        yield warning(second, f"it reshapes what {first.name} has reshaped", "make them one")


def _attention_constants(subject: Subject) -> Iterator[Problem]:
    blocks = [block for block in attention_blocks(subject) if block.constant_bytes]
    total = sum(block.constant_bytes for block in blocks)
    if total > MASK_BYTES:
        largest = max(block.constant_bytes for block in blocks)
        found = f"the constants of {len(blocks)} attentions take {total >> 20} MiB, up to {largest >> 20} MiB a block"
        yield warning(
            subject.name, found, "store one constant where blocks share their bias, or keep bias and mask apart"
        )


def unused_and_repeated(subject: Subject) -> Iterator[Problem]:
    """Rule 18: what is stored is read, and is stored once; what is an input is read.

    Source: TensorRT documentation, "Working with Dynamic Shapes": every input needs a shape in every profile. Equal
    weights are equal bytes of the engine.
    """
    for value in subject.graph.inputs:
        if not value.uses() and not value.is_graph_output() and value.const_value is None:
            yield warning(value.name or "", "nothing reads this input", "leave it out: a profile needs a shape for it")
    for graph in (subject.graph, *subject.graph.subgraphs()):
        for name, value in graph.initializers.items():
            if not value.uses() and not value.is_graph_output():
                yield warning(name, "nothing reads this initializer", "leave it out")
    stored = sum(int(tensor.nbytes) for _, tensor in subject.tensors if _is_readable(tensor, subject))
    for names, tensor in _equal_tensors(subject):
        wasted = (len(names) - 1) * int(tensor.nbytes)
        if wasted < REPEATED_SHARE * stored:
            continue
        found = f"{len(names)} tensors hold the same {tensor.nbytes} bytes: {listed(names)}"
        yield warning(names[0], found, f"store them once, {wasted} bytes less")


def _equal_tensors(subject: Subject) -> Iterator[tuple[list[str], ir.TensorProtocol]]:
    """Yield the names of tensors that are equal, largest reading last: most differ in shape or in their first bytes."""
    groups: _Groups = {}
    for name, tensor in subject.tensors:
        if not _is_readable(tensor, subject) or tensor.nbytes < REPEATED_BYTES:
            continue
        groups.setdefault((tensor.dtype, tuple(tensor.shape.numpy())), []).append((name, tensor))
    for is_whole in (False, True):
        finer: _Groups = {}
        for key, members in groups.items():
            for name, tensor in members if len(members) > 1 else ():
                array = subject.read(tensor)
                if array is not None:
                    finer.setdefault((*key, _digest(array, is_whole)), []).append((name, tensor))
        groups = finer
    for members in groups.values():
        if len(members) > 1:
            yield [name for name, _ in members], members[0][1]


def _is_readable(tensor: ir.TensorProtocol, subject: Subject) -> bool:
    return not tensor.dtype.is_string() and subject.fault(tensor) is None


def _digest(array: Array, is_whole: bool) -> bytes:
    digest = hashlib.sha256()
    for piece in pieces(array if is_whole else array.reshape(-1)[:256]):
        digest.update(np.ascontiguousarray(piece).view(np.uint8).data)
    return digest.digest()


def hard_to_fuse(subject: Subject) -> Iterator[Problem]:
    """Rule 19: no Einsum, no product on four axes whose bias leaves it, and no large lookup in a stored table.

    Source: TensorRT documentation, "Transformers and Fused Attention": fusion looks for MatMul; what TensorRT for RTX
    1.7.1 compiles. A lookup with constant indices in a constant table has a constant result.
    """
    for node in subject.nodes:
        if is_onnx(node, "Einsum"):
            equation = attribute(node, "equation", "")
            yield warning(node, f"Einsum {equation!r}", "write it as MatMul, which is what fusions look for")
        elif is_onnx(node, "MatMul"):
            yield from _bias_outside(node, subject)
        elif is_onnx(node, "Gather", "GatherElements", "GatherND"):
            table, indices = subject.stored(operand(node, 0)), subject.stored(operand(node, 1))
            if table is None or indices is None:
                continue
            count = math.prod(int(d) for d in indices.shape.numpy())
            if count > _MANY_INDICES:
                hint = "fold it: the result is a constant"
                yield warning(node, f"{node.op_type} looks up {count} entries of a stored table at run time", hint)


def _bias_outside(node: ir.Node, subject: Subject) -> Iterator[Problem]:
    """A product by a constant on four axes or more, between whose bias and the next product there is no norm.

    On three axes the product's own kernel adds the bias and computes the activation. A norm's kernel, too, takes what
    is in front of it; and what is quantized has no such kernel on three axes either.
    """
    dims = subject.inference.dims(operand(node, 0))
    is_deep = dims is not None and len(dims) > 3 and dims[0] != 1
    if not is_deep or not is_weight(operand(node, 1), subject) or is_weight(operand(node, 0), subject):
        return
    if any(dequantized(value) is not None for value in node.inputs):
        return
    biased = [reader for reader in node.outputs[0].consumers() if _is_bias(reader, subject)]
    if biased and _meets_product(biased[0], subject):
        found = f"a product on {len(dims or ())} axes: its bias, and what follows it, becomes a kernel of its own"
        yield warning(node, found, "reshape what it reads to three axes, which deploycli optimize does")


def _is_bias(node: ir.Node, subject: Subject) -> bool:
    return is_onnx(node, "Add") and any(
        is_weight(value, subject) and subject.inference[value].rank in (0, 1) for value in node.inputs
    )


def _meets_product(node: ir.Node, subject: Subject) -> bool:
    """Whether what a node makes is multiplied by a constant again, with nothing but activations in between."""
    waiting, seen = [node], {node}
    while waiting:
        for reader in waiting.pop().outputs[0].consumers():
            if is_onnx(reader, "MatMul"):
                if is_weight(operand(reader, 1), subject):
                    return True
            elif is_onnx(reader, *_ACTIVATIONS) and reader not in seen:
                seen.add(reader)
                waiting.append(reader)
    return False
