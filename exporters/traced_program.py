"""What is changed in a traced program before it is translated to ONNX: operators whose own translation does not serve.

Before -> after::

    adaptive_avg_pool2d(x, 1)                    -> mean(x, [-2, -1], keepdim)
    a, b = chunk(x, 2, -1)                       -> slice(x, -1, 0, 32), slice(x, -1, 32, 64)
    tensor_split, split, meshgrid, hstack, ...   -> the slices, views and concatenations that they are
    type_as(x, y) of one type                    -> x

PyTorch's operators that give or take a list become ONNX sequences, which TensorRT does not read; each is taken apart
into operators on single tensors, by PyTorch's own decomposition of it.
"""

from __future__ import annotations

import operator
from typing import TYPE_CHECKING, Any

import torch
from torch.fx.experimental.proxy_tensor import make_fx

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from torch.export import ExportedProgram

_aten = torch.ops.aten


def prepare(program: ExportedProgram) -> None:
    """Change a program in place; see the module's documentation."""
    graph = program.graph
    for node in list(graph.nodes):
        if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
            continue
        if node.target in _GLOBAL_POOLS:
            _pool_by_mean(node)
        elif node.target == _aten.type_as.default and _type(node) == _type(node.args[0]):
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
        elif _becomes_a_sequence(node):
            _take_apart(node)
    (results,) = next(node for node in graph.nodes if node.op == "output").args
    for spec, result in zip(program.graph_signature.output_specs, results, strict=True):
        if isinstance(result, torch.fx.Node):
            spec.arg.name = result.name


# --- pooling ---------------------------------------------------------------------------------------------------------

_GLOBAL_POOLS = {
    _aten.adaptive_avg_pool1d.default: [-1],
    _aten.adaptive_avg_pool2d.default: [-2, -1],
}


def _pool_by_mean(node: torch.fx.Node) -> None:
    """Write pooling to one element as the mean that it is: its own translation gathers each row of the batch."""
    if any(size != 1 for size in node.args[1]):  # type: ignore[union-attr]
        return
    graph = node.graph
    with graph.inserting_before(node):
        mean = graph.call_function(_aten.mean.dim, (node.args[0], _GLOBAL_POOLS[node.target], True))  # type: ignore[index]
    mean.meta = node.meta
    node.replace_all_uses_with(mean)
    graph.erase_node(node)


# --- lists of tensors ------------------------------------------------------------------------------------------------

_TRANSLATED_WITHOUT = frozenset({_aten.unbind, _aten.einsum, _aten.lstm, _aten.gru, _aten.rnn_relu, _aten.rnn_tanh})
"""Lists of these are read or made one tensor at a time; most are one operator of ONNX."""

_LISTS = frozenset({"List[Tensor]", "List[Optional[Tensor]]"})


def _becomes_a_sequence(node: torch.fx.Node) -> bool:
    """Say whether the translation of an operator would give or take a sequence.

    That is so where it returns a list, or where it takes one and PyTorch itself knows it as a composition of others.
    """
    target: Any = node.target
    if target.overloadpacket in _TRANSLATED_WITHOUT:
        return False
    schema = target._schema
    if any(str(result.type) in _LISTS for result in schema.returns):
        return True
    takes_list = any(str(argument.type) in _LISTS for argument in schema.arguments)
    composite = torch._C.DispatchKey.CompositeImplicitAutograd
    return takes_list and bool(target.has_kernel_for_dispatch_key(composite))


def _take_apart(node: torch.fx.Node) -> None:
    """Replace an operator by what PyTorch makes of it, operators on single tensors."""
    operands = node.all_input_nodes
    # This one alone would read the sizes as numbers, and the batch with them.
    target: Any = _aten.chunk.default if node.target == _aten.unsafe_chunk.default else node.target

    def run(*values: Any) -> Any:
        known = dict(zip(operands, values, strict=True))
        args, kwargs = torch.fx.map_arg((node.args, node.kwargs), lambda operand: known[operand])
        return target(*args, **kwargs)

    inline(node, run, operands, _AS_SLICES)


def _slices(x: torch.Tensor, sizes: Sequence[int], dim: int = 0) -> list[torch.Tensor]:
    parts, start = [], 0
    for size in sizes:
        parts.append(_aten.slice.Tensor(x, dim, start, start + size))
        start += size
    return parts


def _equal_slices(x: torch.Tensor, size: int, dim: int = 0) -> list[torch.Tensor]:
    length = _aten.sym_size.int(x, dim)  # reading all of its shape here would make a number of the batch
    return [_aten.slice.Tensor(x, dim, start, min(start + size, length)) for start in range(0, length, size)]


_AS_SLICES: dict[Any, Callable[..., Any]] = {
    _aten.split.Tensor: _equal_slices,
    _aten.unsafe_split.Tensor: _equal_slices,
    _aten.split_with_sizes.default: _slices,
    _aten.unsafe_split_with_sizes.default: _slices,
}
"""PyTorch's own decomposition of these is one for memory: views by strides."""


def inline(
    node: torch.fx.Node,
    function: Callable[..., Any],
    operands: Sequence[torch.fx.Node],
    decompositions: Mapping[Any, Callable[..., Any]] | None = None,
) -> None:
    """Put the operators that a function runs in place of a node.

    Args:
        node: the node; what it gave, the function gives.
        function: takes the values of the operands.
        operands: nodes of the same graph.
        decompositions: operator -> what is run in its place.
    """
    values = [operand.meta["val"] for operand in operands]
    mode = next(value.fake_mode for value in values if isinstance(value, torch.Tensor))  # type: ignore[attr-defined]
    with mode:
        traced = make_fx(function, decomposition_table=decompositions)(*values).graph
    traced.eliminate_dead_code()
    graph = node.graph
    placeholders = [inner for inner in traced.nodes if inner.op == "placeholder"]
    copies = dict(zip(placeholders, operands, strict=True))
    with graph.inserting_before(node):
        for inner in traced.nodes:
            if inner.op == "call_function":
                copies[inner] = graph.node_copy(inner, lambda operand: copies[operand])
                copies[inner].meta = {**node.meta, "val": inner.meta["val"]}
    (results,) = next(inner for inner in traced.nodes if inner.op == "output").args
    if isinstance(results, list | tuple):
        for user in list(node.users):
            assert user.target is operator.getitem, f"{node.target} is read as a list"
            user.replace_all_uses_with(copies[results[user.args[1]]])  # type: ignore[index]
            graph.erase_node(user)
    else:
        node.replace_all_uses_with(copies[results])
    graph.erase_node(node)


def _type(node: Any) -> torch.dtype | None:
    value = node.meta.get("val") if isinstance(node, torch.fx.Node) else None
    return value.dtype if isinstance(value, torch.Tensor) else None
