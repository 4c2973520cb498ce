"""The table of operators, and what writes it."""

from __future__ import annotations

import json

import onnx
import onnx_ir as ir
import pytest

from deploycli.exporters.lint.versions import operators, parse_version
from tests.exporters.lint.make_operators import LATER_TYPES, SINCE, SOURCE, TARGET, read_table, write_table

TABLE = """
TensorRT 10.15 supports operators in the inclusive range of opset 9 to opset 24. More below.

| Operator | Supported | Supported Types | Restrictions |
|----------|-----------|-----------------|--------------|
| Abs      | Y         | FP32, FP16, BF16, INT32, INT64 |
| BitShift | N         |
| Celu     | Y         | FP32, FP16, BF16 |
| Selu     | Y         | FP32, FP16, BF16, | |
| RMSNormalization | Y | FP32, FP16, BF16 |
| DFT      | N         |
"""


def test_the_table_is_read() -> None:
    table = read_table(TABLE)
    assert (table["table"], table["opsets"], table["source"]) == ("10.15", [9, 24], SOURCE)
    assert table["operators"]["Abs"] == {"types": ["FP32", "FP16", "BF16", "INT32", "INT64", "INT8"]}  # it was asked
    assert table["operators"]["Celu"] == {"types": ["FP32"]}
    assert table["operators"]["BitShift"] == {"types": []}
    assert table["operators"]["Selu"] == {"types": ["FP32", "FP16", "BF16"]}
    assert table["operators"]["RMSNormalization"]["since"] == "10.15"
    assert table["operators"]["DFT"] == {"types": LATER_TYPES["DFT"], "since": "11.2.1"}


@pytest.mark.parametrize(
    "text", ["", TABLE.replace("9 to", "9 or"), TABLE.replace("INT32", "INT31"), TABLE.replace("N  ", "Y  ")]
)
def test_another_table_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"range of opsets|types of"):
        read_table(text)


def test_the_file_is_what_its_writer_writes() -> None:
    text = TARGET.read_text("utf-8")
    assert write_table(json.loads(text)) == text
    table = json.loads(text)
    assert {name for name, row in table["operators"].items() if "since" in row} == set(SINCE)
    assert len(table["operators"]) > 190
    known = {s.name for s in onnx.defs.get_all_schemas_with_history() if s.domain == ""}
    assert set(table["operators"]) - known == {"ImageScaler", "ParametricSoftplus", "ScaledTanh"}  # of very old opsets


@pytest.mark.parametrize(("name", "first"), SINCE.items())
def test_what_a_release_adds(name: str, first: str) -> None:
    version = parse_version(first)
    assert name in operators(version).types
    before = operators((*version[:-1], version[-1] - 1)) if version[-1] else operators((10, 16))
    assert name not in before.types
    assert before.since[name] == first


def test_types_and_opsets() -> None:
    known = operators((11, 4))
    assert known.opsets == range(9, 25)
    assert known.types["And"] == {ir.DataType.BOOL}
    assert ir.DataType.BOOL not in known.types["Add"]
    assert "Unique" not in known.types
