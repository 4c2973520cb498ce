"""What is changed in a traced program before it is translated to ONNX: operators whose own translation does not serve.

Before -> after::

    adaptive_avg_pool2d(x, 1)                    -> mean(x, [-2, -1], keepdim)
    a, b = chunk(x, 2, -1)                       -> slice(x, -1, 0, 32), slice(x, -1, 32, 64)
    tensor_split, split, meshgrid, hstack, ...   -> the slices, views and concatenations that they are
    type_as(x, y) of one type                    -> x
    attention(q, k, v, mask)                     -> where no key is visible, 0; else attention(q, k, v, mask)
    attention(q, k, v), all [B, S, D]            -> the same of one head, [B, 1, S, D]
    attention(q, k, v), all [B, G, H, S, D]      -> the same of one batch, [B*G, H, S, D]

PyTorch's operators that give or take a list become ONNX sequences, which TensorRT does not read; each is taken apart
into operators on single tensors, by PyTorch's own decomposition of it.
"""

from __future__ import annotations

import operator
from typing import TYPE_CHECKING, Any

import torch
from torch.fx.experimental.proxy_tensor import make_fx

from deploycli.exporters.graph.operators import ATTENTION_OPSET

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from torch.export import ExportedProgram

_aten = torch.ops.aten


def prepare(program: ExportedProgram, opset: int) -> None:
    """Change a program in place, before it is translated to an opset; see the module's documentation."""
    graph = program.graph
    for node in list(graph.nodes):
        if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
            continue
        if node.target in _GLOBAL_POOLS:
            _pool_by_mean(node)
        elif node.target == _aten.type_as.default and _type(node) == _type(node.args[0]):
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
        elif node.target == _aten.scaled_dot_product_attention.default:
            node = _in_four_axes(node)
            _answer_zero_where_all_is_hidden(node, program, opset)
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


# --- attention -------------------------------------------------------------------------------------------------------


def _in_four_axes(node: torch.fx.Node) -> torch.fx.Node:
    """Give an attention the axes that its translation wants: [S, D] and [B, S, D] one head, [B, G, H, S, D] one batch.

    One that cannot have them stays as it is.
    """
    operands, rank = node.all_input_nodes, node.meta["val"].ndim
    ranks = {operand.meta["val"].ndim for operand in operands}
    if rank in (2, 3) and ranks <= {2, rank}:
        changed = [operand for operand in operands if operand.meta["val"].ndim == rank]
        return _on_other_axes(
            node,
            changed,
            lambda value: value[None, None] if rank == 2 else value.unsqueeze(1),
            lambda value: value[0, 0] if rank == 2 else value.squeeze(1),
        )
    if rank > 4:
        batch, *groups = node.meta["val"].shape[:-3]
        changed = [operand for operand in operands if operand.meta["val"].ndim > 3]
        leading = [operand.meta["val"].shape[:-3] for operand in changed]
        fits = all(len(axes) == rank - 3 and (_is_one(axes) or str(axes[0]) == str(batch)) for axes in leading)
        if fits and all(isinstance(size, int) for size in groups):  # the batch alone may be any

            def fold(value: torch.Tensor) -> torch.Tensor:
                if _is_one(value.shape[:-3]):  # such as a mask of all
                    return value.view(1, *value.shape[-3:])
                return value.expand(-1, *groups, -1, -1, -1).contiguous().view(-1, *value.shape[-3:])

            return _on_other_axes(node, changed, fold, lambda value: value.view(-1, *groups, *value.shape[-3:]))
    return node


def _is_one(axes: Sequence[Any]) -> bool:
    return all(isinstance(size, int) and size == 1 for size in axes)


def _on_other_axes(
    node: torch.fx.Node,
    operands: Sequence[torch.fx.Node],
    there: Callable[[torch.Tensor], torch.Tensor],
    back: Callable[[torch.Tensor], torch.Tensor],
) -> torch.fx.Node:
    """Let an operator compute on other axes of some operands, and everything read its result on those that it had."""
    moved = _emit(node, lambda *values: [there(value) for value in values], operands)
    copies = dict(zip(operands, moved, strict=True))
    with node.graph.inserting_before(node):
        inner = node.graph.node_copy(node, lambda operand: copies.get(operand, operand))
    value: torch.Tensor = node.meta["val"]
    with value.fake_mode:  # type: ignore[attr-defined]
        inner.meta = {**node.meta, "val": there(value)}
    node.replace_all_uses_with(_emit(node, back, [inner]))
    node.graph.erase_node(node)
    return inner


