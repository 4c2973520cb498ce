"""Proof of precision: what the layers of a built engine compute in, read from the engine inspector's JSON.

In 10.x a tensor says ``"Format/Datatype": "Half"`` or ``"Row major linear FP16 format"``, and the engine lists the
names of its ``Bindings``; in 11.x it says ``"DataType": "Half"``, and the engine describes its ``I/O Tensors``. Where
an axis is dynamic, some layers say ``"N/A due to dynamic shapes"``: then the layer's own ``Precision``, the type of its
weights and the name of its kernel are asked, in this order.

What is read is the type of the values that a layer takes in. A generated kernel (``kgen``) that reads FP16, normalises
in FP32 and writes FP16 counts as FP16: that is what a LayerNorm between two casts becomes, and what crosses the memory
bus. What assertions are about is therefore the products: matrix products, convolutions and fused attention, which do
the arithmetic and whose operand type is the type that they multiply in. A product inside of a generated kernel does not
show; `EngineLayers.per_type` counts every computing layer.

Sources: TensorRT, "Engine Inspector", https://docs.nvidia.com/deeplearning/tensorrt/latest/inference-library/
engine-tools.html, and "Migrating IEngineInspector usage from TensorRT 10.x to 11.x".
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from deploycli.models.errors import BuildError, UsageError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

# Longer names first: BF16 is no FP16, and UINT8 no INT8.
_TYPES: Mapping[str, re.Pattern[str]] = {
    "bf16": re.compile(r"bf16|bfloat16", re.IGNORECASE),
    "fp16": re.compile(r"fp16|half|float16", re.IGNORECASE),
    "fp8": re.compile(r"fp8|e4m3", re.IGNORECASE),
    "fp4": re.compile(r"fp4|e2m1", re.IGNORECASE),
    "fp32": re.compile(r"fp32|float32|\bfloat\b", re.IGNORECASE),
    "uint8": re.compile(r"uint8", re.IGNORECASE),
    "int8": re.compile(r"int8", re.IGNORECASE),
    "int4": re.compile(r"int4", re.IGNORECASE),
    "int32": re.compile(r"int32", re.IGNORECASE),
    "int64": re.compile(r"int64", re.IGNORECASE),
    "bool": re.compile(r"bool", re.IGNORECASE),
}

_KERNELS: Mapping[str, re.Pattern[str]] = {
    "int8": re.compile(r"i8i8|i8816|imma", re.IGNORECASE),
    "fp8": re.compile(r"e4m3", re.IGNORECASE),
    "bf16": re.compile(r"bf16", re.IGNORECASE),
    "fp16": re.compile(r"f16f16|h884|h1688|h16816|hmma|fp16", re.IGNORECASE),
    "fp32": re.compile(r"f32f32|sgemm|tf32", re.IGNORECASE),
}
"""Types of the operands in the names of kernels: ``sm80_xmma_gemm_f16f16_f16f32_f32_tn_n_...``."""

_NARROWEST_FIRST = ("int4", "fp4", "int8", "fp8", "fp16", "bf16", "fp32")

_BOOKKEEPING = frozenset({"constant", "noop", "reformat", "shapehostshape", "shapehosttodevice", "signal", "wait"})
"""Types of layers that compute nothing; copies between formats are among them."""

_NO_KERNEL = frozenset(
    {"constant", "noop", "shapehostshape", "shape_call", "signal", "wait", "cjmp", "reshape", "cast"}
)
"""Types of layers that launch nothing on the GPU: order, jumps, arithmetic on shapes."""

_FUSED_ATTENTION = re.compile(r"gemm_mha|gemv_mha|fmha|(?<![a-z])mha(?![a-z])|fused_attention", re.IGNORECASE)
"""What layers and kernels of fused attention are called."""

_PRODUCT = re.compile(
    r"gemm|gemv|matrixmultiply|matmul|conv(?!ert)|fullyconnected|attention|correlation", re.IGNORECASE
)
"""Types of layers that are products, and what their kernels are called; ``deconv`` is one of them."""

_FUSED_AT_RUN_TIME, _FC = "runtime_fusion", re.compile(r"Fc(?=[A-Z_]|$)")
"""Type of a layer whose kernel is made when the engine is first loaded: a product with what follows it,
``__myl_FcAddAdd``."""

_GENERATED = "kgen"
"""Type of a layer whose kernel TensorRT has generated; a fused attention's may be one."""

