"""What is too large for FP16 is stored smaller, by powers of two, before anything stays FP32.

Before -> after, where a channel of the residual stream reaches 100000::

    x = Add(x0, MatMul(h, W)), LayerNormalization(x, gamma, beta, epsilon)
    x/4 = Add(x0/4, MatMul(h, W/4)), LayerNormalization(x/4, gamma, beta, epsilon/16)

No operator is added, and no digit changes: see `scales` for which values may be scaled. Two repairs, in turn:

* channels of a LayerNormalization that only products by constants read: gain and bias of a channel become smaller and
  the rows of the weights larger, or the other way round where the weights are too large. A normalised number is no
  larger than the root of the channels, so no data are needed.
* groups of values that share a scale. How large values are must be known from data; of weights it is known without.

What fits is no larger than half of what the type holds; of values that were seen on data, an eighth, where no digits
are lost by it: other data reach further. Refused, for one: weights whose small numbers would lose digits (`_Limits`).
What is refused stays FP32, as `policy` says.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common

from deploycli.exporters.graph.builder import initializer
from deploycli.exporters.graph.operators import TRAILING_NORMALIZATIONS, is_onnx, operand
from deploycli.exporters.graph.steps import Remark
from deploycli.exporters.graph.unique import Names, label, value_names
from deploycli.exporters.precision.dtypes import feeds_softmax, fill_types, reduced
from deploycli.exporters.precision.policy import decide, is_clipped, stored
from deploycli.exporters.precision.scales import Group, Scales, Use, epsilon_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from deploycli.exporters.precision.dtypes import Array
    from deploycli.exporters.precision.policy import Policy

RESCALED, UNSCALED = "rescaled", "unscaled"
"""What a remark of this module begins with: what was repaired, and what could not be."""

_TOO_LARGE = frozenset({"constant", "overflow", "range"})
"""Rules of the policy that this module answers."""

_MOST = 40
"""Larger exponents are no repair: 2^40 is more than FP16 has between its least and its largest number."""

_MARGINS = (2, 1, 0)
"""So many powers of two are left above what was seen, beyond the half that the policy leaves, if digits allow it."""

_WORST_ROUNDING = 2.0**-11
"""Of a normal FP16 number, relative. Weights whose root mean square of it is larger have lost digits."""

_HEADROOM = 32
"""What is read by more than sums keeps so many times the least normal number at its largest element: with fewer, small
elements of a value that is itself small among its group would lose digits."""


def rescale(model: ir.Model, policy: Policy) -> tuple[Policy, list[Remark]]:
    """Scale what overflows in a model, in place.

    Args:
        model: an FP32 model, its nodes in order. Constant nodes become initializers.
        policy: which type, and how large values are in data.

    Returns:
        The policy of the new graph, whose values are smaller; what was done, and what could not be and why.
    """
    common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    fill_types(model)
    policy, graph, remarks = replace(policy), model.graph, list[Remark]()
    if _too_large(graph, policy):
        policy, remarks = _rescale_channels(graph, policy)
        if large := _too_large(graph, policy):
            policy, more = _rescale_groups(graph, policy, large)
            remarks += more
    return policy, remarks


def _too_large(graph: ir.Graph, policy: Policy) -> list[ir.Node]:
    """Return what would stay FP32 because of how large values are, and what makes them."""
    if not _is_anything_large(graph, policy):
        return []
    large = [node for node, reason in decide(graph, policy).items() if reason.partition(":")[0] in _TOO_LARGE]
    found = dict.fromkeys(large)
    while large:  # what made a value large may stay FP32 for another reason
        for value in large.pop().inputs:
            node = None if value is None else value.producer()
            if node is not None and node not in found and policy.is_beyond(value):
                found[node] = None
                large.append(node)
    return list(found)


def _is_anything_large(graph: ir.Graph, policy: Policy) -> bool:
    """Say whether a value or a constant is too large: quicker than to ask what stays FP32, and mostly not so."""
    if any(size > policy.limit for size in policy.magnitudes.values()):
        return True
    made = (output for node in graph for output in node.outputs)
    return any(_is_large(value, policy.largest) for value in (*graph.initializers.values(), *made))


def _is_large(value: ir.Value, largest: float) -> bool:
    tensor = stored(value)
    if tensor is None or tensor.size == 0 or feeds_softmax(value):
        return False
    array = tensor.numpy()
    return not (-largest <= array.min() and array.max() <= largest)  # or not a number


def scaling(magnitude: float, limit: float) -> int:
    """Return the least k with ``magnitude * 2^-k <= limit``."""
    if magnitude == 0:
        return -_MOST
    mantissa, exponent = math.frexp(magnitude / limit)  # in [0.5, 1)
    return exponent - 1 if mantissa == 0.5 else exponent


# --- groups ----------------------------------------------------------------------------------------------------------


def _rescale_groups(graph: ir.Graph, policy: Policy, large: Iterable[ir.Node]) -> tuple[Policy, list[Remark]]:
    scales = Scales(graph)
    limits = _Limits(scales, policy)
    accepted, found, remarks, failed = dict[int, int](), dict[int, int](), list[Remark](), set[int]()
    for node, group in _wanted(scales, limits, large):
        in_vain = not scales.groups[group].values and not failed.isdisjoint(_groups_at(scales, node))
        if in_vain:
            continue
        if found.get(group, 0) >= limits.least[group]:
            accepted[group] = found[group]  # with what came before it
            continue
        solved: dict[int, int] | str = ""
        for exponent in limits.preferred(group):
            solved = scales.solve({**accepted, group: exponent}, limits.refusal)
            if not isinstance(solved, str):
                found, accepted[group] = solved, exponent
                break
        else:
            failed.add(group)
            remarks.append(Remark(label(node), f"{UNSCALED}: {limits.text(group)}; {solved}"))
    writer = Writer(graph)
    changed = apply_exponents(scales, found, writer)
    writer.finish()
    done = [_remark(scales, group, found, limits, changed) for group in found if scales.groups[group].values]
    return replace(policy, magnitudes=_scaled_sizes(policy.magnitudes, scales, found)), done + remarks


def _scaled_sizes(sizes: Mapping[str, float], scales: Scales, exponents: Mapping[int, int]) -> dict[str, float]:
    changed = dict(sizes)
    for group, exponent in exponents.items():
        for name in (value.name or "" for value in scales.groups[group].values):
            if name in sizes:
                changed[name] = math.ldexp(sizes[name], -exponent)
    return changed


def _wanted(scales: Scales, limits: _Limits, large: Iterable[ir.Node]) -> Iterable[tuple[ir.Node, int]]:
    """Return the groups that do not fit, each once, with an operator that reads or makes one of their values.

    Weights come last: where the result of a product is stored smaller, they are too.
    """
    found: dict[int, ir.Node] = {}
    for node in large:
        for group in _groups_at(scales, node):
            if limits.least[group] > 0:
                found.setdefault(group, node)
    ordered = sorted(found, key=lambda group: not scales.groups[group].values)
    return [(found[group], group) for group in ordered]


def _groups_at(scales: Scales, node: ir.Node) -> list[int]:
    """Return the groups of what an operator reads and makes."""
    keys: list[ir.Value | Use] = [Use(node, i) for i in range(len(node.inputs))]
    keys += [value for value in (*node.inputs, *node.outputs) if value is not None]
    return [group for key in keys if (group := scales.of(key)) is not None]


class _Limits:
    """How far each group may be scaled.

    Attributes:
        least: the exponent at which the largest of a group fits.
    """

    def __init__(self, scales: Scales, policy: Policy) -> None:
        self._scales, self._policy = scales, policy
        self._largest = [self._largest_of(group) for group in range(len(scales.groups))]
        self._refusals: dict[tuple[int, int], str] = {}
        self.least = [scaling(size, policy.limit) if np.isfinite(size) else _MOST + 1 for size, _ in self._largest]

    def preferred(self, group: int) -> list[int]:
        """Return the exponents to try for a group, the best one first: data not seen yet reach further."""
        least = self.least[group]
        more = _MARGINS if self._scales.groups[group].values else sorted(_MARGINS)
        return [least + margin for margin in more]

    def text(self, group: int) -> str:
        """Say how large the largest of a group is."""
        size, name = self._largest[group]
        return f"{name} reaches {size:.4g}"

    def size(self, group: int) -> float:
        """Return the largest magnitude of a group that is known."""
        return self._largest[group][0]

    def refusal(self, group: int, exponent: int) -> str:
        """Say why a group cannot be scaled by ``2^-exponent``; empty where it can."""
        key = (group, exponent)
        if key not in self._refusals:  # weights are rounded to find out
            self._refusals[key] = self._find_refusal(group, exponent)
        return self._refusals[key]

    def _find_refusal(self, group: int, exponent: int) -> str:
        found = self._scales.groups[group]
        if exponent == 0:
            return ""
        if found.pinned:
            return found.pinned
        if exponent < self.least[group] or abs(exponent) > _MOST:
            return f"{self.text(group)}, too much for {2.0**-exponent:g} times of it"
        if exponent < 0 and (unknown := next((v for v in found.values if self._size(v) is None), None)):
            return f"nobody knows how large {unknown.name} is"
        return self._lost(found, exponent) if exponent > 0 else ""

    def _lost(self, group: Group, exponent: int) -> str:
        """Say which numbers are too small to be made smaller."""
        small = (value for value in group.values if self._loses_digits(value, exponent))
        if (value := next(small, None)) is not None:
            return f"{value.name} ({self._size(value):.3g}) would lose digits"
        lost = (use for use in group.uses if use.is_factor and not _keeps_digits(use, exponent, self._policy))
        use = next(lost, None)
        return "" if use is None else f"numbers of {use.value.name} would lose digits"

    def _largest_of(self, group: int) -> tuple[float, str]:
        found = self._scales.groups[group]
        sizes = [(size, value.name or "") for value in found.values if (size := self._size(value)) is not None]
        for use in found.uses:
            rounding = None if feeds_softmax(use.value) else self._policy.examine(use.value)
            if rounding is not None:
                sizes.append((rounding.largest, use.value.name or ""))
        return max(sizes, default=(0.0, ""))

    def _size(self, value: ir.Value) -> float | None:
        """Return how large a computed value becomes; None where that is not known."""
        if is_clipped(value, self._policy):
            return 0.0
        seen = self._policy.magnitudes.get(value.name or "")
        if seen is not None:
            return seen
        node = value.producer()
        bounds = None if node is None or node.outputs[0] is not value else channel_bounds(node)
        return None if bounds is None else float(bounds.max(initial=0.0))

    def _loses_digits(self, value: ir.Value, exponent: int) -> bool:
        size, own = self._size(value), self._scales.of(value)
        if not size or size * 2.0**-exponent >= _HEADROOM * float(self._policy.target.tiny):
            return False
        return any(
            self._scales.of(output) != own for reader in value.consumers() for output in reader.outputs if output.name
        )  # what is only added to something larger loses what the sum loses anyway


def _keeps_digits(use: Use, exponent: int, policy: Policy) -> bool:
    """Say whether a scaled constant is rounded to about as many digits as FP16 has, in the mean of its channels."""
    tensor = stored(use.value)
    if tensor is None:
        return False
    scaled = np.ldexp(tensor.numpy(), -exponent).astype(np.float64)
    error = np.square(reduced(scaled.astype(np.float32), policy.target).astype(np.float64) - scaled)
    axes = tuple(i for i in range(scaled.ndim) if i != _channel_axis(use, scaled.ndim))
    power = np.square(scaled)
    if scaled.ndim > 1:
        error, power = error.sum(axes), power.sum(axes)
    lost = error[power > 0] / power[power > 0]
    return bool(lost.size == 0 or lost.mean() <= _WORST_ROUNDING**2)


def _channel_axis(use: Use, rank: int) -> int:
    """Return the axis of a weight along which the results of a product lie."""
    node = use.node
    if node.op_type == "Conv" or (node.op_type == "Gemm" and node.attributes.get_int("transB", 0) == 1):
        return 0
    if node.op_type == "ConvTranspose":
        return 1
    return rank - 2 if use.position == 0 and node.op_type in ("Gemm", "MatMul") else rank - 1


def apply_exponents(scales: Scales, exponents: Mapping[int, int], writer: Writer) -> dict[int, list[ir.Node]]:
    """Store values as ``x * 2^-k``.

    Args:
        scales: of the graph.
        exponents: group -> k, as `Scales.solve` found them.
        writer: of the graph; the caller finishes it.

    Returns:
        Group -> operators whose constants or epsilons are others now.
    """
    changed: dict[int, list[ir.Node]] = {}
    for group, exponent in exponents.items():
        found = scales.groups[group]
        for use in found.uses:
            writer.scale(use, -exponent)
        for node in found.norms:
            node.attributes["epsilon"] = ir.AttrFloat32("epsilon", scaled_epsilon(node, exponent))
        changed[group] = list(dict.fromkeys((*(use.node for use in found.uses), *found.norms)))
    return changed


def scaled_epsilon(node: ir.Node, exponent: int) -> float:
    """Return what a normalisation of ``x * 2^-k`` adds to the mean of its squares."""
    return math.ldexp(epsilon_of(node), -2 * exponent)


class Writer:
    """Replaces constants by scaled ones, which are shared where the original was, and drops what nothing reads."""

    def __init__(self, graph: ir.Graph) -> None:
        self._graph = graph
        self._names = Names(value_names(graph))
        self._made: dict[tuple[ir.Value, tuple[int, ...], int], ir.Value] = {}

    def scale(self, use: Use, exponents: int | Array, axis: int = 0) -> None:
        """Let an operator read a constant times ``2^exponents``: one for all, or one for each index of an axis."""
        value = use.value
        key = (value, tuple(np.ravel(exponents).tolist()), axis)
        if key not in self._made:
            self._made[key] = self._scaled(value, exponents, axis)
        use.node.replace_input_with(use.position, self._made[key])

    def _scaled(self, value: ir.Value, exponents: int | Array, axis: int) -> ir.Value:
        tensor, name = value.const_value, self._names.unique(f"{value.name}.scaled")
        assert tensor is not None, "a use is of a constant"
        shape = tensor.shape.numpy()
        powers = np.asarray(exponents)
        powers = powers.reshape([-1 if i == axis else 1 for i in range(len(shape))]) if powers.ndim else powers

        def made() -> ir.TensorProtocol:  # when it is asked for: there may be gigabytes of them
            return ir.tensor(np.ldexp(tensor.numpy(), powers), name=name)

        scaled = initializer(name, ir.LazyTensor(made, tensor.dtype, ir.Shape(shape), name=name))
        self._graph.register_initializer(scaled)
        return scaled

    def finish(self) -> None:
        """Remove constants that nothing reads any more; where one has taken its place, it takes the name as well."""
        heirs: dict[ir.Value, list[ir.Value]] = {}
        for (value, _, _), scaled in self._made.items():
            heirs.setdefault(value, []).append(scaled)
        for value, (first, *others) in heirs.items():
            name = value.name or ""
            if value.uses() or value.is_graph_output():
                continue
            del self._graph.initializers[name]
            if not others:
                del self._graph.initializers[first.name or ""]
                first.name = name
                self._graph.register_initializer(first)


# --- channels --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Channels:
    """A normalisation whose result only products by constants read.

    Attributes:
        node: the normalisation.
        values: its result, and what is moved from it, channels last.
        weights: where the products read their weights, and the axis of the channels.
    """

    node: ir.Node
    values: tuple[ir.Value, ...]
    weights: tuple[tuple[Use, int], ...]

    @property
    def gains(self) -> list[Use]:
        """Scale and bias."""
        return [Use(self.node, i) for i in (1, 2) if operand(self.node, i) is not None]


def channel_bounds(node: ir.Node) -> Array | None:
    """Return how large each channel of a normalised value can become, [C]; None where that does not follow."""
    if not is_onnx(node, *TRAILING_NORMALIZATIONS):
        return None
    gain, bias = (None if value is None else stored(value) for value in (operand(node, 1), operand(node, 2)))
    if gain is None or len(gain.shape) != 1 or (bias is None and operand(node, 2) is not None):
        return None
    rank = None if node.outputs[0].shape is None else len(node.outputs[0].shape)
    if node.attributes.get_int("axis", -1) not in (-1, None if rank is None else rank - 1):
        return None
    scale = np.abs(gain.numpy().astype(np.float64)) * math.sqrt(gain.size)
    return scale if bias is None else scale + np.abs(bias.numpy().astype(np.float64))


def _rescale_channels(graph: ir.Graph, policy: Policy) -> tuple[Policy, list[Remark]]:
    writer, sizes, remarks = Writer(graph), dict(policy.magnitudes), list[Remark]()
    for node in graph:
        bounds = channel_bounds(node)
        found = None if bounds is None else _read_channels(node, len(bounds))
        if found is None or bounds is None or not _overflows(found, policy):
            continue
        bounds = np.minimum(bounds, policy.magnitudes.get(found.values[0].name or "", np.inf))
        exponents = _channel_exponents(found, bounds, policy)
        if exponents is None or not exponents.any():
            continue
        for gain in found.gains:
            writer.scale(gain, -exponents)
        for use, axis in found.weights:
            writer.scale(use, exponents, axis)
        largest = float(np.ldexp(bounds, -exponents).max())
        sizes |= {name: largest for value in found.values if (name := value.name or "") in sizes}
        remarks.append(_channel_remark(found, exponents))
    writer.finish()
    return replace(policy, magnitudes=sizes), remarks


def _read_channels(node: ir.Node, channels: int) -> _Channels | None:
    """Return what reads a normalised value; None where something else than products by constants does."""
    values, weights = [node.outputs[0]], list[tuple[Use, int]]()
    if any(output.uses() for output in node.outputs[1:]):
        return None
    for value in values:
        if value.is_graph_output():
            return None
        for reader, position in value.uses():
            if position == 0 and _keeps_channels(reader, channels):
                values.append(reader.outputs[0])
            elif (axis := _weight_axis(reader, position)) is not None:
                weights.append((Use(reader, 1, is_factor=True), axis))
            else:
                return None
    return _Channels(node, tuple(values), tuple(weights)) if weights else None


def _keeps_channels(node: ir.Node, channels: int) -> bool:
    """Say whether an operator moves rows of channels, and leaves the channels where they are."""
    if is_onnx(node, "Identity"):
        return True
    if is_onnx(node, "Transpose"):
        order = node.attributes.get_ints("perm", None)
        return bool(order) and order is not None and order[-1] == len(order) - 1
    shape = node.outputs[0].shape
    return is_onnx(node, "Reshape") and shape is not None and len(shape) > 0 and shape[-1] == channels


def _weight_axis(node: ir.Node, position: int) -> int | None:
    """Return the axis of a product's weights that is multiplied by channels; None where it is no such product."""
    weight = operand(node, 1)
    if position != 0 or weight is None or weight.is_graph_input() or stored(weight) is None or weight.shape is None:
        return None
    if not weight.is_initializer() or len(weight.shape) != 2:
        return None
    if is_onnx(node, "MatMul"):
        return 0
    is_plain = is_onnx(node, "Gemm") and not node.attributes.get_int("transA", 0)
    return node.attributes.get_int("transB", 0) if is_plain else None


