"""How the time of the rewriting passes grows with the number of nodes.

    python -m tests.benchmarks.growth [--nodes 625,1250,...] [--rounds 2]

Two graphs, both of alternating plain and shifted Swin blocks, as deep as it takes: one as torch.export gives them, one
as TorchScript does, in which every shape is computed from the shapes before it. The least of the rounds is shown, and
at the end the exponent: fitted over all sizes, seconds grow with that power of the nodes.
"""

import argparse
import math
import time
from collections.abc import Callable

import numpy as np
import onnx
import onnx_ir as ir

from exporters.rewrite.names import name_nodes
from exporters.rewrite.pipeline import rewrite
from exporters.rewrite.unique import MODULE_KEY

SIDE, WINDOW, HEADS, WIDTH = 8, 4, 2, 32
TOKENS, WINDOWS, PER_WINDOW, HEAD_WIDTH = SIDE**2, (SIDE // WINDOW) ** 2, WINDOW**2, WIDTH // HEADS
SHIFT = WINDOW // 2
END = np.iinfo(np.int64).max


class Writer:
    """Writes a deep Swin; with ``scripted``, shapes are computed in the graph."""

    def __init__(self, *, scripted: bool) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[onnx.TensorProto] = []
        self._scripted = scripted
        self._rng = np.random.default_rng(0)
        self._count = 0

    def op(self, op_type: str, *inputs: str, **attributes: object) -> str:
        """Add a node with one output; return the output's name."""
        self._count += 1
        output = f"v{self._count}"
        self.nodes.append(onnx.helper.make_node(op_type, inputs, [output], name=f"n{self._count}", **attributes))
        return output

    def weight(self, *shape: int) -> str:
        """Add a parameter of the given shape."""
        return self._initializer(self._rng.normal(0, 0.1, shape).astype(np.float32))

    def ints(self, *values: int) -> str:
        """Add a list of integers: TorchScript writes a node for each, torch.export's translation an initializer."""
        array = np.array(values, np.int64)
        if not self._scripted:
            return self._initializer(array)
        return self.op("Constant", value=onnx.numpy_helper.from_array(array))

    def _initializer(self, array: np.ndarray) -> str:
        name = f"p{len(self.initializers)}"
        self.initializers.append(onnx.numpy_helper.from_array(array, name))
        return name

    def reshape(self, x: str, *dims: int) -> str:
        """Add a Reshape of ``x``; the batch, -1, stands first. TorchScript takes it and a width from Shape."""
        if not self._scripted:
            return self.op("Reshape", x, self.ints(*dims))
        shape = self.op("Shape", x)
        batch = self.op("Gather", shape, self.op("Constant", value_int=0), axis=0)
        per_batch = self.op("Div", batch, self.op("Constant", value_int=1))  # a Python //, as in B // nW
        casts = self.op("Cast", self.op("Cast", per_batch, to=onnx.TensorProto.INT64), to=onnx.TensorProto.INT64)
        sizes = [casts, *(self.op("Constant", value_int=dim) for dim in dims[1:])]
        parts = [self.op("Unsqueeze", size, self.ints(0)) for size in sizes]
        target = self.op("Concat", *parts, axis=0)
        tail = self.op("Slice", target, self.ints(1), self.ints(END), self.ints(0))
        return self.op("Reshape", x, self.op("Concat", self.ints(-1), tail, axis=0))

    def roll(self, x: str, by: int) -> str:
        """Roll [B, H, W, C] on H and W, as both exporters write torch.roll."""
        for axis in (1, 2):
            head = self.op("Slice", x, self.ints(-by), self.ints(END), self.ints(axis))
            tail = self.op("Slice", x, self.ints(0), self.ints(-by), self.ints(axis))
            x = self.op("Concat", head, tail, axis=axis)
        return x

    def linear(self, x: str, inner: int, outer: int) -> str:
        """Add x @ W + b."""
        return self.op("Add", self.op("MatMul", x, self.weight(inner, outer)), self.weight(outer))

    def norm(self, x: str) -> str:
        """Add a LayerNormalization."""
        return self.op("LayerNormalization", x, self.weight(WIDTH), self.weight(WIDTH), axis=-1)

    def block(self, x: str, *, shifted: bool) -> str:
        """Add a Swin block on [B, H*W, C]."""
        rows = SIDE // WINDOW
        y = self.reshape(self.norm(x), -1, SIDE, SIDE, WIDTH)
        y = self.roll(y, -SHIFT) if shifted else y
        y = self.op("Transpose", self.reshape(y, -1, rows, WINDOW, rows, WINDOW, WIDTH), perm=[0, 1, 3, 2, 4, 5])
        y = self.reshape(y, -1, PER_WINDOW, WIDTH)  # [B*nW, S, C]
        qkv = self.reshape(self.linear(y, WIDTH, 3 * WIDTH), -1, PER_WINDOW, 3, HEADS, HEAD_WIDTH)
        qkv = self.op("Transpose", qkv, perm=[2, 0, 3, 1, 4])
        q, k, v = (self.op("Gather", qkv, self._index(i), axis=0) for i in range(3))  # [B*nW, N, S, D]
        q = self.op("Mul", q, self._initializer(np.array(HEAD_WIDTH**-0.5, np.float32)))
        scores = self.op("MatMul", q, self.op("Transpose", k, perm=[0, 1, 3, 2]))
        scores = self.op("Add", scores, self._bias())
        if shifted:
            scores = self.reshape(scores, -1, WINDOWS, HEADS, PER_WINDOW, PER_WINDOW)
            scores = self.op("Add", scores, self._mask())
            scores = self.reshape(scores, -1, HEADS, PER_WINDOW, PER_WINDOW)
        mixed = self.op("MatMul", self.op("Softmax", scores, axis=-1), v)
        y = self.reshape(self.op("Transpose", mixed, perm=[0, 2, 1, 3]), -1, PER_WINDOW, WIDTH)
        y = self.reshape(self.linear(y, WIDTH, WIDTH), -1, rows, rows, WINDOW, WINDOW, WIDTH)
        y = self.reshape(self.op("Transpose", y, perm=[0, 1, 3, 2, 4, 5]), -1, SIDE, SIDE, WIDTH)
        y = self.roll(y, SHIFT) if shifted else y
        x = self.op("Add", x, self.reshape(y, -1, TOKENS, WIDTH))
        hidden = self.op("Gelu", self.linear(self.norm(x), WIDTH, 2 * WIDTH))
        return self.op("Add", x, self.linear(hidden, 2 * WIDTH, WIDTH))

    def _index(self, i: int) -> str:
        return self.op("Constant", value_int=i) if self._scripted else self._initializer(np.array(i, np.int64))

    def _bias(self) -> str:
        """Look the relative position bias up: [1, N, S, S]."""
        index = self._rng.integers(0, PER_WINDOW, PER_WINDOW**2)
        rows = self.op("Gather", self.weight(PER_WINDOW, HEADS), self._initializer(index), axis=0)
        table = self.op("Reshape", rows, self.ints(PER_WINDOW, PER_WINDOW, HEADS))
        return self.op("Unsqueeze", self.op("Transpose", table, perm=[2, 0, 1]), self.ints(0))

    def _mask(self) -> str:
        """Add the mask of shifted windows: [1, nW, 1, S, S]."""
        mask = np.where(self._rng.random((WINDOWS, PER_WINDOW, PER_WINDOW)) < 0.5, 0, -100).astype(np.float32)
        return self.op("Unsqueeze", self._initializer(mask), self.ints(0, 2))


def deep_swin(nodes: int, *, scripted: bool) -> ir.Model:
    """Return a Swin of about so many nodes.

    Args:
        nodes: the least number of nodes.
        scripted: as TorchScript writes it.
    """
    writer, x = Writer(scripted=scripted), "x"
    while len(writer.nodes) < nodes:
        x = writer.block(writer.block(x, shifted=False), shifted=True)
    writer.nodes.append(onnx.helper.make_node("ReduceMean", [x, writer.ints(1)], ["y"], keepdims=0))
    graph = onnx.helper.make_graph(
        writer.nodes,
        "deep_swin",
        [onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["batch", TOKENS, WIDTH])],
        [onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, ["batch", WIDTH])],
        writer.initializers,
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=10)
    return ir.from_proto(model)


