"""Classes of ONNX's operators: each is said once, here, and whoever asks for a class imports it.

What one rule or one pass alone knows of an operator, such as what TensorRT's parser makes of it, stands where it is
used. What movement does is in `movement_ops`, what operators multiply in `products`.

Source: https://onnx.ai/onnx/operators/ (opsets 13 to 24).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    import onnx_ir as ir

    from deploycli.exporters.graph.movement_ops import Array

ATTENTION_OPSET = 23
"""The first that has the operator Attention; from here on PyTorch writes it, and ONNX Runtime wants a mask for every
query of it."""

ONNX_DOMAINS = frozenset({"", "ai.onnx"})
"""Two names of one operator set."""


def is_onnx(node: ir.Node, *op_types: str) -> bool:
    """Say whether a node is an operator of the ONNX domain, and one of those named, if any are."""
    return node.domain in ONNX_DOMAINS and (not op_types or node.op_type in op_types)


def operand(node: ir.Node, position: int) -> ir.Value | None:
    """Return an operand, or None where it is absent."""
    return node.inputs[position] if position < len(node.inputs) else None


def only_reader(value: ir.Value) -> ir.Node | None:
    """Return the operator that reads a value, once, where nothing else does; None where there is no such one."""
    uses = list(value.uses())
    return uses[0].node if len(uses) == 1 and not value.is_graph_output() else None


def opset(imports: Mapping[str, int]) -> int:
    """Return the version of the ONNX operator set, which has two names; 0 where a file imports none."""
    return next((version for domain, version in imports.items() if domain in ONNX_DOMAINS), 0)


# --- numbers one by one ----------------------------------------------------------------------------------------------

ARITHMETIC: Mapping[str, Callable[[Array, Array], Array]] = {
    "Add": np.add,
    "Div": np.divide,
    "Mul": np.multiply,
    "Sub": np.subtract,
}
"""Of two floating-point operands, and NumPy's functions of the same meaning."""

BROADCASTING = frozenset(
    {
        *ARITHMETIC,
        *("And", "BitwiseAnd", "BitwiseOr", "BitwiseXor", "Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual"),
        *("Max", "Mean", "Min", "Mod", "Or", "Pow", "Sum", "Where", "Xor"),
    }
)
"""They repeat any of their operands along axes of length 1."""

ACTIVATIONS = frozenset(
    {
        *("Celu", "Elu", "Gelu", "HardSigmoid", "HardSwish", "LeakyRelu", "Mish", "PRelu", "Relu", "Selu", "Sigmoid"),
        *("Softplus", "Softsign", "Swish", "Tanh", "ThresholdedRelu"),
    }
)

ELEMENTWISE = frozenset(
    {
        *BROADCASTING,
        *ACTIVATIONS,
        *("Abs", "Acos", "Acosh", "Asin", "Asinh", "Atan", "Atanh", "BitwiseNot", "Cast", "Ceil", "Clip", "Cos"),
        *("Cosh", "Erf", "Exp", "Floor", "IsInf", "IsNaN", "Log", "Neg", "Not", "Reciprocal", "Round", "Shrink"),
        *("Sign", "Sin", "Sinh", "Sqrt", "Tan"),
    }
)
"""Each number of the result is computed from the numbers in the same place. Identity is movement."""

# --- numbers of some axes together -----------------------------------------------------------------------------------

REDUCTIONS = frozenset(
    {
        *("ReduceL1", "ReduceL2", "ReduceLogSum", "ReduceLogSumExp", "ReduceMax", "ReduceMean", "ReduceMin"),
        *("ReduceProd", "ReduceSum", "ReduceSumSquare"),
    }
)
"""Over the axes that an operand or an attribute names; the order of the numbers does not matter."""

SOFTMAX = frozenset({"LogSoftmax", "Softmax"})

TRAILING_NORMALIZATIONS = frozenset({"LayerNormalization", "RMSNormalization"})
"""Over all axes from one on."""

NORMALIZATIONS = TRAILING_NORMALIZATIONS | {
    *("BatchNormalization", "GroupNormalization", "InstanceNormalization", "LpNormalization"),
    "MeanVarianceNormalization",
}

PRODUCTS = frozenset({"Conv", "Gemm", "MatMul"})
"""Of an activation and a weight; a MatMul also of two activations."""

# --- no numbers ------------------------------------------------------------------------------------------------------

VIEWS = frozenset({"Flatten", "Identity", "Reshape", "Squeeze", "Unsqueeze"})
"""They say how the elements are counted, and move none."""

COPIES = frozenset(
    {"CenterCropPad", "Compress", "Concat", "ConcatFromSequence", "DepthToSpace", "Expand", "Gather", "GatherElements",
     "GatherND", "Pad", "ReverseSequence", "Scatter", "ScatterElements", "ScatterND", "Slice", "SpaceToDepth", "Split",
     "SplitToSequence", "TensorScatter", "Tile", "Transpose", "Trilu"}
)  # fmt: skip
"""They write what they have read, and compute nothing."""

# --- numbers from elsewhere ------------------------------------------------------------------------------------------

QDQ = ("QuantizeLinear", "DequantizeLinear")

DRAWN = frozenset({"RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike"})
"""Numbers are drawn, of the type that an attribute names."""

WINDOWS = frozenset({"BlackmanWindow", "HammingWindow", "HannWindow"})
"""Window functions of signal processing, of the type that an attribute names."""