def _overflows(found: _Channels, policy: Policy) -> bool:
    def is_beyond(value: ir.Value) -> bool:
        return policy.magnitudes.get(value.name or "", 0.0) > policy.limit

    # Weights whose products are too large become smaller with what they make, or not at all.
    weights = (use.value for use, _ in found.weights if not is_beyond(use.node.outputs[0]))
    constants = (*(use.value for use in found.gains), *weights)
    return any(map(is_beyond, found.values)) or any(map(policy.overflows, constants))


def _channel_exponents(found: _Channels, bounds: Array, policy: Policy) -> Array | None:
    """Return for each channel the exponent nearest to zero with which it and its weights fit, or None."""
    most = np.zeros(len(bounds))
    for use, axis in found.weights:
        tensor = stored(use.value)
        assert tensor is not None, "_weight_axis looked at it"
        most = np.maximum(most, np.abs(tensor.numpy()).max(1 - axis, initial=0.0))
    if not (np.isfinite(bounds).all() and np.isfinite(most).all()):
        return None
    least, largest = (np.array([scaling(float(size), policy.limit) for size in sizes]) for sizes in (bounds, most))
    exponents = np.clip(0, least, np.maximum(least, -largest))
    return exponents if (least <= -largest).all() else None


# --- what is said ----------------------------------------------------------------------------------------------------


