"""The work of the passes grows with the nodes, and no faster. It is counted in calls, not in seconds."""

from __future__ import annotations

import cProfile
import gc
import tracemalloc
from functools import partial
from typing import TYPE_CHECKING, Any, TypeAlias

import pytest

from deploycli.exporters.graph import shapes
from deploycli.exporters.graph.unique import MODULE_KEY
from deploycli.exporters.passes.common.names import name_nodes
from deploycli.exporters.passes.pipeline import rewrite
from tests.benchmarks.growth import Size, deep_swin, gathers, products, projections

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import onnx_ir as ir

MANY = 2000
"""A function that is called less often does not matter yet."""

SLACK = 1.2
"""A call for each pair of nodes would give 1.67."""


Make: TypeAlias = "Callable[[int], ir.Model]"


def calls(model: ir.Model) -> tuple[int, dict[str, int]]:
    """Rewrite a network; return its nodes, and how often each function was called, a generator's steps included."""
    count = model.graph.num_nodes()
    shapes._KNOWN.clear()  # what other tests have left there, and when it is full
    profile = cProfile.Profile()
    profile.enable()
    rewrite(model)
    name_nodes(model, MODULE_KEY)
    profile.disable()
    gc.collect()
    entries: Any = profile.getstats()
    counts: dict[str, int] = {}
    for entry in entries:
        name = entry.code if isinstance(entry.code, str) else f"{entry.code.co_filename}:{entry.code.co_name}"
        counts[name] = counts.get(name, 0) + entry.callcount
    return count, counts


def faster_than_the_nodes(sizes: Sequence[int], make: Make) -> dict[str, float]:
    """Return the functions whose calls grow faster than the nodes do, and how much faster.

    Args:
        sizes: three numbers of nodes; between the first two the calls should grow as between the last two.
        make: makes a network of about so many nodes.
    """
    calls(make(sizes[0] // 3))  # whatever is made once
    (n, first), (m, second), (k, third) = (calls(make(size)) for size in sizes)
    growth = {}
    for name, count in third.items():
        before = max((second.get(name, 0) - first.get(name, 0)) / (m - n), 1e-9)
        if count > MANY:
            growth[name] = (count - second.get(name, 0)) / (k - m) / before
    return {name: factor for name, factor in growth.items() if factor > SLACK}


@pytest.mark.parametrize("scripted", [False, True], ids=["torch.export", "TorchScript"])
def test_twice_the_nodes_are_twice_the_work(scripted: bool) -> None:
    sizes = (400, 800, 1200) if scripted else (150, 300, 450)
    assert not faster_than_the_nodes(sizes, partial(deep_swin, scripted=scripted))


@pytest.mark.parametrize("make", [gathers, products, projections])
def test_wide_graphs_are_no_more_work_than_deep_ones(make: Make) -> None:
    assert not faster_than_the_nodes((150, 300, 450), make)


def test_the_work_does_not_grow_with_the_pixels() -> None:
    """Both are large enough for no row of theirs to be gathered: the graphs are the same."""
    counts = [
        calls(deep_swin(1, scripted=False, size=Size(height, width, 8, 6, 180, masked=False)))[1]
        for height, width in ((64, 64), (64, 64), (360, 640), (720, 1280))
    ]
    assert sum(counts[-1].values()) < SLACK * sum(counts[-2].values())


def test_no_activation_is_spelled_out() -> None:
    model = deep_swin(1, scripted=False, size=Size(720, 1280, 8, 6, 180, masked=False))
    tracemalloc.start()
    try:
        rewrite(model)
        assert tracemalloc.get_traced_memory()[1] < 64 * 2**20  # an activation of one sample has 158 million elements
    finally:
        tracemalloc.stop()


def test_a_look_at_all_nodes_for_each_node_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    from deploycli.exporters.passes.drop_expand import DropExpand

    def quadratic(_self: object, graph: Any, _facts: object) -> bool:
        return any(other is None for _ in graph for other in graph)

    monkeypatch.setattr(DropExpand, "transform", quadratic)
    assert any(
        "_linked_list" in name for name in faster_than_the_nodes((150, 300, 450), partial(deep_swin, scripted=False))
    )