def seconds_of_passes(model: ir.Model) -> dict[str, float]:
    """Rewrite the model; return pass -> seconds, in order, with what `name-nodes` takes."""
    start = time.perf_counter()
    steps = rewrite(model)
    seconds = {step.name: step.seconds for step in steps}
    seconds["counting costs"] = time.perf_counter() - start - sum(seconds.values())
    start = time.perf_counter()
    name_nodes(model, MODULE_KEY)
    return {**seconds, "name-nodes": time.perf_counter() - start}


def measure(make: Callable[[int], ir.Model], sizes: list[int], rounds: int) -> None:
    """Print the table of one kind of graph."""
    counts, columns = [], []
    for size in sizes:
        runs = []
        for _ in range(rounds):
            model = make(size)
            count = model.graph.num_nodes()
            runs.append(seconds_of_passes(model))
        counts.append(count)
        columns.append({name: min(run[name] for run in runs) for name in runs[0]})
    print("| pass, seconds | " + " | ".join(f"{count:,}" for count in counts) + " | exponent |")
    print("|---" * (len(counts) + 2) + "|")
    columns = [{**column, "all": sum(column.values())} for column in columns]
    for name in columns[0]:
        cells = [f"{column[name]:.3f}" for column in columns]
        print(f"| {name} | {' | '.join(cells)} | {_exponent(counts, [c[name] for c in columns])} |")


def _exponent(counts: list[int], seconds: list[float]) -> str:
    """Fit a line to the logarithms; what takes less than 5 ms says nothing."""
    points = [(math.log(n), math.log(t)) for n, t in zip(counts, seconds, strict=True) if t > 0.005]
    return f"{np.polyfit(*zip(*points, strict=True), deg=1)[0]:.2f}" if len(points) > 2 else ""


def main() -> None:
    """Measure and print Markdown."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--nodes", default="625,1250,2500,5000,10000,20000")
    parser.add_argument("--rounds", type=int, default=2)
    arguments = parser.parse_args()
    sizes = [int(size) for size in arguments.nodes.split(",")]
    for title, scripted in (("torch.export", False), ("TorchScript", True)):
        print(f"\nAs {title} writes it:\n")
        measure(lambda nodes, scripted=scripted: deep_swin(nodes, scripted=scripted), sizes, arguments.rounds)


if __name__ == "__main__":
    main()
