"""How the time of the rewriting passes grows: with the number of nodes, and not with the number of pixels.

    python -m tests.benchmarks.growth [--nodes 625,1250,...] [--rounds 2]

Two graphs, both of alternating plain and shifted Swin blocks, as deep as it takes: one as torch.export gives them, one
as TorchScript does, in which every shape is computed from the shapes before it. The least of the rounds is shown, and
at the end the exponent: fitted over all sizes, seconds grow with that power of the nodes.

Then graphs that are wide: some ten thousand Gathers of one value for one Concat, as many products of one weight, and of
one value. And one pair of blocks on images of growing size, up to [N, 720, 1280, 180], each in a process of its own,
whose peak memory is that of Python, ONNX and NumPy where the image is small.
"""

import argparse
import math
import resource
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context

import numpy as np
import onnx
import onnx_ir as ir

from deploycli.exporters.graph.unique import MODULE_KEY
from deploycli.exporters.passes.common.names import name_nodes
from deploycli.exporters.passes.pipeline import rewrite

END = np.iinfo(np.int64).max


@dataclass(frozen=True)
class Size:
    """How large the activations of a Swin block are."""

    height: int = 8
    width: int = 8
    window: int = 4
    heads: int = 2
    channels: int = 32
    masked: bool = True

    @property
    def windows(self) -> int:
        """Windows of an image."""
        return self.height * self.width // self.window**2

    @property
    def tokens(self) -> int:
        """Tokens of a window."""
        return self.window**2


class Writer:
    """Writes a deep Swin; with ``scripted``, shapes are computed in the graph."""

    def __init__(self, *, scripted: bool, size: Size) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[onnx.TensorProto] = []
        self.size = size
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
        channels = self.size.channels
        return self.op("LayerNormalization", x, self.weight(channels), self.weight(channels), axis=-1)

    def block(self, x: str, *, shifted: bool) -> str:
        """Add a Swin block on [B, H*W, C]."""
        z = self.size
        rows, columns, per_head = z.height // z.window, z.width // z.window, z.channels // z.heads
        shift = z.window // 2
        y = self.reshape(self.norm(x), -1, z.height, z.width, z.channels)
        y = self.roll(y, -shift) if shifted else y
        y = self.reshape(y, -1, rows, z.window, columns, z.window, z.channels)
        y = self.op("Transpose", y, perm=[0, 1, 3, 2, 4, 5])
        y = self.reshape(y, -1, z.tokens, z.channels)  # [B*nW, S, C]
        qkv = self.reshape(self.linear(y, z.channels, 3 * z.channels), -1, z.tokens, 3, z.heads, per_head)
        qkv = self.op("Transpose", qkv, perm=[2, 0, 3, 1, 4])
        q, k, v = (self.op("Gather", qkv, self._index(i), axis=0) for i in range(3))  # [B*nW, N, S, D]
        q = self.op("Mul", q, self._initializer(np.array(per_head**-0.5, np.float32)))
        scores = self.op("MatMul", q, self.op("Transpose", k, perm=[0, 1, 3, 2]))
        scores = self.op("Add", scores, self._bias())
        if shifted and z.masked:
            scores = self.reshape(scores, -1, z.windows, z.heads, z.tokens, z.tokens)
            scores = self.op("Add", scores, self._mask())
            scores = self.reshape(scores, -1, z.heads, z.tokens, z.tokens)
        mixed = self.op("MatMul", self.op("Softmax", scores, axis=-1), v)
        y = self.reshape(self.op("Transpose", mixed, perm=[0, 2, 1, 3]), -1, z.tokens, z.channels)
        y = self.reshape(self.linear(y, z.channels, z.channels), -1, rows, columns, z.window, z.window, z.channels)
        y = self.reshape(self.op("Transpose", y, perm=[0, 1, 3, 2, 4, 5]), -1, z.height, z.width, z.channels)
        y = self.roll(y, shift) if shifted else y
        x = self.op("Add", x, self.reshape(y, -1, z.height * z.width, z.channels))
        hidden = self.op("Gelu", self.linear(self.norm(x), z.channels, 2 * z.channels))
        return self.op("Add", x, self.linear(hidden, 2 * z.channels, z.channels))

    def _index(self, i: int) -> str:
        return self.op("Constant", value_int=i) if self._scripted else self._initializer(np.array(i, np.int64))

    def _bias(self) -> str:
        """Look the relative position bias up: [1, N, S, S]."""
        tokens, heads = self.size.tokens, self.size.heads
        index = self._rng.integers(0, tokens, tokens**2)
        rows = self.op("Gather", self.weight(tokens, heads), self._initializer(index), axis=0)
        table = self.op("Reshape", rows, self.ints(tokens, tokens, heads))
        return self.op("Unsqueeze", self.op("Transpose", table, perm=[2, 0, 1]), self.ints(0))

    def _mask(self) -> str:
        """Add the mask of shifted windows: [1, nW, 1, S, S]."""
        z = self.size
        mask = np.where(self._rng.random((z.windows, z.tokens, z.tokens)) < 0.5, 0, -100).astype(np.float32)
        return self.op("Unsqueeze", self._initializer(mask), self.ints(0, 2))