def _stored_as(exponent: int) -> str:
    return f"x/{2**exponent}" if exponent >= 0 else f"{2**-exponent}*x"


def _channel_remark(found: _Channels, exponents: Array) -> Remark:
    scaled = exponents[exponents != 0]
    forms = " to ".join(dict.fromkeys(_stored_as(int(k)) for k in (scaled.min(), scaled.max())))
    count = f"{len(scaled)} of {len(exponents)} channels stored as {forms}"
    return Remark(
        label(found.node), f"{RESCALED}: {count}, in its gain and in the rows of {len(found.weights)} products"
    )


def _remark(
    scales: Scales, group: int, found: Mapping[int, int], limits: _Limits, changed: Mapping[int, list[ir.Node]]
) -> Remark:
    values = scales.groups[group].values
    makers = [node for value in values if (node := value.producer()) is not None]
    sums = [node for node in makers if node.op_type == "Add" and all(scales.of(v) == group for v in node.inputs if v)]
    what = "residual stream" if len(sums) > 1 else values[0].name
    size = f", up to {limits.size(group):.4g}," if limits.size(group) else ""
    near = {node for value in values for node in (*value.consumers(), value.producer()) if node is not None}
    touched = dict.fromkeys(node for nodes in changed.values() for node in nodes if node in near)
    kinds = Counter(node.op_type for node in touched)
    done = ", ".join(f"{count} {kind}" for kind, count in kinds.items()) or "no constant changes"
    where = _place(sums or makers) or values[0].name or ""
    return Remark(where, f"{RESCALED}: {what}{size} stored as {_stored_as(found[group])}: {done}")


def _place(nodes: Iterable[ir.Node]) -> str:
    """Return the module that most of some operators are in, with stars in place of numbers."""
    modules = Counter(re.sub(r"(?<![^.])\d+(?![^.])", "*", label(node).rpartition("/")[0]) for node in nodes)
    return modules.most_common(1)[0][0] if modules else ""
