"""Random networks with random selections: the rewritten one gives the same, and each fault put into the pass shows."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, find, given, settings

from deploycli.exporters.graph import row_relations
from deploycli.exporters.graph.analysis import Analysis
from deploycli.exporters.graph.cost import graph_cost
from deploycli.exporters.passes import hoist_selections as selections
from deploycli.exporters.passes.hoist_selections import HoistSelections
from deploycli.exporters.passes.pipeline import rewrite
from tests.exporters.passes.graphs import apply, load, proto
from tests.exporters.passes.row_programs import deviation, networks, rounding
from tests.exporters.passes.test_mutants import patched

if TYPE_CHECKING:
    from collections.abc import Iterator

    import onnx

    from tests.exporters.passes.test_mutants import Patch

SLOW = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])


@pytest.fixture(autouse=True)
def _products_are_dear() -> Iterator[None]:
    """So that it pays to save every one of these small networks."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(selections, "PRODUCTS_PER_BYTE", 1e-9)
        yield


def multiply_adds(model: onnx.ModelProto) -> int:
    graph = load(model).graph
    count = graph_cost(graph, Analysis(graph)).multiply_adds
    assert count is not None
    return count


def faults(plain: onnx.ModelProto) -> list[str]:
    """Say what is wrong with what the pass makes of a network."""
    rewritten, _, modified = apply(HoistSelections, plain)
    found = [] if deviation(plain, rewritten) < rounding(plain) else ["the results differ"]
    if (multiply_adds(rewritten) < multiply_adds(plain)) != modified:
        found.append("it changed the graph and saved nothing")
    again, _, changed = apply(HoistSelections, rewritten)
    if changed or again.graph.node != rewritten.graph.node:
        found.append("a second run changes it again")
    return found


@settings(SLOW, max_examples=120)
@given(networks())
def test_the_results_stay_and_products_become_fewer(plain: onnx.ModelProto) -> None:
    assert faults(plain) == []


@settings(SLOW, max_examples=40)
@given(networks())
def test_the_whole_pipeline_keeps_the_results_and_leaves_no_selection_to_move(plain: onnx.ModelProto) -> None:
    model = load(plain)
    was_taken_back = any(step.remark for step in rewrite(model))
    assert deviation(plain, proto(model)) < rounding(plain)
    if was_taken_back:  # of another form of the graph other kernels are predicted
        return
    steps = rewrite(model)
    place = [step.name for step in steps].index("hoist-selections")
    assert steps[place].nodes == steps[place - 1].nodes


def is_reported(plain: onnx.ModelProto) -> bool:
    """Say whether a fault shows, or the pass ends in an error."""
    try:
        return faults(plain) != []
    except Exception:  # an operator that no runtime takes is a report, too
        return True


def neighbouring_axis(real: Any) -> Any:
    """Rows of axis 1 are taken on axis 2."""

    def reads(self: Any, part: Any) -> Any:
        return tuple(None if b is None else (*b[:-2], b[-1], b[-2]) if len(b) == 3 else b for b in real(self, part))

    return reads


def through_everything(real: Any) -> Any:
    """A normalisation over tokens is taken for one that tells them apart."""

    def widen(self: Any, part: Any) -> Any:
        return part if any(r is not None for r in part) else real(self, part)

    return widen


def first_use_only(_real: Any) -> Any:
    """What others read as well is dropped."""
    return lambda dims, wanted: tuple(list(wanted)[:1])


def not_renumbered(_real: Any) -> Any:
    def takes(take: Any, part: Any, _have: Any) -> Any:
        return [(axis, r) for axis, r in reversed(list(enumerate(take.taken(part)))) if r is not None]

    return takes


def next_rows(real: Any) -> Any:
    return lambda self, value, axis, positions, anchor: real(
        self, value, axis, (np.asarray(positions) + 1) % max(2, np.max(positions)), anchor
    )


def one_row_less(real: Any) -> Any:
    def union(a: Any, b: Any) -> Any:
        both = real(a, b)
        return replace(both, kept=both.kept[:-1]) if both is not None and len(both.kept) > 1 else both

    return union


MUTANTS: dict[str, Patch] = {
    "wrong axis": patched(row_relations.Links, "operands", neighbouring_axis),
    "selected through a reduction": patched(row_relations.Links, "widen", through_everything),
    "dropped use": patched(selections, "merge", first_use_only),
    "index not renumbered": patched(selections, "takes", not_renumbered),
    "rows off by one": patched(selections._Writer, "_take", next_rows),
    "union too small": patched(row_relations, "_union", one_row_less),
    "constants left whole": patched(
        selections._Writer, "_cut", lambda _: lambda self, c, part, name: self._builder.constant(c)
    ),
    "constants cut elsewhere": patched(
        selections._Writer, "_cut", lambda real: lambda self, c, part, name: real(self, np.flip(c), part, name)
    ),
    "result of the graph forgotten": patched(
        selections.BackwardSlicing, "_is_read_whole", lambda _: lambda self, value: False
    ),
}  # fmt: skip


@pytest.mark.parametrize("mutant", MUTANTS)
def test_random_networks_find_the_fault(mutant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    MUTANTS[mutant](monkeypatch)
    search = settings(SLOW, max_examples=400, phases=[Phase.generate], derandomize=True, database=None)
    find(networks(), is_reported, settings=search)  # raises where nothing is reported
