from __future__ import annotations

import pytest
from google.protobuf import text_format
from hypothesis import given
from hypothesis import strategies as st

from deploycli.exporters.serving.text_proto import Symbol, comment, dumps, loads, quote
from tests.exporters.serving.triton_schema import message_class, parse

TEXTS = st.text(st.characters(codec="utf-8"))
FOREIGN = r"""
# what people write
name: 'it''s' "\303\251\x41\n"  platform: "onnxruntime_onnx";
max_batch_size: 0x8
input [ { name: "a" data_type: TYPE_FP32, dims: [3, -1] }, { name: "b # no comment" dims: 4 dims: 5 } ]
output < name: "o" data_type: TYPE_BF16 >
optimization { cuda { graphs: true graph_spec [ { batch_size: 3 input { key: "a" value { dim: [] } } } ] } }
parameters: { key: "k" value: { string_value: "{ [" } }
"""


@given(TEXTS)
def test_quoted_text_is_read_back_by_protobuf_and_by_us(text: str) -> None:
    written = dumps({"name": text})
    assert parse(written).name == text
    assert loads(written) == {"name": [text]}
    assert written.count("\n") == 1


def test_half_a_surrogate_pair_is_written_as_something_readable() -> None:
    assert quote("a\udcffb") == '"a?b"'


@given(TEXTS)
def test_comment_is_one_line_that_is_passed_over(text: str) -> None:
    written = comment(text) + dumps({"name": "n"})
    assert parse(written).name == "n"
    assert loads(written) == {"name": ["n"]}


def test_messages_lists_and_symbols() -> None:
    message = {
        "max_batch_size": 8,
        "input": [{"name": "a", "data_type": Symbol("TYPE_FP16"), "dims": [3, -1]}, {"name": "b", "reshape": {}}],
        "optimization": {"cuda": {"graphs": True, "graph_spec": [{"batch_size": 1}, {"batch_size": 8}]}},
        "dynamic_batching": {},
    }
    config = parse(dumps(message))
    assert [list(tensor.dims) for tensor in config.input] == [[3, -1], []]
    assert [tensor.HasField("reshape") for tensor in config.input] == [False, True]
    assert [spec.batch_size for spec in config.optimization.cuda.graph_spec] == [1, 8]
    assert config.optimization.cuda.graphs
    assert config.HasField("dynamic_batching")


def test_what_people_write_is_read_as_protobuf_reads_it() -> None:
    read, config = loads(FOREIGN), parse(FOREIGN)
    assert read["name"] == [config.name] == ["itséA\n"]
    assert read["max_batch_size"] == [config.max_batch_size] == [8]
    assert [tensor["dims"] for tensor in read["input"]] == [list(tensor.dims) for tensor in config.input]  # type: ignore[index]
    assert read["input"][1]["name"] == ["b # no comment"]  # type: ignore[index]
    assert read["output"] == [{"name": ["o"], "data_type": [Symbol("TYPE_BF16")]}]
    assert read["parameters"] == [{"key": ["k"], "value": [{"string_value": ["{ ["]}]}]


@pytest.mark.parametrize(
    "text", ["{", "a", "a:", 'a: "', "a {", "a: [", "a: ]", '"x"', "a 3", "a: {}}", "a: , b: 1", "a: é%", "a {" * 5000]
)
def test_what_is_no_message_is_an_error_for_both(text: str) -> None:
    with pytest.raises(ValueError, match=r".+"):
        loads(text)
    with pytest.raises((text_format.ParseError, RecursionError)):
        text_format.Parse(text, message_class()(), allow_unknown_field=True)
