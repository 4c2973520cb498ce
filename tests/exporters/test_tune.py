"""Forms of a graph are really compiled, and the cheapest is kept."""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING

import onnx_ir as ir
import pytest

from deploycli.exporters import tune as module
from deploycli.exporters.passes.any_model import optimized
from deploycli.exporters.tune import FORMS, Form, Tried, TuneOptions, tune
from deploycli.models.errors import BuildError, UsageError
from tests.exporters.lint.rtx import WHY
from tests.exporters.tensorrt.test_rtx import TOKENS, WIDTH, block

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

needs_compiler = pytest.mark.skipif(importlib.util.find_spec("tensorrt_rtx") is None, reason=WHY)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "user_cache_path", lambda name: tmp_path / name)


def graph() -> ir.Model:
    from onnx import TensorProto

    return ir.from_proto(block(dtype=TensorProto.FLOAT))


def rewritten(model: ir.Model, form: Form) -> ir.Model:
    without, also = form.passes
    return optimized(model, without=without, also=also)[0]


@needs_compiler
def test_the_cheapest_form_is_kept_and_found_again(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    found = tune(graph(), TuneOptions(), rewritten, progress=said.append)
    assert [one.form for one in found.tried] == [form.name for form in FORMS]
    assert found.left == ()
    best = next(one for one in found.tried if one.form == found.best)
    assert best.launches
    assert all(best.cost(8) <= one.cost(8) for one in found.tried)
    assert best.attention == 1
    assert len(said) == len(FORMS)

    def compiled(*_: object) -> Tried:
        raise AssertionError("it is known")

    monkeypatch.setattr(module, "_compiled", compiled)
    assert tune(graph(), TuneOptions(), rewritten) == found


@needs_compiler
@pytest.mark.parametrize("damage", [lambda text: text[:40], lambda text: text.replace('"best": "', '"best": "un')])
def test_what_was_kept_and_is_damaged_is_searched_again(damage: Callable[[str], str], tmp_path: Path) -> None:
    found = tune(graph(), TuneOptions(), rewritten)
    (kept,) = tmp_path.rglob("*.json")
    whole = kept.read_text("utf-8")
    kept.write_text(damage(whole), "utf-8")
    assert tune(graph(), TuneOptions(), rewritten) == found
    assert kept.read_text("utf-8") == whole


@needs_compiler
def test_what_there_is_no_time_for_is_named_and_not_kept_for_later(tmp_path: Path) -> None:
    found = tune(graph(), TuneOptions(seconds=0), rewritten)
    assert (found.best, found.left) == (FORMS[0].name, tuple(form.name for form in FORMS[1:]))
    assert not list(tmp_path.rglob("*.json"))
    assert f"kept 'default' of 1 forms: {found.tried[0].launches} launches" in found.summary


@needs_compiler
def test_a_graph_that_no_form_of_compiles() -> None:
    def spoilt(model: ir.Model, form: Form) -> ir.Model:
        made = rewritten(model, form)
        for node in made.graph:
            if node.op_type == "Softmax":
                node.op_type = "NotThere"
        return made

    with pytest.raises(BuildError, match="no form of the graph could be compiled"):
        tune(graph(), TuneOptions(), spoilt)


@needs_compiler
def test_an_axis_that_is_no_batch_is_refused() -> None:
    model = graph()
    model.graph.inputs[0].shape = ir.Shape(["batch", "tokens", WIDTH])
    with pytest.raises(UsageError, match="input x has an axis that is no batch"):
        tune(model, TuneOptions(), rewritten)
    assert TOKENS


def test_a_launch_counts_as_the_bytes_that_it_costs() -> None:
    few, many = Tried("a", 10, 1_000_000), Tried("b", 11, 999_999)
    assert few.cost(1) < many.cost(1)
    assert Tried("c", remark="refused").cost(8) == float("inf")