_ONNX_NODE = re.compile(r"\[ONNX Layer: ([^\]]+)\]")
_WHOLE_NODE = re.compile(r"\[ONNX Layer: (.+)\]", re.DOTALL)
_NEXT_NODE = "][ONNX Layer: "
_SEPARATOR = re.compile("[\x1e\x1f]")


@dataclass(frozen=True)
class EngineTensor:
    """An activation that a layer reads or writes.

    Attributes:
        name: the compiler's name of it.
        shape: sizes, -1 for an axis that is not fixed.
        dtype: ``fp16``; ``other`` where it is not known.
        strides: elements between two indices of every axis; empty where the engine does not say.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    strides: tuple[int, ...] = ()

    def __str__(self) -> str:
        """Return type and shape: ``fp16 -1x3136x96``."""
        return f"{self.dtype} {'x'.join(map(str, self.shape))}".rstrip()


@dataclass(frozen=True)
class Layer:
    """One layer of an engine.

    Attributes:
        name: TensorRT's name of it.
        kind: TensorRT's type of layer; empty where the engine was built without details.
        inputs: element types of its inputs; of its weights or operands where it says nothing of its inputs.
        outputs: element types of its outputs.
        fused_attention: whether it is a kernel of fused attention.
        product: whether it is a matrix product, a convolution or fused attention.
        nodes: the ONNX nodes that it computes, as far as it says.
        reads: the activations that it reads.
        writes: the activations that it writes.
    """

    name: str
    kind: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    fused_attention: bool
    product: bool
    nodes: tuple[str, ...]
    reads: tuple[EngineTensor, ...] = ()
    writes: tuple[EngineTensor, ...] = ()

    @property
    def launches(self) -> bool:
        """Whether it runs a kernel."""
        return self.kind.lower() not in _NO_KERNEL

    @property
    def computes(self) -> bool:
        """Whether it does arithmetic on floating-point or quantised values."""
        return self.kind.lower() not in _BOOKKEEPING and self.precision != "other"

    @property
    def precision(self) -> str:
        """The narrowest type that it reads; that it writes, where it reads no numbers; else ``other``."""
        found = (t for types in (self.inputs, self.outputs) for t in _NARROWEST_FIRST if t in types)
        return next(found, "other")


@dataclass(frozen=True)
class EngineLayers:
    """The layers of an engine.

    Attributes:
        layers: in the order of execution.
    """

    layers: tuple[Layer, ...]

    @property
    def detailed(self) -> bool:
        """Whether the engine says what its layers compute in."""
        return any(layer.computes for layer in self.layers)

    @property
    def computing(self) -> tuple[Layer, ...]:
        """The layers that do arithmetic."""
        return tuple(layer for layer in self.layers if layer.computes)

    @property
    def launched(self) -> tuple[Layer, ...]:
        """The layers that run a kernel."""
        return tuple(layer for layer in self.layers if layer.launches)

    @property
    def judged(self) -> tuple[Layer, ...]:
        """What assertions are about: the products, or all computing layers where none is known for a product."""
        return tuple(layer for layer in self.computing if layer.product) or self.computing

    @property
    def per_type(self) -> dict[str, int]:
        """Precision -> number of computing layers, most frequent first."""
        return dict(Counter(layer.precision for layer in self.computing).most_common())

    @property
    def products_per_type(self) -> dict[str, int]:
        """Precision -> number of judged layers, most frequent first."""
        return dict(Counter(layer.precision for layer in self.judged).most_common())

    @property
    def fused_attention(self) -> int:
        """Number of kernels of fused attention."""
        return sum(layer.fused_attention for layer in self.layers)

    def share(self, precision: str, missing: int = 0) -> float:
        """Share of the judged layers that compute in a precision, 0 to 1; 0 where the engine does not say.

        What is narrower serves, too: of an engine that shall be FP16, a product in INT8 counts. Products that are
        ``missing`` count as others.
        """
        if not self.judged:
            return 0.0
        return sum(layer.precision in _SERVES[precision] for layer in self.judged) / (len(self.judged) + missing)

    def to_json(self) -> dict[str, Any]:
        """Return the figures as JSON values."""
        return {
            "layers": len(self.layers),
            "computing": len(self.computing),
            "per_type": self.per_type,
            "products_per_type": self.products_per_type,
            "fused_attention": self.fused_attention,
            "detailed": self.detailed,
        }


_SERVES: Mapping[str, frozenset[str]] = {
    "fp16": frozenset({"fp16", "fp8", "int8"}),
    "bf16": frozenset({"bf16", "fp8", "int8"}),
    "fp8": frozenset({"fp8"}),
    "int8": frozenset({"int8"}),
    "fp32": frozenset({"fp32"}),
}


@dataclass(frozen=True)
class PrecisionAssertion:
    """A share of products that must compute in a precision.

    Attributes:
        precision: ``fp16``.
        share: 0 to 1.
    """

    precision: str
    share: float

    @classmethod
    def parse(cls, text: str) -> PrecisionAssertion:
        """Read ``fp16>=80%``.

        Raises:
            UsageError: it is none.
        """
        found = re.fullmatch(r"\s*(\w+)\s*>=\s*(\d+(?:\.\d+)?)\s*%\s*", text, re.ASCII)
        if found is None or found[1] not in _SERVES or not 0 < float(found[2]) <= 100:
            raise UsageError(
                f"{text!r} is no assertion on precision", expected=f"such as fp16>=80%, of {', '.join(_SERVES)}"
            )
        return cls(found[1], float(found[2]) / 100)

    def breach(self, layers: EngineLayers, missing: Sequence[str] = ()) -> str:
        """Say how an engine breaks the assertion, or return an empty string.

        Args:
            layers: of the engine.
            missing: products of its graph that no layer names, of an engine whose layers name theirs.
        """
        if not layers.detailed:
            return f"the engine does not say what its layers compute in, so {self} is not proven"
        share = layers.share(self.precision, len(missing))
        if share >= self.share:
            return ""
        found = ", ".join(f"{count} {precision}" for precision, count in layers.products_per_type.items())
        unknown = f", {len(missing)} in no layer, such as {missing[0]}" if missing else ""
        count = len(layers.judged) + len(missing)
        return f"{100 * share:.1f}% of {count} products are {self.precision} ({found}{unknown}), expected {self}"

    def __str__(self) -> str:
        """Return the assertion as it is written."""
        return f"{self.precision}>={100 * self.share:g}%"


DEFAULT_ASSERTIONS: Mapping[str, PrecisionAssertion] = {
    "fp32": PrecisionAssertion("fp32", 0.9),
    # Normalisations and softmaxes that stay FP32 are no products; a pooling or a head that stays FP32 may be one.
    "fp16": PrecisionAssertion("fp16", 0.8),
    "bf16": PrecisionAssertion("bf16", 0.8),
    # Where nothing is known of the graph; half of what it quantizes otherwise.
    "fp8": PrecisionAssertion("fp8", 0.5),
    "int8": PrecisionAssertion("int8", 0.5),
}
"""Precision of a build -> what its engine must keep, unless the user says otherwise or its graph is known."""

_QUANTIZED = frozenset({"fp8", "int8"})

_OF_WHAT_IS_QUANTIZED = 0.5
"""The compiler leaves products with quantized operands in FP16: 31 % of them in timm's cait_xxs24_224."""


