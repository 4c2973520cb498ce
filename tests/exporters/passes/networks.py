"""Random networks on tokens, for properties: row-wise operators, permutations, and operators that mix tokens.

All numbers are small integers, so that every sum is exact in any order and two graphs can be compared bit by bit.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from hypothesis import strategies as st
from onnx import TensorProto, checker, helper, numpy_helper

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import onnx

CHANNELS = 4


class Network:
    """A graph under construction. ``pool`` maps a value to the tokens and windows of its shape.

    A value is ``[batch, tokens, C]``, or ``[batch*windows, tokens/windows, C]`` where windows is above 1.
    """

    def __init__(self, draw: Callable[[Any], Any], tokens: int) -> None:
        self.draw = draw
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []
        self.pool: dict[str, tuple[int, int]] = {"x": (tokens, 1)}
        self.made: list[tuple[str, list[str | int]]] = []

    def pick(self, options: Sequence[Any]) -> Any:
        return self.draw(st.sampled_from(list(options)))

    def constant(self, array: Any) -> str:
        name = f"c{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(np.asarray(array), name))
        return name

    def numbers(self, *shape: int) -> str:
        seed = self.draw(st.integers(0, 99))
        return self.constant(np.random.default_rng(seed).integers(-1, 2, shape).astype(np.float32))

    def op(self, op_type: str, inputs: Sequence[str], like: tuple[int, int], **attributes: Any) -> str:
        output = f"v{len(self.nodes)}"
        self.nodes.append(helper.make_node(op_type, list(inputs), [output], **attributes))
        self.pool[output] = like
        return output

    def plain(self, x: str) -> str:
        """Return the value as [batch, tokens, C]."""
        tokens, windows = self.pool[x]
        if windows == 1:
            return x
        return self.op("Reshape", [x, self.constant(np.array([-1, tokens, CHANNELS]))], (tokens, 1))

    # --- what a step may be ---

    def elementwise(self, x: str) -> None:
        self.op(self.pick(["Neg", "Relu", "Abs", "Sign"]), [x], self.pool[x])

    def project(self, x: str) -> None:
        self.op("MatMul", [x, self.numbers(CHANNELS, CHANNELS)], self.pool[x])

    def bias(self, x: str) -> None:
        self.op("Add", self.draw(st.permutations([x, self.numbers(CHANNELS)])), self.pool[x])

    def position(self, x: str) -> None:
        tokens, windows = self.pool[x]
        shape = self.pick([(1, tokens // windows, CHANNELS), (tokens // windows, 1), (tokens // windows, CHANNELS)])
        self.op("Add", [x, self.numbers(*shape)], self.pool[x])

    def residual(self, x: str) -> None:
        others = [y for y, like in self.pool.items() if like == self.pool[x]]
        self.op(self.pick(["Add", "Sub", "Max"]), [x, self.pick(others)], self.pool[x])

    def permute(self, x: str) -> None:
        x = self.plain(x)
        order = self.draw(st.permutations(range(self.pool[x][0])))
        self.op("Gather", [x, self.constant(np.array(order))], self.pool[x], axis=1)

    def undo(self, x: str) -> None:
        """Undo a permutation that was there before, as windows are undone."""
        gathers = [node.input[1] for node in self.nodes if node.op_type == "Gather"]
        known = {tensor.name: numpy_helper.to_array(tensor) for tensor in self.constants}
        x = self.plain(x)
        orders = [known[name] for name in gathers if known[name].size == self.pool[x][0]]
        if orders:
            self.op("Gather", [x, self.constant(np.argsort(self.pick(orders)))], self.pool[x], axis=1)

    def shuffle(self, x: str) -> None:
        """Swap the two axes of a grid of tokens."""
        x = self.plain(x)
        tokens, _ = self.pool[x]
        grid = self.op("Reshape", [x, self.constant(np.array([-1, 2, tokens // 2, CHANNELS]))], (0, 0))
        del self.pool[grid]
        turned = self.op("Transpose", [grid], (0, 0), perm=[0, 2, 1, 3])
        del self.pool[turned]
        self.op("Reshape", [turned, self.constant(np.array([-1, tokens, CHANNELS]))], (tokens, 1))

    def partition(self, x: str) -> None:
        x = self.plain(x)
        tokens, _ = self.pool[x]
        self.op("Reshape", [x, self.constant(np.array([-1, tokens // 2, CHANNELS]))], (tokens, 2))

    def pad(self, x: str) -> None:
        """A zero row in front, and the last row cut."""
        x = self.plain(x)
        tokens, _ = self.pool[x]
        padded = self.op("Pad", [x, self.constant(np.array([0, 1, 0, 0, 0, 0]))], (0, 0))
        del self.pool[padded]
        ends = [self.constant(np.array([i])) for i in (0, tokens, 1)]
        self.op("Slice", [padded, *ends], (tokens, 1))

    def merge(self, x: str) -> None:
        """Two tokens become one, as in patch merging."""
        x = self.plain(x)
        tokens, _ = self.pool[x]
        if tokens % 4:
            return
        pairs = self.op("Reshape", [x, self.constant(np.array([-1, tokens // 2, 2 * CHANNELS]))], (0, 0))
        del self.pool[pairs]
        self.op("MatMul", [pairs, self.numbers(2 * CHANNELS, CHANNELS)], (tokens // 2, 1))

    def mix(self, x: str) -> None:
        """Every token becomes a sum over the tokens of its window."""
        tokens, windows = self.pool[x]
        size = tokens // windows
        self.op("MatMul", [self.numbers(size, size), x], self.pool[x])

    def channels(self, x: str) -> None:
        """Every token minus its largest channel; the axis is counted from the front."""
        axis = self.constant(np.array([2]))
        largest = self.op("ReduceMax", [x, axis], (0, 0))
        del self.pool[largest]
        self.op("Sub", [x, largest], self.pool[x])

    def compare(self, x: str) -> None:
        """Every token minus the largest of its window: a reduction, and a broadcast."""
        largest = self.op("ReduceMax", [x, self.constant(np.array([1]))], (0, 0))
        del self.pool[largest]
        self.op("Sub", [x, largest], self.pool[x])

    def output(self, x: str) -> str:
        tokens, windows = self.pool[x]
        batch = "batch" if windows == 1 else f"{windows}*batch"
        shape: list[str | int] = [batch, tokens // windows, CHANNELS]
        if self.draw(st.booleans()):
            x = self.op(self.pick(["ReduceSum", "ReduceMax"]), [x, self.constant(np.array([1]))], (0, 0), keepdims=0)
            del self.pool[x]
            shape = [batch, CHANNELS]
        else:
            x = self.op("Identity", [x], self.pool[x])
        self.made.append((x, shape))
        return x


ROW_WISE = ("elementwise", "project", "bias", "position", "channels", "residual", "residual")
MOVES = ("permute", "undo", "undo", "shuffle", "partition", "pad", "merge")
MIXES = ("mix", "compare")


@st.composite
def networks(draw: Callable[[Any], Any], steps: tuple[str, ...] = (*ROW_WISE, *MOVES, *MIXES)) -> onnx.ModelProto:
    """Draw a network of up to 14 steps with one to three outputs."""
    tokens = draw(st.sampled_from([4, 8]))
    net = Network(draw, tokens)
    for _ in range(draw(st.integers(2, 14))):
        names = list(net.pool)
        getattr(net, draw(st.sampled_from(steps)))(draw(st.sampled_from(names[-3:])))
    for _ in range(draw(st.integers(1, 3))):
        net.output(draw(st.sampled_from(list(net.pool)[-4:])))
    made = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in net.made]
    source = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", tokens, CHANNELS])
    graph = helper.make_graph(net.nodes, "network", [source], made, net.constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    checker.check_model(model, full_check=True)
    return model
