"""What the data-movement operators of ONNX do, on numpy arrays.

One table serves two readings. On real data it folds constants. On ``arange`` it tells, for every element of the
result, which element of the source it is; there the zero that a Pad adds is the marker :data:`NOWHERE`.

Source of the semantics: https://onnx.ai/onnx/operators/ (opsets 9 to 24, axes as attributes or as inputs).
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import onnx_ir as ir

Array: TypeAlias = np.ndarray[Any, np.dtype[Any]]
Operands: TypeAlias = "Sequence[Array | None]"

NOWHERE = -1
"""Source index of an element that is gathered from nowhere: a padded zero."""


def _ints(operand: Array | None) -> list[int] | None:
    return None if operand is None else [int(i) for i in operand.reshape(-1)]


def _axes(node: ir.Node, inputs: Operands, position: int) -> list[int] | None:
    """Axes stand in an attribute in old opsets and in an input in new ones."""
    if len(inputs) > position:
        return _ints(inputs[position])
    axes = node.attributes.get_ints("axes", None)
    return None if axes is None else list(axes)


def _required(operand: Array | None) -> Array:
    if operand is None:
        raise ValueError("an operand is missing")
    return operand


def _identity(_node: ir.Node, inputs: Operands, _zero: int) -> list[Array]:
    return [_required(inputs[0])]


def _reshape(node: ir.Node, inputs: Operands, _zero: int) -> list[Array]:
    data, target = _required(inputs[0]), list(_ints(inputs[1]) or [])
    if not node.attributes.get_int("allowzero", 0):
        target = [data.shape[i] if dim == 0 else dim for i, dim in enumerate(target)]
    return [data.reshape(target)]


def _transpose(node: ir.Node, inputs: Operands, _zero: int) -> list[Array]:
    perm = node.attributes.get_ints("perm", None)
    return [_required(inputs[0]).transpose(None if perm is None else tuple(perm))]


def _squeeze(node: ir.Node, inputs: Operands, _zero: int) -> list[Array]:
    data, axes = _required(inputs[0]), _axes(node, inputs, 1)
    return [data.squeeze(tuple(axes) if axes else None)]  # an empty list is none


def _unsqueeze(node: ir.Node, inputs: Operands, _zero: int) -> list[Array]:
    data, axes = _required(inputs[0]), _axes(node, inputs, 1)
    return [np.expand_dims(data, tuple(axes or ()))]


def _flatten(node: ir.Node, inputs: Operands, _zero: int) -> list[Array]:
    data = _required(inputs[0])
    axis = node.attributes.get_int("axis", 1)
    axis += data.ndim if axis < 0 else 0
    return [data.reshape(math.prod(data.shape[:axis]), math.prod(data.shape[axis:]))]


def _slice(node: ir.Node, inputs: Operands, _zero: int) -> list[Array]:
    data = _required(inputs[0])
    if len(inputs) > 1:
        starts, ends = _ints(inputs[1]), _ints(inputs[2])
        axes = _ints(inputs[3]) if len(inputs) > 3 else None
        steps = _ints(inputs[4]) if len(inputs) > 4 else None
    else:
        starts, ends = (list(node.attributes.get_ints(key, ())) for key in ("starts", "ends"))
        axes, steps = _axes(node, inputs, len(inputs)), None
    starts, ends = starts or [], ends or []
    axes = list(range(len(starts))) if axes is None else axes
    steps = [1] * len(starts) if steps is None else steps
    index: list[Any] = [slice(None)] * data.ndim
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        size = data.shape[axis]
        start, end = (i + size if i < 0 else i for i in (start, end))
        if step > 0:
            index[axis] = slice(max(start, 0), max(end, 0), step)
        else:  # the end of a backward slice may lie before the first element, which numpy spells None
            end = max(end, -1)
            index[axis] = slice(min(max(start, 0), size - 1), None if end < 0 else end, step)
    return [data[tuple(index)]]


def _split(node: ir.Node, inputs: Operands, _zero: int) -> list[Array]:
    data, axis = _required(inputs[0]), node.attributes.get_int("axis", 0)
    sizes = _ints(inputs[1]) if len(inputs) > 1 else None
    if sizes is None:
        attribute = node.attributes.get_ints("split", None)
        sizes = None if attribute is None else list(attribute)
    if sizes is None:
        count = len(node.outputs)
        chunk = -(-data.shape[axis] // count)  # the last chunk may be smaller
        sizes = [min(chunk, data.shape[axis] - i * chunk) for i in range(count)]
    outer: list[Any] = [slice(None)] * (axis % data.ndim)
    ends = np.cumsum(sizes).tolist()
    parts = ((*outer, slice(end - size, end)) for size, end in zip(sizes, ends, strict=True))
    return [data[part] for part in parts]


def _concat(node: ir.Node, inputs: Operands, _zero: int) -> list[Array]:
    return [np.concatenate([_required(x) for x in inputs], node.attributes.get_int("axis", 0))]


def _gather(node: ir.Node, inputs: Operands, _zero: int) -> list[Array]:
    data, indices = _required(inputs[0]), _required(inputs[1])
    axis = node.attributes.get_int("axis", 0)
    if isinstance(data, np.ndarray) and 0 in data.strides:  # one number, repeated: take() would spell it out first
        place: tuple[Any, ...] = (*(slice(None) for _ in range(axis % data.ndim)), indices)
        return [data[place]]
    return [data.take(indices, axis)]  # numpy and ONNX agree on negative indices


def _gather_elements(node: ir.Node, inputs: Operands, _zero: int) -> list[Array]:
    data, indices = _required(inputs[0]), _required(inputs[1])
    axis = node.attributes.get_int("axis", 0)
    where: list[Array] = list(np.indices(indices.shape, sparse=True))
    where[axis] = indices
    return [data[tuple(where)]]


def _gather_nd(_node: ir.Node, inputs: Operands, _zero: int) -> list[Array]:
    data, indices = _required(inputs[0]), _required(inputs[1])
    return [data[tuple(np.moveaxis(indices, -1, 0))]]


def _expand(_node: ir.Node, inputs: Operands, _zero: int) -> list[Array]:
    data, target = _required(inputs[0]), tuple(_ints(inputs[1]) or ())
    return [np.broadcast_to(data, np.broadcast_shapes(data.shape, target))]


def _tile(_node: ir.Node, inputs: Operands, _zero: int) -> list[Array]:
    return [np.tile(_required(inputs[0]), _ints(inputs[1]) or [])]


def _pad(node: ir.Node, inputs: Operands, zero: int) -> list[Array]:
    data, pads = _required(inputs[0]), _pads(node, inputs) or []
    axes = _ints(inputs[3]) if len(inputs) > 3 else None
    axes = list(range(data.ndim)) if axes is None else axes
    if not any(pads):
        return [data]
    widths = [(0, 0)] * data.ndim
    for i, axis in enumerate(axes):
        widths[axis] = (pads[i], pads[i + len(axes)])
    return [np.pad(data, widths, constant_values=zero)]


def _pads(node: ir.Node, inputs: Operands) -> list[int] | None:
    """Pads stand in an attribute in old opsets and in an input in new ones."""
    return _ints(inputs[1]) if len(inputs) > 1 else list(node.attributes.get_ints("pads", ()))


def _pads_with_zeros(node: ir.Node, inputs: Operands) -> bool:
    pads = _pads(node, inputs)
    if pads is None or min(pads, default=0) < 0:
        return False
    if not any(pads):
        return True
    if node.attributes.get_string("mode", "constant") != "constant":
        return False
    if len(inputs) < 3 or node.inputs[2] is None:
        return node.attributes.get_float("value", 0.0) == 0
    return inputs[2] is not None and not inputs[2].tobytes().strip(b"\0")  # a negative zero is not a zero


def _depth_to_space(node: ir.Node, inputs: Operands, _zero: int) -> list[Array]:
    data, size = _required(inputs[0]), node.attributes.get_int("blocksize", 1)
    b, c, h, w = data.shape
    if node.attributes.get_string("mode", "DCR") == "DCR":
        # [B, s, s, C/s², H, W] -> [B, C/s², H, s, W, s]
        moved = data.reshape(b, size, size, c // size**2, h, w).transpose(0, 3, 4, 1, 5, 2)
    else:
        # [B, C/s², s, s, H, W] -> [B, C/s², H, s, W, s]
        moved = data.reshape(b, c // size**2, size, size, h, w).transpose(0, 1, 4, 2, 5, 3)
    return [moved.reshape(b, c // size**2, h * size, w * size)]


def _space_to_depth(node: ir.Node, inputs: Operands, _zero: int) -> list[Array]:
    data, size = _required(inputs[0]), node.attributes.get_int("blocksize", 1)
    b, c, h, w = data.shape
    # [B, C, H/s, s, W/s, s] -> [B, s, s, C, H/s, W/s]
    moved = data.reshape(b, c, h // size, size, w // size, size).transpose(0, 3, 5, 1, 2, 4)
    return [moved.reshape(b, c * size**2, h // size, w // size)]


MOVEMENT: dict[str, Callable[[ir.Node, Operands, int], list[Array]]] = {
    "Concat": _concat,
    "DepthToSpace": _depth_to_space,
    "Expand": _expand,
    "Flatten": _flatten,
    "Gather": _gather,
    "GatherElements": _gather_elements,
    "GatherND": _gather_nd,
    "Identity": _identity,
    "Pad": _pad,
    "Reshape": _reshape,
    "Slice": _slice,
    "SpaceToDepth": _space_to_depth,
    "Split": _split,
    "Squeeze": _squeeze,
    "Tile": _tile,
    "Transpose": _transpose,
    "Unsqueeze": _unsqueeze,
}
"""Operators whose every output element is one input element or zero. ``fn(node, operands, zero) -> outputs``."""


def is_movement(node: ir.Node, operands: Operands) -> bool:
    """Say whether the operator only moves data.

    Args:
        node: the operator.
        operands: its inputs as far as they are known, None where one is not.
    """
    if node.domain != "" or node.op_type not in MOVEMENT:
        return False
    if node.op_type == "GatherND":
        return node.attributes.get_int("batch_dims", 0) == 0
    return node.op_type != "Pad" or _pads_with_zeros(node, operands)


def data_operands(node: ir.Node) -> tuple[int, ...]:
    """Return the positions of the operands that are moved; the others say where to."""
    return tuple(range(len(node.inputs))) if node.op_type == "Concat" else (0,)


def move(node: ir.Node, operands: Operands, *, zero: int = 0) -> list[Array]:
    """Apply an operator that :func:`is_movement`.

    Args:
        node: the operator.
        operands: its inputs as arrays, None where an optional one is absent.
        zero: what stands for a padded zero: 0 on data, :data:`NOWHERE` on indices.

    Raises:
        ValueError: the operands do not fit together.
    """
    try:
        return MOVEMENT[node.op_type](node, operands, zero)
    except (IndexError, RuntimeError) as error:  # an axis or an index outside the data, or too many axes
        raise ValueError(str(error)) from error


def swaps_last_axes(perm: Sequence[int]) -> bool:
    """Say whether a permutation swaps the last two axes and nothing else: a product reads such an operand in place."""
    rank = len(perm)
    return rank > 1 and tuple(perm) == (*range(rank - 2), rank - 1, rank - 2)
