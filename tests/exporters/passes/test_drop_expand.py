from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import pytest

from deploycli.exporters.passes.drop_expand import DropExpand
from tests.exporters.passes.graphs import apply, differences, ops, parse, reasons, transform

drop = partial(transform, DropExpand)

MASKED = """g (float[batch, 4, 2] x) => (float[batch, 4, 2] y) {
    b = Shape <start = 0, end = 1> (x)
    shape = Concat <axis = 0> (b, rest)
    repeated = Expand (mask, shape)
    y = Add (x, repeated)
}"""


def mask(*shape: int) -> Any:
    return np.arange(np.prod(shape), dtype=np.float32).reshape(shape)


@pytest.mark.parametrize("operator", ["Add", "Mul", "Sub"])
def test_an_elementwise_operator_repeats_by_itself(operator: str) -> None:
    plain = parse(MASKED.replace("Add", operator), mask=mask(1, 4, 1), rest=np.array([4, 2]))
    rewritten, graph_pass, modified = apply(DropExpand, plain)
    assert differences(plain, rewritten) == []
    assert (ops(rewritten), modified, reasons(graph_pass)) == ({operator: 1}, True, [])


def test_an_expand_that_makes_the_result_larger_stays() -> None:
    text = """g (float[1, 4, 2] x, float[batch, 1] y) => (float[batch, 4, 2] z) {
        b = Shape <start = 0, end = 1> (y)
        shape = Concat <axis = 0> (b, rest)
        repeated = Expand (mask, shape)
        z = Add (x, repeated)
    }"""
    counts, refusals, modified = drop(text, mask=mask(1, 4, 1), rest=np.array([4, 2]))
    assert counts["Expand"] == 1
    assert (refusals, modified) == (["its result is read as it is"], False)


def test_an_expand_that_a_concat_reads_stays() -> None:
    text = MASKED.replace("y = Add (x, repeated)", "y = Concat <axis = 1> (x, repeated)").replace(
        "float[batch, 4, 2] y", "float[batch, 8, 2] y"
    )
    counts, refusals, modified = drop(text, mask=mask(1, 4, 1), rest=np.array([4, 2]))
    assert counts["Expand"] == 1
    assert (refusals, modified) == (["its result is read as it is"], False)


def test_only_the_readers_that_repeat_lose_it() -> None:
    text = MASKED.replace("=> (", "=> (float[batch, 4, 2] n, ").replace("y = Add", "n = Neg (repeated) y = Add")
    plain = parse(text, mask=mask(1, 4, 1), rest=np.array([4, 2]))
    rewritten, graph_pass, modified = apply(DropExpand, plain)
    assert differences(plain, rewritten) == []
    assert (ops(rewritten)["Expand"], modified) == (1, True)
    assert reasons(graph_pass) == ["its result is read as it is"]
