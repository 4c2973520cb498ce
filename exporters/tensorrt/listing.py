"""The layers of an engine as the builder of TensorRT for RTX lists them, in the form of the engine inspector's JSON.

With detailed profiling verbosity one verbose message holds a line for each layer:

    Layers:
    Name: .., LayerType: gemm, Inputs: [ { Name: .., Dimensions: [-1,96], .., Datatype: Half, .. }], Constants: [..],
    Outputs: [..], TacticName: .., StreamId: 0, Metadata: [ONNX Layer: a/MatMul][ONNX Layer: ..]

It is meant for people: names of nodes stand in it as they are, with their commas, brackets and line breaks. Such names
are known from the graph, so others stand for them while the text is read. What cannot be read is kept as a name, which
proves nothing.
"""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

LISTING = "Layers:\n"
"""What the message begins with."""

_END = "\n\nI/O Tensors:\n"
_NEXT = re.compile(r"\n(?=Name: )")
_PLAIN = re.compile(r"[\w./+:-]*")
_LAYER = re.compile(
    r"Name: (?P<Name>.*?), LayerType: (?P<LayerType>\w*), Inputs: \[(?P<Inputs>.*?)\], "
    r"Constants: \[(?P<Constants>.*?)\], Outputs: \[(?P<Outputs>.*?)\], "
    r"TacticName: (?P<TacticName>[^,]*), StreamId: -?\d+, Metadata: (?P<Metadata>.*)",
    re.DOTALL,
)
_TENSOR = re.compile(
    r"\{ Name: (?P<Name>.*?), Dimensions: \[(?P<Dimensions>[-\d,]*)\], Strides: \[(?P<Strides>[-\d,]*)\], "
    r"StrideOrder: \[[-\d,]*\], Datatype: (?P<Datatype>\w+)",
    re.DOTALL,
)


def as_inspector_json(message: str, names: Iterable[str] = ()) -> str:
    """Return the layers of a message that begins with `LISTING`, as the inspector writes them.

    Args:
        message: the message.
        names: of the nodes and tensors of the graph.
    """
    odd = sorted({name for name in names if not _PLAIN.fullmatch(name)}, key=len, reverse=True)
    text = message.removeprefix(LISTING)
    for place, name in enumerate(odd):
        text = text.replace(name, _stand_in(place))
    lines = _NEXT.split(text.partition(_END)[0])
    return json.dumps({"Layers": [_layer(line, odd) for line in lines if line.strip()]})


def _stand_in(place: int) -> str:
    return f"\x00{place}\x00"


def _layer(line: str, odd: Sequence[str]) -> dict[str, Any] | str:
    def restored(text: str) -> str:
        return re.sub("\x00(\\d+)\x00", lambda found: odd[int(found[1])], text)

    found = _LAYER.fullmatch(line)
    if found is None:
        return restored(line)
    entry: dict[str, Any] = {key: restored(text) for key, text in found.groupdict().items()}
    return {**entry, **{key: _tensors(found[key], restored) for key in ("Inputs", "Constants", "Outputs")}}


def _tensors(text: str, restored: Callable[[str], str]) -> list[dict[str, Any]]:
    return [
        {
            "Name": restored(found["Name"]),
            "Dimensions": _numbers(found["Dimensions"]),
            "Strides": _numbers(found["Strides"]),
            "Datatype": found["Datatype"],
        }
        for found in _TENSOR.finditer(text)
    ]


def _numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",") if number]
