"""The judge is code too: a fault put into a pass must be reported by the comparison that the properties use."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import HealthCheck, Phase, find, settings

from deploycli.exporters.graph import builder, index_map, lowerings, movement_ops
from deploycli.exporters.passes import (
    fold_constants as constants,
)
from deploycli.exporters.passes import (
    fold_movement as movement,
)
from deploycli.exporters.passes import (
    sum_additive_constants as additive,
)
from deploycli.exporters.passes.pipeline import rewrite
from tests.exporters.graph.test_lowerings import wrong_lowerings
from tests.exporters.passes.graphs import differences, load, parse
from tests.exporters.passes.programs import programs
from tests.exporters.passes.test_sum_additive_constants import SHAPES, SHIFTED, constant

if TYPE_CHECKING:
    from collections.abc import Callable

    import onnx

    Patch = Callable[[pytest.MonkeyPatch], None]

SEARCH = settings(
    max_examples=200,
    phases=[Phase.generate],
    derandomize=True,
    database=None,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)


def is_reported(plain: onnx.ModelProto) -> bool:
    """Say whether the comparison reports what the passes made of a graph, or they end in an error."""
    model = load(plain)
    try:
        rewrite(model)
        return differences(plain, ir.to_proto(model)) != []
    except Exception:  # an operator that no runtime takes is a report, too
        return True


def patched(target: Any, name: str, make: Callable[[Any], Any]) -> Patch:
    def apply(monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(target, name, make(getattr(target, name)))

    return apply


def inverse_permutation(real: Any) -> Any:
    def move(self: Any, step: lowerings.MovementOp, *rest: Any) -> Any:
        inverse = tuple(int(i) for i in np.argsort(step.values)) if step.op_type == "Transpose" else step.values
        return real(self, replace(step, values=inverse), *rest)

    return move


def wrong_axis(real: Any) -> Any:
    def move(self: Any, step: lowerings.MovementOp, *rest: Any) -> Any:
        return real(self, replace(step, axis=max(0, step.axis - 1)), *rest)

    return move


def nothing_is_padded(real: Any) -> Any:
    def rows(self: Any, *division: int) -> Any:
        found = real(self, *division)
        return None if found is None else np.maximum(found, 0)

    return rows


def lost_use(real: Any) -> Any:
    """One reader goes on reading what the move was made of."""

    def source(old: ir.Value, new: ir.Value) -> ir.Value:
        producer = new.producer()
        found = producer.inputs[0] if producer is not None else None
        return found if found is not None and not old.is_graph_output() else new

    return lambda values: real({old: source(old, new) for old, new in values.items()})


def turned(self: index_map.IndexMap, axis: int, place: int) -> index_map.IndexMap:
    """Let a digit and the next one change places."""
    digits = list(self.axes[axis])
    digits[place : place + 2] = digits[place : place + 2][::-1]
    return replace(self, axes=(*self.axes[:axis], tuple(digits), *self.axes[axis + 1 :]))


MUTANTS = {
    "wrong axis": patched(builder.Builder, "move", wrong_axis),
    "index off by one": patched(builder, "as_indices", lambda real: lambda step: np.maximum(real(step) - 1, 0)),
    "slice off by one": patched(
        builder, "slice_bounds", lambda real: lambda step: (max(real(step)[0] - 1, 0), real(step)[1])
    ),
    "digits reversed": patched(
        index_map.IndexMap, "strides", lambda real: property(lambda self: (r := real.func(self)) and r[::-1])
    ),
    "offset dropped": patched(
        lowerings, "_strided_lowering", lambda real: lambda offset, *rest: real(0, *rest)
    ),
    "padding dropped": patched(index_map.IndexMap, "rows", nothing_is_padded),
    "lost use": patched(movement, "replace_all", lost_use),
    "a table's base dropped": patched(index_map, "_apart", lambda real: lambda table: (0, *real(table)[1:])),
    "neighbours joined backwards": patched(
        index_map.IndexMap, "_join", lambda real: lambda self, axis, place: real(turned(self, axis, place), axis, place)
    ),
    "roll the other way": patched(
        movement_ops, "MOVEMENT",
        lambda real: {**real, "Concat": lambda node, inputs, zero: real["Concat"](node, inputs[::-1], zero)},
    ),
}  # fmt: skip


@pytest.mark.parametrize("mutant", MUTANTS)
def test_random_programs_find_the_fault(mutant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    MUTANTS[mutant](monkeypatch)
    find(programs(), is_reported, settings=SEARCH)  # raises where nothing is reported


PLANS = {
    "transpose backwards": patched(
        index_map.IndexMap, "strides", lambda real: property(lambda self: (r := real.func(self)) and r[::-1])
    ),
    "gather the next row": patched(
        index_map.IndexMap, "rows", lambda real: lambda *a: None if (r := real(*a)) is None else np.roll(r, 1)
    ),
}


@pytest.mark.parametrize("mutant", PLANS)
def test_running_the_plans_finds_the_fault(mutant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    PLANS[mutant](monkeypatch)

    def is_wrong(plain: onnx.ModelProto) -> bool:
        try:
            return bool(wrong_lowerings(plain))
        except (AssertionError, ValueError, IndexError):  # a move that does not make the shape it declares
            return True

    find(programs(pure=True, chain=True), is_wrong, settings=SEARCH)


def test_an_inverse_permutation_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    text = """g (float[batch, 6, 6, 6] x) => (float[batch, 6, 6, 6] y) {
        t = Transpose <perm: ints = [0, 2, 1, 3]> (x) y = Transpose <perm: ints = [0, 1, 3, 2]> (t)
    }"""
    plain = parse(text)
    assert not is_reported(plain)
    monkeypatch.setattr(builder.Builder, "move", inverse_permutation(builder.Builder.move))
    assert is_reported(plain)


def test_a_dropped_mask_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = parse(SHIFTED, bias=constant(1, 3, 2, 2), mask=constant(1, 4, 1, 2, 2), **SHAPES)
    assert not is_reported(plain)
    real = additive._moved_sum
    monkeypatch.setattr(additive, "_moved_sum", lambda *a: real(*a[:3], np.zeros_like(a[3]), *a[4:]))
    assert is_reported(plain)


def test_a_transposed_constant_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    text = "g (float[batch, 4, 4] x) => (float[batch, 4, 4] y) { n = Neg (c) y = Add (x, n) }"
    plain = parse(text, c=constant(4, 4))
    assert not is_reported(plain)
    real = constants.initializer
    monkeypatch.setattr(constants, "initializer", lambda name, tensor: real(name, ir.Tensor(tensor.numpy().T)))
    assert is_reported(plain)
