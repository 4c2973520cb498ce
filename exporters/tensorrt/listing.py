"""The layers of an engine as the builder of TensorRT for RTX lists them, in the form of the engine inspector's JSON.

With detailed profiling verbosity one verbose message holds a line for each layer:

    Layers:
    Name: .., LayerType: gemm, Inputs: [ { Name: .., Dimensions: [-1,96], .., Datatype: Half, .. }], Constants: [..],
    Outputs: [..], TacticName: .., StreamId: 0, Metadata: [ONNX Layer: a/MatMul][ONNX Layer: ..]

What signals another stream, or waits for it, has an EventId, too. The list is meant for people: names of nodes stand
in it as they are, with their commas, brackets and line breaks. So a network gets plain names in their place before it
is built, see `PlainNames`. What cannot be read is kept as a name, which proves nothing.
"""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

LISTING = "Layers:\n"
"""What the message begins with."""

_END = "\n\nI/O Tensors:\n"
_NEXT = re.compile(r"\n(?=Name: )")
_PLAIN = re.compile(r"[\w./+:-]*")
_STAND_IN = re.compile(r"~(\d+)~")
_LAYER = re.compile(
    r"Name: (?P<Name>.*?), LayerType: (?P<LayerType>\w*), Inputs: \[(?P<Inputs>.*?)\], "
    r"Constants: \[(?P<Constants>.*?)\], Outputs: \[(?P<Outputs>.*?)\], "
    r"TacticName: (?P<TacticName>[^,]*), StreamId: -?\d+(?:, \w+: [^,]*)*?, Metadata: (?P<Metadata>.*)",
    re.DOTALL,
)
_TENSOR = re.compile(
    r"\{ Name: (?P<Name>.*?), Dimensions: \[(?P<Dimensions>[-\d,]*)\], Strides: \[(?P<Strides>[-\d,]*)\], "
    r"StrideOrder: \[[-\d,]*\], Datatype: (?P<Datatype>\w+)",
    re.DOTALL,
)


class PlainNames:
    """Names that a reader of the list cannot mistake, in place of those that it could."""

    def __init__(self) -> None:
        self._places: dict[str, int] = {}

    def plain(self, name: str) -> str:
        """Return a name itself where it is plain, or else what stands for it."""
        if _PLAIN.fullmatch(name):
            return name
        return f"~{self._places.setdefault(name, len(self._places))}~"

    def restored(self, text: str) -> str:
        """Return a text with the names that it had."""
        names = list(self._places)
        return _STAND_IN.sub(lambda found: names[int(found[1])] if int(found[1]) < len(names) else found[0], text)


def as_inspector_json(message: str, names: PlainNames | None = None) -> str:
    """Return the layers of a message that begins with `LISTING`, as the inspector writes them.

    Args:
        message: the message.
        names: that were given to the network's layers and tensors.
    """
    text = message.removeprefix(LISTING).partition(_END)[0]
    names = PlainNames() if names is None else names
    return json.dumps({"Layers": [_layer(line, names.restored) for line in _NEXT.split(text) if line.strip()]})


def _layer(line: str, restored: Callable[[str], str]) -> dict[str, Any] | str:
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
