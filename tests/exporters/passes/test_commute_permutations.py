from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import find, given, settings

from deploycli.exporters.graph.analysis import Analysis
from deploycli.exporters.graph.token_view import Permute, token_view
from deploycli.exporters.passes import commute_permutations as permutations
from deploycli.exporters.passes.commute_permutations import CommutePermutations, Layouts, Planner
from deploycli.exporters.passes.pipeline import rewrite
from deploycli.exporters.passes.shape_rows import ShapeRows
from tests.exporters.passes.graphs import apply, differences, load, ops, parse, proto, session
from tests.exporters.passes.networks import MOVES, networks
from tests.exporters.passes.test_mutants import SEARCH as FIND
from tests.exporters.passes.test_mutants import patched
from tests.exporters.passes.test_properties import examples

if TYPE_CHECKING:
    from collections.abc import Callable

    import onnx

    Patch = Callable[[pytest.MonkeyPatch], None]

RNG = np.random.default_rng(0)
ORDER = np.array([3, 0, 2, 1, 5, 4])
OTHER = np.array([1, 2, 3, 4, 5, 0])
INVERSE, OTHER_INVERSE = np.argsort(ORDER), np.argsort(OTHER)


def numbers(*shape: int) -> Any:
    return RNG.integers(-2, 3, shape).astype(np.float32)


def commute(text: str, **constants: Any) -> tuple[dict[str, int], bool]:
    plain = parse(text, **constants)
    rewritten, _, modified = apply(CommutePermutations, plain)
    assert differences(plain, rewritten) == []
    return ops(rewritten), modified


BLOCK = """g (float[batch, 6, 4] x) => (float[batch, 6, 4] y) {
    n1 = Relu (x)
    a1 = Gather <axis = 1> (n1, order)
    m1 = MatMul (mixing, a1)
    b1 = Gather <axis = 1> (m1, inverse)
    r1 = Add (x, b1)
    p1 = MatMul (r1, w)
    s1 = Add (r1, p1)
    n2 = Relu (s1)
    a2 = Gather <axis = 1> (n2, other)
    m2 = MatMul (mixing, a2)
    b2 = Gather <axis = 1> (m2, other_inverse)
    y = Add (s1, b2)
}"""
TWO_BLOCKS = BLOCK.replace("6, 4] y)", "4, 6] z)").replace("(s1, b2)", "(s1, b2) z = Transpose <perm = [0, 2, 1]> (y)")
CONSTANTS: dict[str, Any] = {
    "order": ORDER,
    "inverse": INVERSE,
    "other": OTHER,
    "other_inverse": OTHER_INVERSE,
    "mixing": numbers(6, 6),
    "w": numbers(4, 4),
}


def test_a_residual_stream_stays_in_the_order_it_was_needed_in() -> None:
    """In: W. Between: W^-1 S. Out: S^-1."""
    counts, modified = commute(TWO_BLOCKS, **CONSTANTS)
    assert (counts.pop("Gather"), modified) == (3, True)
    assert counts == {"Relu": 2, "MatMul": 3, "Add": 3, "Transpose": 1}


def test_the_last_permutation_dies_in_a_reduction() -> None:
    text = BLOCK.replace("float[batch, 6, 4] y)", "float[batch, 4] z)").replace(
        "y = Add (s1, b2)", "y = Add (s1, b2) z = ReduceSum <keepdims = 0> (y, one)"
    )
    counts, _ = commute(text, **CONSTANTS, one=np.array([1]))
    assert counts["Gather"] == 2


def test_a_permutation_and_its_inverse_vanish() -> None:
    text = """g (float[batch, 6, 4] x) => (float[batch, 6, 4] y) {
        a = Gather <axis = 1> (x, order)
        p = MatMul (a, w)
        q = Add (p, bias)
        e = Relu (q)
        y = Gather <axis = 1> (e, inverse)
    }"""
    constants = {"order": ORDER, "inverse": INVERSE, "w": numbers(4, 4)}
    assert commute(text, **constants, bias=numbers(4)) == ({"MatMul": 1, "Add": 1, "Relu": 1}, True)
    # A constant of its own for every token is put into the other order.
    assert commute(text, **constants, bias=numbers(6, 4)) == ({"MatMul": 1, "Add": 1, "Relu": 1}, True)


