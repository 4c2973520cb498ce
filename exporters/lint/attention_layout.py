"""What of rule 16 is about how queries, keys and values lie in memory: where the compiler copies them, and where it
fails.

The kernel of an attention can read them where one unbiased product has put them, with any strides, and writes its
result as the next product reads it. That was seen in what TensorRT for RTX 1.7.1 compiles for SM86, SM89 and SM120.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from deploycli.exporters.graph.operators import is_onnx, operand
from deploycli.exporters.lint.element_types import attribute
from deploycli.exporters.lint.report import error, warning
from deploycli.exporters.lint.subject import MOVES, is_fixed, is_weight

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    import onnx_ir as ir

    from deploycli.exporters.graph.shapes import Dims
    from deploycli.exporters.lint.report import Problem
    from deploycli.exporters.lint.subject import Subject


def copied_operands(subject: Subject) -> Iterator[Problem]:
    """Yield the operators Attention behind unbiased products whose operands and result are copied.

    A block of them is 9 launches, and 5 to 6 with MatMul, Softmax and MatMul. With a fixed batch and no mask both forms
    are alike; behind a bias they differ by one launch or none, as it is a kernel that copies; and an attention that
    reads no product is better as the operator.
    """
    for node in subject.nodes:
        if not is_onnx(node, "Attention") or not _reads_product(operand(node, 0), subject):
            continue
        dims = subject.inference.dims(operand(node, 0))
        is_dynamic = dims is not None and not all(map(is_fixed, dims))
        if is_dynamic or operand(node, 3) is not None:
            why = "its batch is dynamic" if is_dynamic else "it has a mask"
            found = f"the compiler copies the operands and the result of the operator Attention, as {why}"
            yield warning(node, found, "write it as MatMul, Softmax and MatMul: no --attention onnx")


def _reads_product(value: ir.Value | None, subject: Subject) -> bool:
    """Whether a value is what a product by a constant made, moved and with a scale."""
    product = _source(value, subject, *MOVES, "Mul")
    return product is not None and is_onnx(product, "MatMul") and is_weight(operand(product, 1), subject)


def lone_heads(query: ir.Value | None, where: ir.Node, subject: Subject) -> Iterator[Problem]:
    """Say of an attention that the builder fails at it: MyelinCheckException, CHECK(new_stride_order[i1] != ...).

    It has one head, its queries come unbiased from a product, and their tokens lie between images and windows: rows
    [B, N, W, C] or [W, N, B, C], scores [B, W, 1, N, N] or [1, W, B, N, N]. Two heads, a bias, rows [N, B, W, C] or
    scores [B, 1, W, N, N] are built, whatever the mask is.
    """
    turned = _source(query, subject, "Mul", "Reshape")
    if turned is None or not is_onnx(turned, "Transpose"):
        return
    product = _source(operand(turned, 0), subject, "Reshape")
    if product is None or not is_onnx(product, "MatMul") or not is_weight(operand(product, 1), subject):
        return
    dims = subject.inference.dims(turned.outputs[0])
    perm: list[int] = attribute(turned, "perm", [])
    if dims is not None and len(dims) == len(perm) == 5 and _is_torn(dims, perm):
        found = "the builder fails: it has one head, and its tokens lie between images and windows"
        yield error(where, found, "put the axis of the one head between images and windows")


def _source(value: ir.Value | None, subject: Subject, *through: str) -> ir.Node | None:
    """Return what makes a value, seen through operators whose other operands are stored."""
    while value is not None and (node := value.producer()) is not None:
        if not is_onnx(node, *through):
            return node
        value = next((given for given in node.inputs if not is_weight(given, subject)), None)
    return None


def _is_torn(dims: Dims, perm: Sequence[int]) -> bool:
    """Whether two axes of a batch, [.., .., tokens, channels], are neighbours that have the tokens between them in
    memory; ``dims`` are those behind the Transpose.
    """
    batch = [axis for axis in range(3) if dims[axis] != 1]
    if len(batch) != 2 or batch == [0, 2] or dims[3] == 1 or perm[4] != 4:
        return False
    first, second = sorted(perm[axis] for axis in batch)
    return first < perm[3] < second