def default_assertion(precision: str, quantized_share: float) -> PrecisionAssertion:
    """Return what an engine must keep where the user does not say.

    Args:
        precision: of the build.
        quantized_share: of the products of its graph, how many are quantized, 0 to 1, or 0 where that is not known. Of
            an INT8 or FP8 engine half of that is asked.
    """
    usual = DEFAULT_ASSERTIONS[precision]
    if precision not in _QUANTIZED or not quantized_share:
        return usual
    return replace(usual, share=math.ceil(100 * _OF_WHAT_IS_QUANTIZED * quantized_share) / 100)


def parse_layers(text: str) -> EngineLayers:
    """Read the inspector's JSON, of 10.x or of 11.x.

    Raises:
        BuildError: it is not JSON, or has no layers.
    """
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BuildError(f"the engine inspector returned no JSON: {error}", expected="its layers as JSON") from error
    entries = data.get("Layers") if isinstance(data, dict) else data
    if not isinstance(entries, list) or not entries:
        raise BuildError("the engine inspector lists no layers", expected='a list under the key "Layers"')
    return EngineLayers(tuple(map(_layer, entries)))


def _layer(entry: Any) -> Layer:
    """Read one entry: an object, or only a name where the engine was built without details."""
    if not isinstance(entry, dict):
        return Layer(str(entry), "", (), (), bool(_FUSED_ATTENTION.search(str(entry))), False, ())
    name, kind, tactic = (str(entry.get(key, "")) for key in ("Name", "LayerType", "TacticName"))
    attention = bool(_FUSED_ATTENTION.search(f"{name} {kind} {tactic}"))
    # A generated kernel is named after what it fuses, and a layer after its ONNX nodes: neither makes it a product.
    product = attention or bool(_PRODUCT.search(kind if kind.lower() == _GENERATED else f"{kind} {tactic}"))
    product = product or (kind.lower() == _FUSED_AT_RUN_TIME and _FC.search(name) is not None)
    nodes = _nodes(str(entry.get("Metadata", "")))
    reads, writes = (_tensors(entry.get(key)) for key in ("Inputs", "Outputs"))
    inputs, outputs = (_types(entry.get(key)) for key in ("Inputs", "Outputs"))
    if not {*inputs, *outputs} - {"other"}:
        inputs = _said_elsewhere(entry, tactic)
    product = product and kind.lower() not in _BOOKKEEPING
    return Layer(name, kind, inputs, outputs, attention, product, nodes, reads, writes)