@pytest.mark.parametrize(
    "mixing",
    [
        "q = MatMul (mix, a)",
        "t = Transpose <perm = [0, 2, 1]> (a) u = MatMul (t, mix) q = Transpose <perm = [0, 2, 1]> (u)",
        "m = ReduceMax (a, one) q = Sub (a, m) z = CumSum (q, one)",
    ],
)
def test_what_mixes_tokens_needs_its_order(mixing: str) -> None:
    """Only the CumSum needs it of the last: a maximum over all tokens is one in any order."""
    text = f"""g (float[batch, 6, 4] x) => (float[batch, 6, 4] y) {{
        a = Gather <axis = 1> (x, order)
        {mixing}
        y = Gather <axis = 1> ({"z" if "CumSum" in mixing else "q"}, inverse)
    }}"""
    used = {"mix": numbers(6, 6)} if "mix" in mixing else {"one": np.array([1])}
    if "CumSum" in mixing:
        used["one"] = np.array(1)
        text = text.replace("ReduceMax (a, one)", "ReduceMax (a, axes)")
        used["axes"] = np.array([1])
    counts, modified = commute(text, order=ORDER, inverse=INVERSE, **used)
    assert (counts["Gather"], modified) == (2, False)


def test_a_constant_that_repeats_itself_over_the_windows_is_refused() -> None:
    text = """g (float[batch, 6, 4] x) => (float[batch, 6, 4] y) {
        a = Gather <axis = 1> (x, order)
        w = Reshape (a, windows)
        q = Add (w, bias)
        b = Reshape (q, image)
        y = Gather <axis = 1> (b, inverse)
    }"""
    constants = {"order": ORDER, "inverse": INVERSE, "windows": np.array([-1, 3, 4]), "image": np.array([-1, 6, 4])}
    assert commute(text, **constants, bias=numbers(3, 4)) == ({"Gather": 2, "Reshape": 2, "Add": 1}, False)
    assert commute(text, **constants, bias=numbers(4))[1]


def test_a_reduction_over_windows_takes_an_order_within_them_only() -> None:
    text = """g (float[batch, 6, 4] x) => (float[two_batch, 4] y) {
        a = Gather <axis = 1> (x, order)
        e = Relu (a)
        w = Reshape (e, windows)
        y = ReduceSum <keepdims = 0> (w, one)
    }"""
    constants = {"windows": np.array([-1, 3, 4]), "one": np.array([1])}
    assert "Gather" not in commute(text, **constants, order=np.array([2, 0, 1, 4, 5, 3]))[0]
    assert commute(text, **constants, order=ORDER)[0]["Gather"] == 1


def test_the_batch_that_is_not_symbolic_is_not_reduced_over() -> None:
    """A permutation of all rows, across the samples, does not vanish in a sum over each sample's tokens."""
    text = """g (float[2, 3, 4] x) => (float[2, 4] y) {
        f = Reshape (x, flat)
        a = Gather <axis = 0> (f, order)
        e = Relu (a)
        w = Reshape (e, shape)
        y = ReduceSum <keepdims = 0> (w, one)
    }"""
    shapes = {"flat": np.array([6, 4]), "shape": np.array([2, 3, 4]), "one": np.array([1])}
    assert commute(text, **shapes, order=ORDER)[0]["Gather"] == 1
    assert "Gather" not in commute(text, **shapes, order=np.array([2, 0, 1, 4, 5, 3]))[0]


def test_a_value_that_is_an_output_too_keeps_its_order() -> None:
    text = BLOCK.replace("=> (", "=> (float[batch, 6, 4] s1, float[batch, 6, 4] r1, ")
    commute(text, **CONSTANTS)


def test_a_value_that_an_inner_graph_reads_keeps_its_order() -> None:
    text = """g (float[batch, 6, 4] x, bool flag) => (float[batch, 6, 4] y) {
        a = Gather <axis = 1> (x, order)
        e = Relu (a)
        i = If (flag) <
            then_branch = t () => (float[batch, 6, 4] p) { p = Neg (e) },
            else_branch = f () => (float[batch, 6, 4] q) { q = Gather <axis = 1> (e, inverse) }
        >
        y = Gather <axis = 1> (e, inverse)
    }"""
    text = text.replace(
        "y = Gather <axis = 1> (e, inverse)\n    }", "b = Gather <axis = 1> (e, inverse) y = Add (b, i)\n    }"
    )
    model = parse(text, order=ORDER, inverse=INVERSE)
    rewritten, _, _ = apply(CommutePermutations, model)
    for flag in (True, False):
        inputs = {"x": numbers(2, 6, 4), "flag": np.array(flag)}
        (one,), (other,) = (session(m).run(None, inputs) for m in (model, rewritten))
        assert np.array_equal(one, other)


