"""Write ``exporters/lint/operators.json`` from the operator table of TensorRT's ONNX parser.

Usage::

    curl -LO https://raw.githubusercontent.com/onnx/onnx-tensorrt/main/docs/operators.md
    python -m tests.exporters.lint.make_operators operators.md

The table says what one release supports. What older releases lack and newer ones add is in their release notes, and
here in :data:`SINCE`. Where NVIDIA's parser takes more types than the table says, or fewer, :data:`TAKEN` and
:data:`REFUSED` say so. Restrictions of single operators are prose there and rules here.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

SOURCE = "https://github.com/onnx/onnx-tensorrt/blob/main/docs/operators.md"

MODULE = "tests.exporters.lint.make_operators"

TARGET = Path(__file__).parents[3] / "exporters" / "lint" / "operators.json"

SINCE = {
    "Attention": "10.14",
    "RMSNormalization": "10.15",
    "RotaryEmbedding": "10.15",
    "TensorScatter": "10.15",
    "Swish": "11.0",
    "DFT": "11.2.1",
}
"""Operators that not every supported release has, by the first that has them.

Sources: the releases of https://github.com/onnx/onnx-tensorrt (10.14, 10.15, 11.0) and TensorRT's release notes
(https://docs.nvidia.com/deeplearning/tensorrt/latest/getting-started/release-notes.html, 11.2.1).
"""

LATER_TYPES = {"Swish": ["FP32", "FP16", "BF16"], "DFT": ["FP32", "FP16"]}
"""Element types of the operators that are newer than the table."""

_MOVES = """Concat DepthToSpace Expand Flatten Gather GatherElements GatherND Identity OneHot Pad Reshape
    ReverseSequence Scatter ScatterElements ScatterND Shape Size Slice SpaceToDepth Split Squeeze Tile Transpose Trilu
    Unsqueeze Where"""

TAKEN: dict[str, str] = {
    "INT8": f"""{_MOVES} Abs Add ArgMax ArgMin AveragePool Cast CastLike Clip Conv Div Dropout Equal Erf EyeLike
        GlobalMaxPool Greater GreaterOrEqual HardSigmoid HardSwish LRN LeakyRelu Less LessOrEqual Max MaxPool
        Min Mul Neg PRelu Reciprocal ReduceL1 ReduceMax ReduceMin ReduceProd ReduceSum ReduceSumSquare Relu
        Resize Shrink Sign Softsign Sub Sum ThresholdedRelu TopK Upsample""",
    "UINT8": "Dropout Equal Identity Shape Size",
    "INT32": "Clip CumSum Dropout GlobalAveragePool GlobalMaxPool RMSNormalization",
    "INT64": "Clip CumSum Dropout GlobalAveragePool GlobalMaxPool RMSNormalization",
    "BOOL": "Dropout Equal Pad Scatter ScatterElements ScatterND",
    "BF16": "GridSample",
}
"""Element type -> the operators that take it, and compile, though the table does not say so."""

REFUSED: dict[str, str] = {
    "INT8": "Gelu",
    "INT32": "Gelu IsNaN Mean ReduceL2 ReduceLogSum ReduceLogSumExp Relu TensorScatter",
    "INT64": "Gelu IsNaN Mean ReduceL2 ReduceLogSum ReduceLogSumExp",
    "FP16": "BlackmanWindow Celu HammingWindow HannWindow MeanVarianceNormalization Range",
    "BF16": """Celu ConvTranspose GlobalLpPool GRU HardSwish LpNormalization LpPool MeanVarianceNormalization
        RandomNormal RandomNormalLike RandomUniform RandomUniformLike Range Shrink""",
}
"""Element type -> the operators whose importer refuses it, though the table says otherwise.

Source of both: the parser and the compiler of TensorRT for RTX 1.7, asked about every operator in every type.
"""

_TYPES = frozenset({"FP32", "FP16", "BF16", "FP8", "FP4", "INT4", "INT8", "INT32", "INT64", "UINT8", "BOOL"})
_RANGE = re.compile(r"TensorRT (\d+(?:\.\d+)*) supports operators in the inclusive range of opset (\d+) to opset (\d+)")


def read_table(text: str) -> dict[str, Any]:
    """Read the Markdown of the table.

    Returns:
        What ``operators.json`` holds. An operator without types is not supported.

    Raises:
        ValueError: the text does not have the form of the table.
    """
    found = _RANGE.search(text)
    if found is None:
        raise ValueError("the range of opsets is missing")
    operators: dict[str, dict[str, Any]] = {}
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        if not line.startswith("|") or len(cells) < 2 or not re.fullmatch(r"[YN]\b.*", cells[1]):
            continue
        types = [name.strip() for name in cells[2].split(",")] if len(cells) > 2 and cells[1].startswith("Y") else []
        types = [name for name in types if name]
        if not set(types) <= _TYPES or bool(types) != cells[1].startswith("Y"):
            raise ValueError(f"the types of {cells[0]} are not known: {types}")
        operators[cells[0]] = {"types": types}
    for name, types in LATER_TYPES.items():
        if not operators.get(name, {}).get("types"):
            operators[name] = {"types": types}
    for key, names in TAKEN.items():
        for row in (operators[name] for name in names.split() if name in operators):
            row["types"] += [key] * (key not in row["types"])
    for key, names in REFUSED.items():
        for row in (operators[name] for name in names.split() if name in operators):
            row["types"] = [found for found in row["types"] if found != key]
    for name, release in SINCE.items():
        operators.setdefault(name, {"types": []})["since"] = release
    return {
        "about": f"Operators of TensorRT's ONNX parser, an unsupported one without types. Generated by {MODULE}.",
        "source": SOURCE,
        "table": found[1],
        "opsets": [int(found[2]), int(found[3])],
        "operators": dict(sorted(operators.items())),
    }


def write_table(table: dict[str, Any]) -> str:
    """Return the text of ``operators.json``: one operator a line, for a readable difference."""
    head = [f"  {json.dumps(key)}: {json.dumps(value)}," for key, value in table.items() if key != "operators"]
    rows = [f"    {json.dumps(name)}: {json.dumps(row)}" for name, row in table["operators"].items()]
    return "\n".join(["{", *head, '  "operators": {', ",\n".join(rows), "  }", "}", ""])


if __name__ == "__main__":
    TARGET.write_text(write_table(read_table(Path(sys.argv[1]).read_text("utf-8"))), "utf-8")
