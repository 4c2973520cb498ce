"""Which operators stay in FP32, and why: a table of small named rules.

A strongly typed network computes each operator in the type of its operands, so whoever writes the graph decides what
FP16 may touch. Sources of the rules: TensorRT, "Strongly typed networks" and "Working with mixed precision" (a
normalisation in FP16 may overflow; ``stash_type`` is ignored); NVIDIA Model Optimizer's AutoCast (ranges, reductions).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import onnx_ir as ir

from deploycli.exporters.graph.builder import inner_graphs
from deploycli.exporters.graph.movement_ops import MOVEMENT
from deploycli.exporters.graph.operators import NORMALIZATIONS, QDQ, SOFTMAX, is_onnx
from deploycli.exporters.lint.element_types import attribute, schema_of
from deploycli.exporters.lint.rules import DEFAULT_VERSION
from deploycli.exporters.lint.versions import operators, parse_version
from deploycli.exporters.precision.dtypes import MASKING, NEAR_OVERFLOW, examine, feeds_softmax, makes, opset_of, takes
from deploycli.models.errors import UsageError

if TYPE_CHECKING:
    import re
    from collections.abc import Callable, Mapping

    from deploycli.exporters.precision.dtypes import Rounding

REDUCED_TYPES: Mapping[str, ir.DataType] = {"fp16": ir.DataType.FLOAT16, "bf16": ir.DataType.BFLOAT16}
"""Precision -> element type."""

_SUMS = frozenset({"AveragePool", "CumSum", "GlobalAveragePool", "GlobalLpPool", "LpPool"})
_ORDER = frozenset({"ReduceMax", "ReduceMin"})  # they select, they do not add up
_SQUARES = frozenset({"Mul", "Pow"})
_APPLIES_SUM = frozenset({"Add", "Clip", "Div", "Max", "Min", "Mul", "Pow", "Reciprocal", "Sqrt", "Sub"})
_COUNTS = frozenset(
    {"Abs", "Add", "Cast", "Ceil", "Clip", "Div", "Floor", "Max", "Min", "Mod", "Mul", "Neg", "Round", "Sub", *MOVEMENT}
)
_TYPED_FREELY = ("Cast", "ConstantOfShape")  # their result has the type that an attribute says, and it can be changed


@dataclass(frozen=True)
class Policy:
    """How to choose the precision of each operator.

    Attributes:
        target: the reduced type.
        allow: names of rules that are switched off.
        keep: an operator whose name one of these finds stays FP32.
        magnitudes: value name -> largest magnitude seen in calibration data; empty where there was none.

    Raises:
        UsageError: ``allow`` names no rule, or one that no graph can do without.
    """

    target: ir.DataType
    allow: frozenset[str] = frozenset()
    keep: tuple[re.Pattern[str], ...] = ()
    magnitudes: Mapping[str, float] = field(default_factory=dict)
    _examined: dict[ir.Value, Rounding | None] = field(default_factory=dict, init=False, repr=False, compare=False)
    _beyond: dict[ir.Value, bool] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if unknown := sorted(self.allow - OPTIONAL_RULES):
            raise UsageError(
                f"there is no rule {unknown[0]!r} that could be switched off",
                expected=", ".join(sorted(OPTIONAL_RULES)),
            )

    @property
    def largest(self) -> float:
        """The largest finite value of the reduced type."""
        return float(self.target.max)

    @property
    def limit(self) -> float:
        """The largest magnitude that is far enough from it."""
        return NEAR_OVERFLOW * self.largest

    def examine(self, value: ir.Value | None) -> Rounding | None:
        """Say what becomes of a constant in the reduced type; None where the value is no FP32 constant."""
        if value is None:
            return None
        if value not in self._examined:
            tensor = stored(value)
            self._examined[value] = None if tensor is None else examine(tensor.numpy(), self.target)
        return self._examined[value]

    def overflows(self, value: ir.Value | None) -> bool:
        """Whether a value is a constant that the reduced type cannot hold, and no mask, which may be clipped."""
        rounding = self.examine(value)
        return rounding is not None and rounding.overflowed > 0 and value is not None and not feeds_softmax(value)

    def is_beyond(self, value: ir.Value | None) -> bool:
        """Whether a constant that overflows may have made a value as large, and no data show that it has not."""
        node = None if value is None else value.producer()
        if node is None or value is None or value.dtype != ir.DataType.FLOAT or value.name in self.magnitudes:
            return False  # what data show is for the rule of ranges
        if value not in self._beyond:
            self._beyond[value] = any(self.overflows(v) for v in (*node.inputs, *node.outputs)) or (
                node.op_type in MASKING and any(self.is_beyond(v) for v in node.inputs)
            )
        return self._beyond[value]


def stored(value: ir.Value) -> ir.TensorProtocol | None:
    """Return an FP32 initializer, or the element that a ConstantOfShape repeats; None for anything else."""
    tensor, node = value.const_value, value.producer()
    if node is not None and is_onnx(node, "ConstantOfShape"):
        tensor = node.attributes.get_tensor("value", None)
    return None if tensor is None or value.is_graph_input() or tensor.dtype != ir.DataType.FLOAT else tensor


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
    return f"the graphs inside {node.op_type} are left as they are" if [*inner_graphs(node)] else None


def _unsupported(node: ir.Node, policy: Policy) -> str | None:
    """An operand or a result whose type the operator's definition, or TensorRT, ties to FP32."""
    name, opset, target = node.op_type, opset_of(node), policy.target
    if schema_of(node, opset) is None:
        return f"ONNX does not define {node.domain or 'ai.onnx'}.{name}"
    values = [value for value in (*node.inputs, *node.outputs) if value is not None]
    if other := next((v for v in values if v.type is not None and not isinstance(v.type, ir.TensorType)), None):
        return f"{other.name} is no tensor"
    if untyped := next((v for v in values if v.name and v.dtype is None), None):
        return f"the element type of {untyped.name} is not known"
    if name in QDQ and opset < 19:
        return f"its scale is FP32 in opset {opset}; from 19 on it may be FP16"
    floats = [i for i, value in enumerate(node.inputs) if value is not None and value.dtype == ir.DataType.FLOAT]
    if name == "BitCast":
        return "it reads the bits of a number, which another type has not"
    if floats and not any(takes(node, i, target) for i in floats):
        return f"{name} of opset {opset} takes no {target.name}"
    built = operators(parse_version(DEFAULT_VERSION)).types.get(name, frozenset())
    if floats and ir.DataType.FLOAT in built and target not in built:
        return f"TensorRT has no {name} in {target.name}"
    if name == "Gemm" and any(attribute(node, key, 1.0) != 1 for key in ("alpha", "beta")[: len(node.inputs) - 1]):
        return "TensorRT makes FP32 constants of its alpha and beta"
    if not floats and any(o.dtype == ir.DataType.FLOAT for o in node.outputs):
        if name not in _TYPED_FREELY:
            return f"an attribute of {name} makes its result FP32"
        if not makes(node, 0, target):
            return f"{name} of opset {opset} makes no {target.name}"
    return None


