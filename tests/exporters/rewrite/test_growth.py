"""The work of the passes grows with the nodes, and no faster. It is counted in calls, not in seconds."""

from __future__ import annotations

import cProfile
import gc
from typing import TYPE_CHECKING, Any

import pytest

from exporters.rewrite.names import name_nodes
from exporters.rewrite.pipeline import rewrite
from exporters.rewrite.unique import MODULE_KEY
from tests.benchmarks.growth import deep_swin

if TYPE_CHECKING:
    from collections.abc import Sequence

MANY = 2000
"""A function that is called less often does not matter yet."""

SLACK = 1.2
"""A call for each pair of nodes would give 1.67."""


def calls(nodes: int, *, scripted: bool) -> tuple[int, dict[str, int]]:
    """Rewrite a network; return its nodes, and how often each function was called, a generator's steps included."""
    model = deep_swin(nodes, scripted=scripted)
    count = model.graph.num_nodes()
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


def faster_than_the_nodes(sizes: Sequence[int], *, scripted: bool) -> dict[str, float]:
    """Return the functions whose calls grow faster than the nodes do, and how much faster.

    Args:
        sizes: three numbers of nodes; between the first two the calls should grow as between the last two.
        scripted: see `deep_swin`.
    """
    calls(sizes[0], scripted=scripted)  # whatever is made once
    (n, first), (m, second), (k, third) = (calls(size, scripted=scripted) for size in sizes)
    growth = {}
    for name, count in third.items():
        before = max((second.get(name, 0) - first.get(name, 0)) / (m - n), 1e-9)
        if count > MANY:
            growth[name] = (count - second.get(name, 0)) / (k - m) / before
    return {name: factor for name, factor in growth.items() if factor > SLACK}


@pytest.mark.parametrize("scripted", [False, True], ids=["torch.export", "TorchScript"])
def test_twice_the_nodes_are_twice_the_work(scripted: bool) -> None:
    assert not faster_than_the_nodes((600, 1200, 1800) if scripted else (300, 600, 900), scripted=scripted)


def test_a_look_at_all_nodes_for_each_node_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    from exporters.rewrite.broadcast import DropExpand

    def quadratic(_self: object, graph: Any, _facts: object) -> bool:
        return any(other is None for _ in graph for other in graph)

    monkeypatch.setattr(DropExpand, "transform", quadratic)
    assert any("_linked_list" in name for name in faster_than_the_nodes((200, 400, 600), scripted=False))
