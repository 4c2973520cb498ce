"""Proof of precision: what the layers of a built engine compute in, read from the engine inspector's JSON.

Sources: TensorRT, "Engine Inspector" and "Migrating IEngineInspector usage from TensorRT 10.x to 11.x". In 10.x a
tensor says ``"Format/Datatype": "Half"`` or ``"Row major linear FP16 format"`` and the engine lists the names of its
``Bindings``; in 11.x it says ``"DataType": "Half"`` and the engine describes its ``I/O Tensors``.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from models.errors import BuildError, UsageError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

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
_COMPUTING_TYPES = frozenset({"fp32", "fp16", "bf16", "fp8", "fp4", "int8", "int4"})

_BOOKKEEPING = frozenset({"constant", "noop", "reformat", "shapehostshape", "shapehosttodevice", "signal", "wait"})
"""Layers that compute nothing."""

_FUSED_ATTENTION = re.compile(r"gemm_mha|gemv_mha|fmha|\bmha\b|fused_attention", re.IGNORECASE)
"""What layers and kernels of fused attention are called."""

_ONNX_NODE = re.compile(r"\[ONNX Layer: ([^\]]+)\]")


@dataclass(frozen=True)
class Layer:
    """One layer of an engine.

    Attributes:
        name: TensorRT's name of it.
        kind: TensorRT's type of layer; empty where the engine was built without details.
        inputs: element types of its inputs.
        outputs: element types of its outputs.
        fused_attention: whether it is a kernel of fused attention.
        nodes: the ONNX nodes that it computes, as far as it says.
    """

    name: str
    kind: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    fused_attention: bool
    nodes: tuple[str, ...]

    @property
    def computes(self) -> bool:
        """Whether it does arithmetic on floating-point or quantised values."""
        return self.kind.lower() not in _BOOKKEEPING and bool({*self.inputs, *self.outputs} & _COMPUTING_TYPES)

    @property
    def precision(self) -> str:
        """The narrowest type of its inputs, which its products are computed in; of its outputs where it has none."""
        order = ("int4", "fp4", "int8", "fp8", "fp16", "bf16", "fp32")
        types = [t for t in order if t in (self.inputs or self.outputs)] or [t for t in order if t in self.outputs]
        return types[0] if types else "other"


@dataclass(frozen=True)
class EngineLayers:
    """The layers of an engine.

    Attributes:
        layers: in the order of execution.
        detailed: whether the engine says what its layers compute in.
    """

    layers: tuple[Layer, ...]
    detailed: bool

    @property
    def computing(self) -> tuple[Layer, ...]:
        """The layers that do arithmetic."""
        return tuple(layer for layer in self.layers if layer.computes)

    @property
    def per_type(self) -> dict[str, int]:
        """Precision -> number of computing layers, most frequent first."""
        return dict(Counter(layer.precision for layer in self.computing).most_common())

    @property
    def fused_attention(self) -> int:
        """Number of kernels of fused attention."""
        return sum(layer.fused_attention for layer in self.layers)

    def share(self, precision: str) -> float:
        """Share of the computing layers that compute in a precision, 0 to 1; 0 where the engine does not say.

        What serves a precision counts for it: in an INT8 engine that is what reads INT8, in an FP16 engine what reads
        FP16 or less.
        """
        if not self.computing:
            return 0.0
        served = _SERVES.get(precision, frozenset({precision}))
        return sum(layer.precision in served for layer in self.computing) / len(self.computing)

    def to_json(self) -> dict[str, Any]:
        """Return the figures as JSON values."""
        return {
            "layers": len(self.layers),
            "computing": len(self.computing),
            "per_type": self.per_type,
            "fused_attention": self.fused_attention,
            "detailed": self.detailed,
        }


_SERVES: Mapping[str, frozenset[str]] = {
    "fp16": frozenset({"fp16", "fp8", "int8"}),
    "bf16": frozenset({"bf16", "fp8", "int8"}),
    "int8": frozenset({"int8"}),
    "fp32": frozenset({"fp32"}),
}


@dataclass(frozen=True)
class PrecisionAssertion:
    """A share of layers that must compute in a precision.

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
        found = re.fullmatch(r"\s*(\w+)\s*>=\s*(\d+(?:\.\d+)?)\s*%\s*", text)
        if found is None or found[1] not in _SERVES or not 0 < float(found[2]) <= 100:
            raise UsageError(
                f"{text!r} is no assertion on precision", expected=f"such as fp16>=80%, of {', '.join(_SERVES)}"
            )
        return cls(found[1], float(found[2]) / 100)

    def breach(self, layers: EngineLayers) -> str:
        """Say how an engine breaks the assertion, or return an empty string."""
        if not layers.detailed:
            return f"the engine does not say what its layers compute in, so {self} is not proven"
        share = layers.share(self.precision)
        if share >= self.share:
            return ""
        found = ", ".join(f"{count} {precision}" for precision, count in layers.per_type.items())
        return f"{share:.0%} of {len(layers.computing)} layers compute in {self.precision} ({found}), expected {self}"

    def __str__(self) -> str:
        """Return the assertion as it is written."""
        return f"{self.precision}>={100 * self.share:g}%"


DEFAULT_ASSERTIONS: Mapping[str, PrecisionAssertion] = {
    "fp32": PrecisionAssertion("fp32", 0.9),
    "fp16": PrecisionAssertion("fp16", 0.8),
    # Normalisations, activations and additions between the products stay in FP16: the products are what counts.
    "int8": PrecisionAssertion("int8", 0.2),
}
"""Precision of a build -> what its engine must keep, unless the user says otherwise."""


def parse_layers(text: str) -> EngineLayers:
    """Read the inspector's JSON, of 10.x or of 11.x.

    Raises:
        BuildError: it is not JSON, or has no layers.
    """
    try:
        data = json.loads(text)
    except ValueError as error:
        raise BuildError(f"the engine inspector returned no JSON: {error}", expected="its layers as JSON") from error
    entries = data.get("Layers") if isinstance(data, dict) else data
    if not isinstance(entries, list) or not entries:
        raise BuildError("the engine inspector lists no layers", expected='a list under the key "Layers"')
    layers = tuple(_layer(entry) for entry in entries)
    return EngineLayers(layers, any(layer.inputs or layer.outputs for layer in layers))


def _layer(entry: Any) -> Layer:
    """Read one entry: an object, or only a name where the engine was built without details."""
    if not isinstance(entry, dict):
        return Layer(str(entry), "", (), (), bool(_FUSED_ATTENTION.search(str(entry))), ())
    name, kind = str(entry.get("Name", "")), str(entry.get("LayerType", ""))
    words = " ".join((name, kind, str(entry.get("TacticName", ""))))
    nodes = tuple(dict.fromkeys(_ONNX_NODE.findall(str(entry.get("Metadata", "")))))
    inputs, outputs = (tuple(_types(entry.get(key, ()))) for key in ("Inputs", "Outputs"))
    return Layer(name, kind, inputs, outputs, bool(_FUSED_ATTENTION.search(words)), nodes)


def _types(tensors: Any) -> Iterable[str]:
    for tensor in tensors if isinstance(tensors, list) else ():
        if isinstance(tensor, dict):
            text = str(tensor.get("DataType") or tensor.get("Format/Datatype") or tensor.get("Format") or "")
            yield next((name for name, pattern in _TYPES.items() if pattern.search(text)), "other")