def _normalization(node: ir.Node, _policy: Policy) -> str | None:
    if node.op_type not in NORMALIZATIONS:
        return None
    return "adds up squares of the residual stream; TensorRT computes it in the type of its input"


def _softmax(node: ir.Node, _policy: Policy) -> str | None:
    """An attention's is typed as its products: TensorRT documents that form to fuse, and its kernel computes in FP32 by
    itself. TensorRT for RTX 1.7.1 makes the same kernels of an FP32 one, and the numbers are the same: scores and
    probabilities are FP16 in front of the Casts and behind them.
    """
    if node.op_type in SOFTMAX and not (node.op_type == "Softmax" and _weighs_values(node.outputs[0])):
        return "exponentials and their sum"
    if node.op_type == "Exp" and any(_adds_up(reader) for reader in node.outputs[0].consumers()):
        return "exponentials for a sum"
    return None


def _weighs_values(value: ir.Value) -> bool:
    """Whether nothing reads a value but products with another activation, as the probabilities of an attention."""
    uses = value.uses()
    return bool(uses) and not value.is_graph_output() and all(_leads_to_values(*use) for use in uses)


def _leads_to_values(node: ir.Node, position: int) -> bool:
    if is_onnx(node, "MatMul", "Einsum"):
        return len(node.inputs) == 2 and all(v is not None and v.const_value is None for v in node.inputs)
    return position == 0 and is_onnx(node, "Dropout", *QDQ, *MOVEMENT) and _weighs_values(node.outputs[0])


def _reduction(node: ir.Node, _policy: Policy) -> str | None:
    if _adds_up(node):
        return "adds up many terms"
    squares = node.op_type in _SQUARES and (node.op_type == "Pow" or node.inputs[0] is node.inputs[1])
    if squares and any(_adds_up(reader) for reader in node.outputs[0].consumers()):
        return "squares for a sum: the square of 256 is beyond FP16"
    if node.op_type in _APPLIES_SUM and any(_is_statistic(value) for value in node.inputs):
        return "reads a sum: a variance may be as large as a square, and as small as its epsilon"
    return None


def _integer(node: ir.Node, policy: Policy) -> str | None:
    floats = [output for output in node.outputs if output.dtype == ir.DataType.FLOAT]
    if node.op_type not in _COUNTS or not floats or not all(_becomes_integer(output) for output in floats):
        return None
    return f"its result becomes an integer; {policy.target.name} counts to {2 << policy.target.mantissa_bitwidth}"