def _answer_zero_where_all_is_hidden(node: torch.fx.Node, program: ExportedProgram, opset: int) -> None:
    """Answer 0 for a query that sees no key, as PyTorch does (aten._safe_softmax); ONNX's softmax knows no such case.

    The choice stands behind the attention, which stays what TensorRT fuses. Where the mask is constant and hides no
    query whole, nothing is to be done.
    """
    position = [argument.name for argument in node.target._schema.arguments].index("attn_mask")  # type: ignore[union-attr]
    mask = node.args[position] if position < len(node.args) else node.kwargs.get("attn_mask")
    if not isinstance(mask, torch.fx.Node):
        return
    try:
        constant = _constant(mask, program)
    except Exception:  # what cannot be computed alone is treated as if it followed from an input
        constant = None
    value: torch.Tensor = node.meta["val"]
    lowest = torch.finfo(value.dtype).min
    is_bool, is_fused = mask.meta["val"].dtype == torch.bool, opset >= ATTENTION_OPSET
    # ONNX Runtime's Attention answers 0 to a row of lowest numbers too, to which PyTorch answers the mean.
    least = lowest / 2 if is_fused and not is_bool else float("-inf")
    if constant is not None and not bool(_hides_all(constant).any() or (constant.amax(-1) < least).any()):
        return
    queries, keys = (operand.meta["val"].shape[-2] for operand in node.args[:2])  # type: ignore[union-attr]

    def judge(mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if is_fused:
            mask = mask.expand(*mask.shape[:-2], queries, keys)
        if not is_bool:
            return mask.clamp(min=least) if is_fused else mask, _hides_all(mask)
        # The lowest number in place of -inf: every row has a softmax then, and no guard stands inside the attention.
        mask = torch.where(mask, torch.zeros((), dtype=value.dtype), torch.full((), lowest, dtype=value.dtype))
        return mask, mask.amax(-1, keepdim=True) < 0  # [..., L, S] -> [..., L, 1]

    added, hidden = _emit(node, judge, [mask])
    node.replace_input_with(mask, added)
    users = list(node.users)
    with node.graph.inserting_after(node):
        chosen = node.graph.call_function(_aten.masked_fill.Scalar, (node, hidden, 0.0))
    chosen.meta = dict(node.meta)
    for user in users:
        user.replace_input_with(node, chosen)


def _hides_all(mask: torch.Tensor) -> torch.Tensor:
    """Say which queries see no key: mask [..., L, S] -> [..., L, 1]."""
    if mask.dtype == torch.bool:
        return ~mask.any(-1, keepdim=True)
    return mask.amax(-1, keepdim=True) == float("-inf")


def _constant(node: torch.fx.Node, program: ExportedProgram) -> torch.Tensor | None:
    """Return the value of a node that follows from constants alone, at the batch that was traced; else None."""
    signature = program.graph_signature
    stored = {
        **signature.inputs_to_parameters,
        **signature.inputs_to_buffers,
        **signature.inputs_to_lifted_tensor_constants,
    }
    known: dict[torch.fx.Node, Any] = {}
    pending = [node]
    while pending:
        now = pending[-1]
        if now in known:
            pending.pop()
        elif now.op == "placeholder":
            name = stored.get(now.name)
            if name is None:
                return None
            known[now] = program.state_dict[name] if name in program.state_dict else program.constants[name]
        elif isinstance(now.meta.get("val"), torch.SymInt):
            known[now] = now.meta["val"].node.hint
        elif missing := [operand for operand in now.all_input_nodes if operand not in known]:
            pending += missing
        else:
            args, kwargs = torch.fx.map_arg((now.args, now.kwargs), lambda operand: known[operand])
            known[now] = now.target(*args, **kwargs)  # type: ignore[operator]
    result = known[node]
    return result if isinstance(result, torch.Tensor) else None


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

    results = _emit(node, run, operands, _AS_SLICES)
    if isinstance(results, list):
        for user in list(node.users):
            assert user.target is operator.getitem, f"{node.target} is read as a list"
            user.replace_all_uses_with(results[user.args[1]])  # type: ignore[index]
            node.graph.erase_node(user)
    else:
        node.replace_all_uses_with(results)
    node.graph.erase_node(node)


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


def _emit(
    node: torch.fx.Node,
    function: Callable[..., Any],
    operands: Sequence[torch.fx.Node],
    decompositions: Mapping[Any, Callable[..., Any]] | None = None,
) -> Any:
    """Put the operators that a function runs before a node.

    Args:
        node: what they stand before, and whose module they belong to.
        function: takes the values of the operands.
        operands: nodes of the same graph.
        decompositions: operator -> what is run in its place.

    Returns:
        The node that gives the function's result, or a list of them.
    """
    values = [operand.meta["val"] for operand in operands]
    mode = next(value.fake_mode for value in values if isinstance(value, torch.Tensor))  # type: ignore[attr-defined]
    with mode:
        traced = make_fx(function, decomposition_table=decompositions)(*values).graph
    traced.eliminate_dead_code()
    placeholders = [inner for inner in traced.nodes if inner.op == "placeholder"]
    copies = dict(zip(placeholders, operands, strict=True))
    with node.graph.inserting_before(node):
        for inner in traced.nodes:
            if inner.op == "call_function":
                copies[inner] = node.graph.node_copy(inner, lambda operand: copies[operand])
                copies[inner].meta = {**node.meta, "val": inner.meta["val"]}
    (results,) = next(inner for inner in traced.nodes if inner.op == "output").args
    return [copies[result] for result in results] if isinstance(results, list | tuple) else copies[results]


def _type(node: Any) -> torch.dtype | None:
    value = node.meta.get("val") if isinstance(node, torch.fx.Node) else None
    return value.dtype if isinstance(value, torch.Tensor) else None