def deep_swin(nodes: int, *, scripted: bool, size: Size = Size()) -> ir.Model:
    """Return a Swin of about so many nodes.

    Args:
        nodes: the least number of nodes.
        scripted: as TorchScript writes it.
        size: of its blocks.
    """
    writer, x = Writer(scripted=scripted, size=size), "x"
    while len(writer.nodes) < nodes:
        x = writer.block(writer.block(x, shifted=False), shifted=True)
    writer.nodes.append(onnx.helper.make_node("ReduceMean", [x, writer.ints(1)], ["y"], keepdims=0))
    return _model(writer, ["batch", size.height * size.width, size.channels], ["batch", size.channels])


def gathers(count: int) -> ir.Model:
    """Return a graph of so many Gathers of one value, and one Concat."""
    writer = Writer(scripted=False, size=Size())
    parts = [writer.op("Gather", "x", writer.ints(7 * i % 64), axis=1) for i in range(count)]
    writer.nodes.append(onnx.helper.make_node("Concat", parts, ["y"], axis=1))
    return _model(writer, ["batch", 64, 4], ["batch", count, 4])


def products(count: int) -> ir.Model:
    """Return a graph of so many products of one weight, each with another value."""
    writer, x = Writer(scripted=False, size=Size()), "x"
    weight, parts = writer.weight(4, 4), list[str]()
    for _ in range(count):
        x = writer.op("Neg", x)
        parts.append(writer.op("MatMul", x, weight))
    writer.nodes.append(onnx.helper.make_node("Sum", parts, ["y"]))
    return _model(writer, ["batch", 64, 4], ["batch", 64, 4])


def projections(count: int) -> ir.Model:
    """Return a graph of so many products of one value, each with a weight of its own."""
    writer = Writer(scripted=False, size=Size())
    parts = [writer.op("MatMul", "x", writer.weight(4, 4)) for _ in range(count)]
    writer.nodes.append(onnx.helper.make_node("Sum", parts, ["y"]))
    return _model(writer, ["batch", 64, 4], ["batch", 64, 4])


def _model(writer: Writer, source: list[int | str], result: list[int | str]) -> ir.Model:
    graph = onnx.helper.make_graph(
        writer.nodes,
        "growth",
        [onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, source)],
        [onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, result)],
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


def measure_pixels(sizes: list[Size]) -> None:
    """Print the table of one pair of blocks on images of several sizes."""
    print("| tokens, channels | elements of an activation | nodes before, after | seconds | peak memory, MB |")
    print("|---" * 5 + "|")
    for size in sizes:
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            before, after, seconds, peak = pool.submit(_pair, size).result()
        elements = size.height * size.width * size.channels
        print(
            f"| {size.height} x {size.width} x {size.channels} | {elements:,} | {before}, {after} "
            f"| {seconds:.2f} | {peak / 1024:.0f} |"
        )


def _pair(size: Size) -> tuple[int, int, float, int]:
    """Rewrite a pair of blocks; return its nodes before and after, the seconds, and the process's peak in KiB."""
    model = deep_swin(1, scripted=False, size=size)
    before = model.graph.num_nodes()
    seconds = sum(seconds_of_passes(model).values())
    return before, model.graph.num_nodes(), seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


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
    for title, make in (
        ("Gathers of one value", gathers), ("products of one weight", products), ("products of one value", projections),
    ):  # fmt: skip
        print(f"\n{title}:\n")
        measure(make, sizes, 1)
    print("\nOne pair of blocks:\n")
    measure_pixels(
        [Size(8 * 2**i, 8 * 2**i, 8, 6, 180, masked=False) for i in range(4)]
        + [Size(360, 640, 8, 6, 180, masked=False), Size(720, 1280, 8, 6, 180, masked=False)]
    )


if __name__ == "__main__":
    main()
