"""What nodes and values are called, in a graph and in a message."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

    import onnx_ir as ir


MODULE_KEY = "module"
"""Metadata key of the PyTorch module path that a node comes from."""

PARAMETER = "parameter"
"""Key in a value's ``meta`` that says: its name is the owner's, keep it."""


def label(node: ir.Node) -> str:
    """Return what to call a node in a message: its PyTorch module and operator, or else its name in the file."""
    path = node.metadata_props.get(MODULE_KEY)
    return f"{path}/{node.op_type}" if path else node.name or node.op_type


class Names:
    """Hands out names; a name in use gets a number."""

    def __init__(self, taken: Iterable[str]) -> None:
        self._seen = Counter(taken)

    def unique(self, wish: str) -> str:
        """Return the name, or the first free one of ``name_1``, ``name_2``, ..."""
        name = wish
        while self._seen[name]:
            name = f"{wish}_{self._seen[wish]}"
            self._seen[wish] += 1
        self._seen[name] += 1
        return name


def value_names(graph: ir.Graph) -> set[str]:
    """Return the names of all values of a graph and of the graphs inside it: an inner one must not hide an outer."""
    names = set[str]()
    for g in (graph, *graph.subgraphs()):
        values = [*g.inputs, *g.initializers.values(), *(output for node in g for output in node.outputs)]
        names.update(value.name for value in values if value.name)
    return names


def listed(names: Iterable[str], most: int = 3) -> str:
    """Return names for a message: the first few, and how many more there are."""
    found = list(names)
    more = f" and {len(found) - most} more" if len(found) > most else ""
    return ", ".join(found[:most]) + more