def _nodes(metadata: str) -> tuple[str, ...]:
    """Return the ONNX nodes, each once: ``[ONNX Layer: a]``, with a separator between two in some versions."""
    found: list[str] = []
    for part in _SEPARATOR.split(metadata):
        whole = _WHOLE_NODE.fullmatch(part)  # a name of its own may hold a bracket
        found += [whole[1]] if whole and _NEXT_NODE not in part else _ONNX_NODE.findall(part)
    return tuple(dict.fromkeys(found))


def _tensors(tensors: Any) -> tuple[EngineTensor, ...]:
    found = tensors if isinstance(tensors, list) else ()
    kept = [tensor for tensor in found if isinstance(tensor, dict)]
    return tuple(
        EngineTensor(
            str(tensor.get("Name", "")), _sizes(tensor.get("Dimensions")), dtype, _sizes(tensor.get("Strides"))
        )
        for tensor, dtype in zip(kept, _types(kept), strict=True)
    )


def _sizes(dimensions: Any) -> tuple[int, ...]:
    found = dimensions if isinstance(dimensions, list) else ()
    return tuple(size for size in found if isinstance(size, int))


def _types(tensors: Any) -> tuple[str, ...]:
    found = tensors if isinstance(tensors, list) else ()
    keys = ("DataType", "Datatype", "Format/Datatype", "Format")
    return tuple(
        _type(next((tensor[key] for key in keys if tensor.get(key)), ""))
        for tensor in found
        if isinstance(tensor, dict)
    )


def _said_elsewhere(entry: Mapping[str, Any], tactic: str) -> tuple[str, ...]:
    """Return what a layer computes in where its tensors do not say."""
    weights = entry.get("Weights")
    said: Sequence[Any] = (entry.get("Precision"), weights.get("Type") if isinstance(weights, dict) else None)
    found: Iterable[str] = (
        *(_type(text) for text in said if text),
        *(name for name, pattern in _KERNELS.items() if pattern.search(tactic)),
    )
    return tuple(name for name in found if name != "other")[:1]


def _type(text: Any) -> str:
    return next((name for name, pattern in _TYPES.items() if pattern.search(str(text))), "other")
