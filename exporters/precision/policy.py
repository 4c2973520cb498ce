"""Which operators stay in FP32, and why: a table of small named rules.

A strongly typed network computes each operator in the type of its operands, so whoever writes the graph decides what
FP16 may touch. Sources of the rules: TensorRT, "Strongly typed networks" and "Working with mixed precision" (a
normalisation in FP16 may overflow; ``stash_type`` is ignored); NVIDIA Model Optimizer's AutoCast (ranges, reductions).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import onnx
import onnx_ir as ir

from exporters.precision.constants import examine, feeds_softmax
from models.errors import UsageError

if TYPE_CHECKING:
    import re
    from collections.abc import Callable, Mapping, Sequence

    from exporters.precision.constants import Rounding

REDUCED_TYPES: Mapping[str, ir.DataType] = {"fp16": ir.DataType.FLOAT16, "bf16": ir.DataType.BFLOAT16}
"""Precision -> element type."""

_ONNX_NAMES = {ir.DataType.FLOAT16: "tensor(float16)", ir.DataType.BFLOAT16: "tensor(bfloat16)"}

NEAR_OVERFLOW = 0.5
"""A value beyond this share of the largest finite one is too near: inputs that were not seen reach further."""

_NORMALIZATIONS = frozenset(
    {
        "BatchNormalization",
        "GroupNormalization",
        "InstanceNormalization",
        "LayerNormalization",
        "LpNormalization",
        "MeanVarianceNormalization",
        "RMSNormalization",
    }
)
_SOFTMAX = frozenset({"LogSoftmax", "Softmax"})
_SUMS = frozenset({"AveragePool", "CumSum", "GlobalAveragePool", "GlobalLpPool", "LpPool"})
_SQUARES = frozenset({"Mul", "Pow"})
_TYPED_BY = frozenset({"Cast", "DequantizeLinear"})  # by what the cast writes: an attribute, a scale
_ORDER = frozenset({"ReduceMax", "ReduceMin"})  # they select, they do not add up


@dataclass(frozen=True)
class Policy:
    """How to choose the precision of each operator.

    Attributes:
        target: the reduced type.
        allow: names of rules that are switched off.
        keep: an operator whose name one of these finds stays FP32.
        magnitudes: value name -> largest magnitude seen in calibration data; empty where there was none.
    """

    target: ir.DataType
    allow: frozenset[str] = frozenset()
    keep: tuple[re.Pattern[str], ...] = ()
    magnitudes: Mapping[str, float] = field(default_factory=dict)
    _examined: dict[ir.Value, Rounding | None] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Refuse to switch off what is no rule, or what no graph can do without."""
        if unknown := sorted(self.allow - OPTIONAL_RULES):
            raise UsageError(
                f"there is no rule {unknown[0]!r} that could be switched off",
                expected=", ".join(sorted(OPTIONAL_RULES)),
            )

    @property
    def largest(self) -> float:
        """The largest finite value of the reduced type."""
        return float(self.target.max)

    def examine(self, value: ir.Value) -> Rounding | None:
        """Say what becomes of a constant in the reduced type; None where the value is no FP32 constant."""
        if value not in self._examined:
            tensor = value.const_value
            constant = tensor is not None and not value.is_graph_input() and tensor.dtype == ir.DataType.FLOAT
            self._examined[value] = examine(tensor.numpy(), self.target) if constant and tensor is not None else None
        return self._examined[value]


def decide(graph: ir.Graph, policy: Policy) -> dict[ir.Node, str]:
    """Return the operators that stay FP32, each with ``rule: reason``, in the order of the graph."""
    kept: dict[ir.Node, str] = {}
    for node in graph:
        for name, rule in RULES.items():
            if name not in policy.allow and (reason := rule(node, policy)) is not None:
                kept[node] = f"{name}: {reason}"
                break
    return kept


def _user(node: ir.Node, policy: Policy) -> str | None:
    pattern = next((p for p in policy.keep if p.search(node.name or "")), None)
    return None if pattern is None else f"matches {pattern.pattern!r}"