def _range(node: ir.Node, policy: Policy) -> str | None:
    for value in (*node.inputs, *node.outputs):
        seen = 0.0 if value is None else policy.magnitudes.get(value.name or "", 0.0)
        if value is not None and seen > policy.limit and not is_clipped(value, policy):
            return f"{value.name} reaches {seen:.4g} in the data; {policy.target.name} ends at {policy.largest:g}"
    return None


def _constant(node: ir.Node, policy: Policy) -> str | None:
    for position, value in enumerate((*node.inputs, *node.outputs)):
        rounding = policy.examine(value)
        if rounding is None or value is None:
            continue
        if policy.overflows(value):
            return f"{rounding.overflowed} of {rounding.size} values of {value.name} are beyond {policy.largest:g}"
        if rounding.vanishes:
            return f"{value.name} ({rounding.largest:.3g}) would become zero"
        if rounding.subnormal and position == 1 and node.op_type in QDQ:
            return f"{rounding.subnormal} of {rounding.size} scales of {value.name} would lose their digits"
    if (other := _finer_partner(node, policy)) is not None:
        return f"it is multiplied with what {other.name} scales, in FP32: NVIDIA's builder takes no two types"
    return None


def _finer_partner(node: ir.Node, policy: Policy) -> ir.Value | None:
    """Return the scales of the other operand of a product of quantised values, where they have to stay FP32.

    TensorRT for RTX 1.7 builds no MatMul whose operands are scaled in FP16 and, channel by channel, in FP32.
    """
    if node.op_type not in QDQ:
        return None
    ends = node.outputs[0].consumers()
    pairs = [node] if node.op_type == "DequantizeLinear" else [n for n in ends if n.op_type == "DequantizeLinear"]
    products = [n for pair in pairs for n in pair.outputs[0].consumers() if is_onnx(n, "MatMul")]
    for value in (value for product in products for value in product.inputs):
        other = None if value is None else value.producer()
        if other is None or other in pairs or other.op_type != "DequantizeLinear":
            continue
        rounding = policy.examine(other.inputs[1])
        if rounding is not None and rounding.subnormal and rounding.size > 1:
            return other.inputs[1]
    return None


def _overflow(node: ir.Node, policy: Policy) -> str | None:
    value = next((v for v in node.inputs if policy.is_beyond(v)), None)
    if value is None or is_onnx(node, "Shape", "Size"):
        return None
    return f"{value.name} is computed from a constant beyond {policy.largest:g}, and may be as large"


def _adds_up(node: ir.Node) -> bool:
    return (node.op_type.startswith("Reduce") and node.op_type not in _ORDER) or node.op_type in _SUMS


def _is_statistic(value: ir.Value | None) -> bool:
    """Whether a value is a mean, a variance, a norm, or computed from one and constants."""
    node = None if value is None else value.producer()
    if node is None:
        return False
    if node.op_type.startswith("Reduce"):
        return _adds_up(node)
    if node.op_type not in _APPLIES_SUM | MOVEMENT.keys():
        return False
    floats = [v for v in node.inputs if v is not None and v.dtype == ir.DataType.FLOAT]
    computed = [v for v in floats if stored(v) is None]
    return bool(computed) and all(_is_statistic(v) for v in computed)


def _becomes_integer(value: ir.Value) -> bool:
    """Whether all that is read of a value, through arithmetic, is cast to an integer: an index, a position."""
    readers = value.consumers()
    if not readers or value.is_graph_output():
        return False
    results = [(reader, output) for reader in readers for output in reader.outputs]
    return all(
        reader.op_type in _COUNTS
        and (
            _becomes_integer(output)
            if output.dtype == ir.DataType.FLOAT
            else output.dtype is not None and output.dtype.is_integer()
        )
        for reader, output in results
    )


def is_clipped(value: ir.Value, policy: Policy) -> bool:
    """Say whether a value is large in FP32 only because a mask is that will be clipped."""
    node = value.producer()
    if not feeds_softmax(value) or (node is not None and node.op_type not in MASKING):
        return False
    if node is None or stored(value) is not None:
        rounding = policy.examine(value)
        return rounding is not None and rounding.near > 0
    return any(v is not None and is_clipped(v, policy) for v in node.inputs)


RULES: Mapping[str, Callable[[ir.Node, Policy], str | None]] = {
    "user": _user,  # first: what the user asked for is the reason that is shown
    "control-flow": _control_flow,
    "unsupported": _unsupported,
    "layer-norm": _normalization,
    "softmax": _softmax,
    "reduction": _reduction,
    "integer": _integer,
    "range": _range,
    "constant": _constant,
    "overflow": _overflow,
}
"""Name -> rule; the first that has a reason decides."""

OPTIONAL_RULES = frozenset({"layer-norm", "softmax", "reduction", "integer", "range"})
"""Rules that a user may switch off: the graph stays valid without them."""
