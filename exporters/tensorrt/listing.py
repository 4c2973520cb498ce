"""The layers of an engine as the builder of TensorRT for RTX lists them, in the form of the engine inspector's JSON.

With detailed profiling verbosity one verbose message holds a line for each layer:

    Layers:
    Name: .., LayerType: gemm, Inputs: [ { Name: .., Dimensions: [-1,96], .., Datatype: Half, .. }], Constants: [..],
    Outputs: [..], TacticName: .., StreamId: 0, Metadata: [ONNX Layer: a/MatMul][ONNX Layer: ..]

It is meant for people: a name may hold a comma, a bracket or a line break, so a layer ends where the next one has all
its parts. What cannot be read is kept as a name, which proves nothing.
"""

from __future__ import annotations

import json
import re
from typing import Any

LISTING = "Layers:\n"
"""What the message begins with."""

_END = "\n\nI/O Tensors:\n"
_NEXT = re.compile(r"\n(?=Name: (?:(?!\nName: ).)*?, LayerType: \w*, Inputs: \[)", re.DOTALL)
_LAYER = re.compile(
    r"Name: (?P<Name>.*?), LayerType: (?P<LayerType>\w*), Inputs: \[(?P<Inputs>.*?)\], "
    r"Constants: \[(?P<Constants>.*?)\], Outputs: \[(?P<Outputs>.*?)\], "
    r"TacticName: (?P<TacticName>[^,]*), StreamId: -?\d+, Metadata: (?P<Metadata>.*)",
    re.DOTALL,
)
_TENSOR = re.compile(
    r"\{ Name: (?P<Name>.*?), Dimensions: \[(?P<Dimensions>[-\d,]*)\], Strides: \[[-\d,]*\], StrideOrder: \[[-\d,]*\], "
    r"Datatype: (?P<Datatype>\w+)",
    re.DOTALL,
)


def as_inspector_json(message: str) -> str:
    """Return the layers of a message that begins with `LISTING`, as the inspector writes them."""
    text = message.removeprefix(LISTING).partition(_END)[0]
    return json.dumps({"Layers": [_layer(line) for line in _NEXT.split(text) if line.strip()]})


def _layer(line: str) -> dict[str, Any] | str:
    found = _LAYER.fullmatch(line)
    if found is None:
        return line
    entry: dict[str, Any] = found.groupdict()
    return {**entry, **{key: _tensors(entry[key]) for key in ("Inputs", "Constants", "Outputs")}}


def _tensors(text: str) -> list[dict[str, Any]]:
    return [
        {
            "Name": found["Name"],
            "Dimensions": [int(size) for size in found["Dimensions"].split(",") if size],
            "Datatype": found["Datatype"],
        }
        for found in _TENSOR.finditer(text)
    ]