def _control_flow(node: ir.Node, _policy: Policy) -> str | None:
    if any(a.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS) for a in node.attributes.values()):
        return f"the graphs inside {node.op_type} are left as they are"
    return None


def _unsupported(node: ir.Node, policy: Policy) -> str | None:
    """An operand or a result of a type that the operator's definition ties to FP32."""
    version = node.graph.opset_imports.get(node.domain) if isinstance(node.graph, ir.Graph) else None
    if version is None or not onnx.defs.has(node.op_type, version, node.domain):
        return f"no operator set of this file defines {node.domain or 'ai.onnx'}.{node.op_type}"
    schema = onnx.defs.get_schema(node.op_type, version, node.domain)
    if node.op_type in ("QuantizeLinear", "DequantizeLinear") and version < 19:
        return f"its scale is FP32 in opset {version}; from 19 on it may be FP16"
    floats = [i for i, value in enumerate(node.inputs) if value is not None and value.dtype == ir.DataType.FLOAT]
    if floats and not any(reducible(schema.inputs, i, policy.target) for i in floats):
        return f"{node.op_type} of opset {version} takes no {policy.target.name}"
    if not floats and node.op_type not in _TYPED_BY and any(o.dtype == ir.DataType.FLOAT for o in node.outputs):
        return f"an attribute of {node.op_type} makes its result FP32"
    return None


def _normalization(node: ir.Node, _policy: Policy) -> str | None:
    if node.op_type not in _NORMALIZATIONS:
        return None
    return "adds up squares of the residual stream; TensorRT computes it in the type of its input"


def _softmax(node: ir.Node, _policy: Policy) -> str | None:
    return "exponentials and their sum" if node.op_type in _SOFTMAX else None


def _reduction(node: ir.Node, _policy: Policy) -> str | None:
    if _adds_up(node):
        return "adds up many terms"
    squares = node.op_type in _SQUARES and (node.op_type == "Pow" or node.inputs[0] is node.inputs[1])
    if squares and any(_adds_up(reader) for reader in node.outputs[0].consumers()):
        return "squares for a sum: the square of 256 is beyond FP16"
    return None


def _range(node: ir.Node, policy: Policy) -> str | None:
    limit = NEAR_OVERFLOW * policy.largest
    for value in (*node.inputs, *node.outputs):
        seen = 0.0 if value is None else policy.magnitudes.get(value.name or "", 0.0)
        if seen > limit:
            assert value is not None
            return f"{value.name} reaches {seen:.4g} in the data; {policy.target.name} ends at {policy.largest:.4g}"
    return None


def _constant(node: ir.Node, policy: Policy) -> str | None:
    for value in node.inputs:
        rounding = None if value is None else policy.examine(value)
        if rounding is None or value is None:
            continue
        if rounding.overflowed and not feeds_softmax(value):
            return f"{rounding.overflowed} of {rounding.size} values of {value.name} are beyond {policy.largest:.4g}"
        if rounding.vanishes:
            return f"{value.name} ({rounding.largest:.3g}) would become zero"
    return None


def _adds_up(node: ir.Node) -> bool:
    return (node.op_type.startswith("Reduce") and node.op_type not in _ORDER) or node.op_type in _SUMS


def reducible(parameters: Sequence[onnx.defs.OpSchema.FormalParameter], position: int, target: ir.DataType) -> bool:
    """Whether an operator's definition allows the reduced type for the operand or the result at this position."""
    if not parameters:
        return False
    parameter = parameters[min(position, len(parameters) - 1)]  # the last one may be variadic
    return _ONNX_NAMES[target] in parameter.types


RULES: Mapping[str, Callable[[ir.Node, Policy], str | None]] = {
    "user": _user,  # first: what the user asked for is the reason that is shown
    "control-flow": _control_flow,
    "unsupported": _unsupported,
    "layer-norm": _normalization,
    "softmax": _softmax,
    "reduction": _reduction,
    "range": _range,
    "constant": _constant,
}
"""Name -> rule; the first that has a reason decides."""

OPTIONAL_RULES = frozenset({"layer-norm", "softmax", "reduction", "range"})
"""Rules that a user may switch off: the graph stays valid without them."""
