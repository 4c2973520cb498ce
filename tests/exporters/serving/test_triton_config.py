from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from deploycli.exporters.serving.triton_config import Symbol, comment, dumps, quote
from tests.exporters.serving.triton_schema import parse

TEXTS = st.text(st.characters(codec="utf-8"))


@given(TEXTS)
def test_quoted_text_is_read_back_by_protobuf(text: str) -> None:
    written = dumps({"name": text})
    assert parse(written).name == text
    assert written.count("\n") == 1


def test_half_a_surrogate_pair_is_written_as_something_readable() -> None:
    assert quote("a\udcffb") == '"a?b"'


@given(TEXTS)
def test_comment_is_one_line_that_is_passed_over(text: str) -> None:
    written = comment(text) + dumps({"name": "n"})
    assert parse(written).name == "n"


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
