"""Which operators a TensorRT release has, and for which element types. The data is ``operators.json``."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import TYPE_CHECKING

import onnx_ir as ir

from deploycli.models.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Mapping

Version = tuple[int, ...]

OLDEST: Version = (10, 12)
"""The first release whose strongly typed networks NVIDIA recommends."""

NEWEST_MAJOR = 11
"""All of its minor releases are accepted: what they add is additive."""

PARSER_PLUGINS = frozenset(
    {
        "TRT_BlockQuantize",
        "TRT_DynamicQuantize",
        "TRT_FP4DynamicQuantize",
        "TRT_FP8DequantizeLinear",
        "TRT_FP8QuantizeLinear",
        "TRT_INT4DequantizeLinear",
        "TRT_INT4QuantizeLinear",
        "TRT_MXFP8DequantizeLinear",
        "TRT_MXFP8DynamicQuantize",
        "TRT_QuantizedAttention",
    }
)
"""Operators of no standard domain that the parser itself knows. Source: onnx-tensorrt ``onnxOpImporters.cpp``."""

_TYPES = {
    "FP32": ir.DataType.FLOAT,
    "FP16": ir.DataType.FLOAT16,
    "BF16": ir.DataType.BFLOAT16,
    "FP8": ir.DataType.FLOAT8E4M3FN,
    "FP4": ir.DataType.FLOAT4E2M1,
    "INT4": ir.DataType.INT4,
    "INT8": ir.DataType.INT8,
    "INT32": ir.DataType.INT32,
    "INT64": ir.DataType.INT64,
    "UINT8": ir.DataType.UINT8,
    "BOOL": ir.DataType.BOOL,
}


@dataclass(frozen=True)
class Operators:
    """What one release supports.

    Attributes:
        opsets: versions of the ONNX operator set.
        types: operator -> the element types of its data.
        since: operator that this release lacks -> the first release that has it.
    """

    opsets: range
    types: Mapping[str, frozenset[ir.DataType]]
    since: Mapping[str, str]


def parse_version(text: str) -> Version:
    """Read a TensorRT version, ``11.4`` or ``10.16.1.11``.

    Raises:
        UsageError: it is no version, or one that is not supported.
    """
    expected = f"{_text(OLDEST)} to {NEWEST_MAJOR}.x"
    if not re.fullmatch(r"\d{1,4}(\.\d{1,4}){1,3}", text):
        raise UsageError(f"{text!r} is no TensorRT version", expected=expected, hint="11.4")
    version = tuple(int(part) for part in text.split("."))
    if version[:2] < OLDEST or version[0] > NEWEST_MAJOR:
        raise UsageError(f"the rules for TensorRT {text} are not known", expected=expected)
    return version


@cache
def operators(version: Version) -> Operators:
    """Return what a release supports."""
    data = json.loads(resources.files("deploycli.exporters.lint").joinpath("operators.json").read_text("utf-8"))
    types, since = dict[str, frozenset[ir.DataType]](), dict[str, str]()
    for name, row in data["operators"].items():
        first = row.get("since", "0")
        if version < tuple(int(part) for part in first.split(".")):
            since[name] = first
        elif row["types"]:
            types[name] = frozenset(_TYPES[key] for key in row["types"])
    low, high = data["opsets"]
    return Operators(range(low, high + 1), types, since)


def _text(version: Version) -> str:
    return ".".join(map(str, version))
