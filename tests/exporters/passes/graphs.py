"""Small graphs as ONNX text, run in ONNX Runtime with every optimisation off."""

from __future__ import annotations

import copy
from collections import Counter
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
from onnx import helper, numpy_helper
from onnx_ir.passes import common

from deploycli.exporters.graph.analysis import Analysis

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy.typing as npt

Array = Any  # arrays of any type, in tests

END = 2**63 - 1
"""The end of a slice that goes on to the end, as exporters write it."""


def parse(text: str, **constants: npt.ArrayLike) -> onnx.ModelProto:
    """Parse a graph given as text without its header; constants are added as initializers."""
    model = onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["" : 20]>\n{text}')
    for name, value in constants.items():
        model.graph.initializer.append(numpy_helper.from_array(np.asarray(value), name))
    onnx.checker.check_model(model, full_check=True)
    return model


def session(model: onnx.ModelProto) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    options.log_severity_level = 4  # errors are raised as well
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def feeds(model: onnx.ModelProto, batch: int) -> dict[str, Array]:
    """Inputs whose elements all differ, so that no two can be confused. Unknown axes are the batch."""
    constants = {tensor.name for tensor in model.graph.initializer}
    made = {}
    for value in model.graph.input:
        if value.name in constants:
            continue
        tensor = value.type.tensor_type
        shape = [d.dim_value if d.HasField("dim_value") else batch for d in tensor.shape.dim]
        dtype = helper.tensor_dtype_to_np_dtype(tensor.elem_type)
        numbers = np.arange(1, 1 + np.prod(shape, dtype=int)) - 3 * len(made)
        made[value.name] = numbers.astype(dtype).reshape(shape)
    return made


def differences(
    plain: onnx.ModelProto, rewritten: onnx.ModelProto, batches: Sequence[int] = (1, 2, 3, 5), *, rtol: float = 0.0
) -> list[str]:
    """Say in what two graphs differ: outputs by name, declared type and shape, then bit by bit or within rtol."""
    found = [f"output {a.name} declared otherwise" for a in plain.graph.output if a not in list(rewritten.graph.output)]
    found += [f"input {a.name} declared otherwise" for a in plain.graph.input if a not in list(rewritten.graph.input)]
    if found:
        return found
    one, other = session(plain), session(rewritten)
    names = [value.name for value in plain.graph.output]
    for batch in batches:
        inputs = feeds(plain, batch)
        for name, x, y in zip(names, one.run(names, inputs), other.run(names, inputs), strict=True):
            if x.dtype != y.dtype or x.shape != y.shape:
                found.append(f"{name} at batch {batch}: {x.dtype}{x.shape} became {y.dtype}{y.shape}")
            elif rtol and not np.allclose(x, y, rtol=rtol, atol=0):
                found.append(f"{name} at batch {batch}: values differ by more than rounding")
            elif not rtol and x.tobytes() != y.tobytes():
                found.append(f"{name} at batch {batch}: values differ")
    return found


def load(model: onnx.ModelProto) -> ir.Model:
    """Read a model, with its constants as initializers, as every pass expects it."""
    loaded = ir.from_proto(copy.deepcopy(model))  # the tensors stay those of the message
    common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(loaded)
    return loaded


def proto(model: ir.Model) -> onnx.ModelProto:
    """Serialise a rewritten model, which must be a valid one."""
    result = ir.to_proto(model)
    onnx.checker.check_model(result, full_check=True)
    return result


def ops(model: ir.Model | onnx.ModelProto) -> dict[str, int]:
    graph = model.graph
    nodes = graph.node if isinstance(model, onnx.ModelProto) else graph
    return dict(Counter(node.op_type for node in nodes))


def apply(make: Any, plain: onnx.ModelProto) -> tuple[onnx.ModelProto, Any, bool]:
    """Run one pass; return the graph without what nothing reads, the pass, and whether it says it changed something."""
    model = load(plain)
    graph_pass = make(Analysis(model.graph))
    modified = graph_pass(model).modified
    common.RemoveUnusedNodesPass()(model)
    return proto(model), graph_pass, modified


def reasons(graph_pass: Any) -> list[str]:
    return [remark.reason for remark in graph_pass.remarks]


def transform(
    make: Any, text: str, batches: Sequence[int] = (1, 2, 3, 5), **constants: npt.ArrayLike
) -> tuple[dict[str, int], list[str], bool]:
    """Run one pass on a graph given as text, and prove that the graph computes what it did, bit by bit.

    Returns:
        The operators that are left, the reasons of the refusals, and whether the pass says that it changed something.
    """
    plain = parse(text, **constants)
    rewritten, graph_pass, modified = apply(make, plain)
    assert differences(plain, rewritten, batches) == []
    return ops(rewritten), reasons(graph_pass), modified


def slices(x: str, out: str, axis: int, cut: int) -> str:
    """torch.roll by -cut, as text: two Slices and a Concat."""
    return f"""
        {out}_a = Constant <value_ints: ints = [{cut}]> ()
        {out}_e = Constant <value_ints: ints = [{END}]> ()
        {out}_z = Constant <value_ints: ints = [0]> ()
        {out}_x = Constant <value_ints: ints = [{axis}]> ()
        {out}_tail = Slice ({x}, {out}_a, {out}_e, {out}_x)
        {out}_head = Slice ({x}, {out}_z, {out}_a, {out}_x)
        {out} = Concat <axis: int = {axis}> ({out}_tail, {out}_head)
    """