SEARCH = settings(FIND, max_examples=250)


def reported(plain: onnx.ModelProto, *makes: Any) -> list[str]:
    """Return in what the graph after some passes differs from the one before."""
    model = load(plain)
    for make in makes:
        make(Analysis(model.graph))(model)
    return differences(plain, ir.to_proto(model), (1, 2, 3))


@pytest.fixture(params=[permutations.LAUNCH, 64], ids=["real launch", "quick launch"])
def _launch(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A launch this cheap, in bytes, makes small networks as bytes-bound as real models."""
    monkeypatch.setattr(permutations, "LAUNCH", request.param)
    monkeypatch.setattr(permutations, "VIEW", request.param // 32)


@pytest.mark.usefixtures("_launch")
@given(networks())
@examples(80)
def test_random_networks_compute_what_they_did(plain: onnx.ModelProto) -> None:
    assert reported(plain, CommutePermutations) == []
    assert reported(plain, ShapeRows) == []
    assert reported(plain, CommutePermutations, ShapeRows) == []


@given(networks())
@examples(40)
def test_the_whole_pipeline_computes_what_it_did_and_a_second_run_changes_nothing(plain: onnx.ModelProto) -> None:
    model = load(plain)
    rewrite(model)
    once = proto(model)
    assert differences(plain, once, (1, 2, 3)) == []
    again = load(once)
    rewrite(again)
    assert ops(again) == ops(once)


@given(networks())
@examples(40)
def test_the_plan_never_costs_more_than_the_graph_as_it_is(plain: onnx.ModelProto) -> None:
    model = load(plain)
    planner = Planner(token_view(model.graph, Analysis(model.graph)))
    assert planner.plan()[0] <= planner.cost_as_it_is()


MUTANTS = {
    "wrong inverse": patched(
        Permute,
        "pieces",
        lambda real: lambda self, source, result: real(self, None if source is None else np.argsort(source), result),
    ),
    "product the other way": patched(Layouts, "then", lambda real: lambda self, a, b: real(self, b, a)),
    "the source's order is forgotten": patched(
        Permute, "pieces", lambda real: lambda self, source, result: real(self, None, result)
    ),
    "the result's order is forgotten": patched(
        Permute,
        "pieces",
        lambda real: lambda self, source, result: real(self, source, np.arange(result.size)),
    ),
    "constants keep their order": patched(permutations, "permuted", lambda _: lambda constant, order: constant),
    "a reader is not rewired": patched(permutations, "let_read", lambda _: lambda node, position, value: None),
    "any order serves a reduction": patched(Planner, "serves", lambda _: lambda self, reduce, order: True),
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_random_networks_find_the_fault(mutant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    MUTANTS[mutant](monkeypatch)

    def is_reported(plain: onnx.ModelProto) -> bool:
        try:
            return reported(plain, CommutePermutations) != []
        except Exception:  # an index that no row has, a shape that does not fit
            return True

    steps = ("elementwise", "project", "position", "residual", "residual", *MOVES, "mix", "mix", "compare")
    find(networks(steps), is_reported, settings=SEARCH)  # raises where nothing is reported


@pytest.mark.parametrize("table", [(2, 3), (1, 2, 3), (2, 2, 3), (1, 1, 3)])
def test_a_table_of_some_of_the_axes_before_the_last(table: tuple[int, ...]) -> None:
    """Without a symbolic batch the first axis is one of rows, and a table may be repeated along it."""
    text = """g (float[2, 2, 3] x) => (float[2, 1, 3] y) {
        t = Transpose <perm: ints = [1, 0, 2]> (x) m = Mul (t, table) y, z = Split <axis: int = 1> (m, parts)
    }"""
    commute(text, table=numbers(*table), parts=np.array([1, 1]))
