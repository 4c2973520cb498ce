"""The builder's list of layers: whatever nodes are called, every layer is read as it was written."""

from __future__ import annotations

import json
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from deploycli.exporters.tensorrt.compilers.rtx import LISTING, PlainNames, as_inspector_json
from deploycli.exporters.tensorrt.inspector import parse_layers

PIECES = (
    "attn",
    "/",
    ".",
    ", ",
    "LayerType: ",
    "gemm",
    "Name: ",
    "\n",
    "\nName: ",
    "[",
    "]",
    "{",
    "}",
    "Inputs: [",
    "\n\nI/O",
)
NAMES = st.lists(st.sampled_from(PIECES), min_size=1, max_size=6).map("".join).filter(lambda name: name.strip())
SHAPES = st.lists(st.sampled_from([-1, 1, 49, 96]), max_size=4)
TENSORS = st.lists(st.tuples(NAMES, SHAPES, st.sampled_from(["Half", "Float", "Int8"])), max_size=3)
LAYERS = st.lists(
    st.tuples(
        NAMES,
        st.sampled_from(["kgen", "gemm", "runtime_fusion", "signal", "wait"]),
        TENSORS,
        TENSORS,
        st.lists(NAMES, max_size=3),
    ),
    min_size=1,
    max_size=4,
)


END = "\n\nI/O Tensors:\n Name: x, IOMode: Input\n\nEngine Metadata:\n Multi-Device: Disabled"


def written(layers: list[Any], names: PlainNames) -> str:
    """The message, as TensorRT for RTX 1.7 writes it."""

    def tensors(found: list[Any]) -> str:
        return ", ".join(
            f"{{ Name: {names.plain(name)}, Dimensions: [{','.join(map(str, shape))}], "
            f"Strides: [{','.join('1' for _ in shape)}], StrideOrder: [{','.join('0' for _ in shape)}], "
            f"Datatype: {dtype}, Format: (Linear) Row major }}"
            for name, shape, dtype in found
        )

    lines = [
        f"Name: __myl_{names.plain(name)}_0, LayerType: {kind}, Inputs: [{tensors(reads)}], Constants: [], "
        f"Outputs: [{tensors(writes)}], TacticName: __myelin_CASK_STUB, StreamId: 0, "
        + ("EventId: 1, " if kind in ("signal", "wait") else "")
        + "Metadata: "
        + "\x1f".join(f"[ONNX Layer: {names.plain(node)}]" for node in nodes)
        for name, kind, reads, writes, nodes in layers
    ]
    return LISTING + "\n".join(lines) + END


@given(LAYERS)
def test_every_name_comes_back(layers: list[Any]) -> None:
    names = PlainNames()
    found = json.loads(as_inspector_json(written(layers, names), names))["Layers"]
    said = [
        [[tensor["Name"], tensor["Dimensions"], tensor["Datatype"]] for tensor in layer[side]]
        for layer in found
        for side in ("Inputs", "Outputs")
    ]
    assert said == [list(map(list, side)) for _, _, reads, writes, _ in layers for side in (reads, writes)]
    assert [(layer["Name"], layer["LayerType"]) for layer in found] == [
        (f"__myl_{n}_0", kind) for n, kind, *_ in layers
    ]


def test_what_cannot_be_read_proves_nothing() -> None:
    text = as_inspector_json(LISTING + "Name: odd, LayerType: gemm, of another version")
    assert json.loads(text)["Layers"] == ["Name: odd, LayerType: gemm, of another version"]
    layers = parse_layers(text)
    assert not layers.detailed
    assert layers.judged == ()
