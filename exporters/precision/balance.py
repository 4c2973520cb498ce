"""Query, key and value with one scale for all: their weights are made equally large, which changes nothing else.

Before -> after, for channel i of the normalised vector n, column j of a head, and any positive s_i, a_j and m_j::

    y = n * gamma + beta, q = y Wq, k = y Wk, z = concat(softmax(q k^T) (y Wv)) Wp
    ->  gamma_i * s_i, beta_i * s_i;  Wq[i, j] / s_i * a_j, Wk[i, j] / s_i / a_j, Wv[i, j] / s_i / m_j;  Wp[j, :] * m_j

A query meets its key in a sum over j, where a_j goes out; the columns of the value meet the rows of the projection. So
a_j makes the columns j of Wq and Wk equally large, and m_j those of Wv as large as the largest of theirs: INT8 has one
step for all three weights, and what is much smaller is lost. It has one step for y, too. A channel that is large and
means little, as the few outliers of a trained transformer, takes the digits of the others, so s_i is what evens out
half of the difference between channels: the root of the rows' root mean square.

Algebra in float64, rounded once. FP8 keeps the digits of small values by itself, and needs none of it. Refused, for
one: a query that is changed before it meets its key (rotary embedding).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir

from deploycli.exporters.graph.analysis import Analysis
from deploycli.exporters.graph.attention import IN_PLACE, TURNED_IN_PLACE
from deploycli.exporters.graph.builder import initializer
from deploycli.exporters.graph.operators import is_onnx, only_reader, operand
from deploycli.exporters.graph.steps import Remark
from deploycli.exporters.graph.unique import Names, value_names

if TYPE_CHECKING:
    import numpy.typing as npt

    from deploycli.exporters.graph.shapes import Dims
    from deploycli.exporters.precision.placement import Placement

    Floats = npt.NDArray[np.float64]
    Reader = tuple[ir.Node, int, Dims]

_SIDE_BY_SIDE = (2, 0, 1, 3)
"""How a Transpose puts heads ``[G, h, N, d]`` back, ``[N, G, h, d]``."""


def balance(graph: ir.Graph, placement: Placement) -> list[Remark]:
    """Balance the weights that are to have one scale, in place.

    A normalised vector whose channels were changed has another name, so that no range of the old one is taken for it.

    Returns:
        The products whose weights were left as they are, and why.
    """
    analysis, names = Analysis(graph), Names(value_names(graph))
    quantized = {site.node for site in placement.sites}
    together: dict[tuple[ir.Value, ...], list[ir.Node]] = {}
    for site in placement.sites:
        if site.alike:
            together.setdefault(site.alike, []).append(site.node)
    remarks = []
    for products in together.values():
        reasons = (_balance_channels(graph, products, names), _balance_columns(products, quantized, analysis))
        remarks += [Remark(products[0].name or "", reason) for reason in reasons if reason]
    return remarks


def _balance_channels(graph: ir.Graph, products: list[ir.Node], names: Names) -> str:
    """Even out the channels of a normalised vector; return why not, or an empty string."""
    vector = products[0].inputs[0]
    norm = None if vector is None else vector.producer()
    if vector is None or norm is None or not is_onnx(norm, "LayerNormalization"):
        return "form: no LayerNormalization is in front of it"
    if set(vector.consumers()) != set(products):
        return "form: its LayerNormalization is read elsewhere too"
    weights = np.concatenate([_weight(product) for product in products], axis=1).astype(np.float64)
    old = [value for value in norm.inputs[1:] if value is not None]
    arrays = [None if v.const_value is None or v.is_graph_input() else v.const_value.numpy() for v in old]
    sizes = np.sqrt(np.square(weights).mean(axis=1))
    if any(a is None or a.shape != sizes.shape for a in arrays) or any(not _is_its_own(p) for p in products):
        return "form: not one number for each channel, or a weight that is read elsewhere too"
    factor = np.sqrt(np.where(sizes > 0, sizes / sizes.max(initial=1e-30), 1.0))
    for position, array in enumerate(arrays, start=1):
        assert array is not None, "it was looked at"
        name = names.unique(f"{vector.name}.balanced.{position}")
        value = initializer(name, ir.tensor((array.astype(np.float64) * factor).astype(np.float32), name=name))
        graph.register_initializer(value)
        norm.replace_input_with(position, value)
    for value in dict.fromkeys(old):
        if not value.uses() and not value.is_graph_output():
            del graph.initializers[value.name or ""]
    for product in products:
        _scale(product, 1 / factor[:, None])
    vector.name = names.unique(f"{vector.name}.balanced")
    return ""


def _balance_columns(products: list[ir.Node], quantized: set[ir.Node], analysis: Analysis) -> str:
    """Balance query with key and value with projection; return why not, or an empty string."""
    readers = {product: reader for product in products if (reader := _reader(product, analysis)) is not None}
    pairs = [
        (query, key)
        for query, (scores, position, heads) in readers.items()
        for key, reader in readers.items()
        if position == 0 and reader == (scores, 1, heads)
    ]
    if len(pairs) != 1:
        return "form: not one query that meets its key as they are projected"
    ((query, key),) = pairs
    factor = np.sqrt(_ratio(_columns(key), _columns(query)))
    _scale(query, factor)
    _scale(key, 1 / factor)
    level = _columns(query).max(initial=0.0, keepdims=True)
    for value in readers.keys() - {query, key}:
        after = _projection(readers[value], analysis)
        if after is not None and after not in quantized:  # else the range of what it reads would be another
            factor = _ratio(_columns(value), level)
            _scale(value, 1 / factor)
            _scale(after, factor[:, None])
    return ""


def _reader(product: ir.Node, analysis: Analysis) -> Reader | None:
    """Return the product of two activations that reads a projection, at which position, and its heads, (h, d)."""
    split = _only_reader(product, "Reshape")
    turn = None if split is None else _only_reader(split, "Transpose")
    if split is None or turn is None or tuple(turn.attributes.get_ints("perm", ())) not in (IN_PLACE, TURNED_IN_PLACE):
        return None
    reader = _only_reader(turn, "MatMul")
    heads = (analysis.dims(split.outputs[0]) or ())[-2:]
    if reader is None or len(heads) != 2 or heads[0] * heads[1] != _weight(product).shape[1]:
        return None
    return (reader, next(iter(turn.outputs[0].uses())).idx, heads) if _is_its_own(product) else None


def _projection(reader: Reader, analysis: Analysis) -> ir.Node | None:
    """Return the product with a weight that alone reads the heads of a value, side by side."""
    mix, position, (heads, size) = reader
    turn = _only_reader(mix, "Transpose")
    join = None if turn is None else _only_reader(turn, "Reshape")
    after = None if join is None else _only_reader(join, "MatMul")
    if turn is None or join is None or after is None or after.inputs[0] is not join.outputs[0]:
        return None
    is_joined = (analysis.dims(join.outputs[0]) or ())[-1:] == (heads * size,)
    if position != 1 or tuple(turn.attributes.get_ints("perm", ())) != _SIDE_BY_SIDE or not is_joined:
        return None
    return after if _is_its_own(after) and _weight(after).shape[0] == heads * size else None


def _only_reader(node: ir.Node, op_type: str) -> ir.Node | None:
    """Return what reads the result of a node, if it is one operator of a type, and reads it once."""
    reader = only_reader(node.outputs[0])
    return reader if reader is not None and is_onnx(reader, op_type) else None


def _is_its_own(product: ir.Node) -> bool:
    """Whether a product has a stored matrix that nothing else reads."""
    value = operand(product, 1)
    return value is not None and value.is_initializer() and len(value.uses()) == 1 and _weight(product).ndim == 2


def _weight(product: ir.Node) -> npt.NDArray[Any]:
    value = operand(product, 1)
    return np.zeros(0) if value is None or value.const_value is None else value.const_value.numpy()


def _columns(product: ir.Node) -> Floats:
    """Return the largest magnitude of each column."""
    found: Floats = np.abs(_weight(product).astype(np.float64)).max(axis=0)
    return found


def _ratio(sizes: Floats, others: Floats) -> Floats:
    """Return how much larger some columns are than others; 1 where one of them is empty."""
    is_right = (sizes > 0) & (others > 0)
    return np.where(is_right, sizes / np.where(others > 0, others, 1.0), 1.0)


def _scale(product: ir.Node, factor: Floats) -> None:
    value = operand(product, 1)
    assert value is not None, "it has a weight"
    array = (_weight(product).astype(np.float64) * factor).astype(np.float32)
    value.const_value = ir.tensor(array, name=value.name)
