"""Rule 13: where external tensor data lie, and whether they may be read.

An ONNX file from a stranger names other files. They must stay in its folder and must be as long as it says.

Source: https://github.com/onnx/onnx/blob/main/docs/ExternalData.md
"""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

import onnx_ir as ir

from deploycli.exporters.graph.onnx_reader import span
from deploycli.exporters.lint.problem import error

if TYPE_CHECKING:
    from collections.abc import Iterator

    from deploycli.exporters.lint.problem import Problem
    from deploycli.exporters.lint.subject import Subject


def external_data(subject: Subject) -> Iterator[Problem]:
    """Rule 13: external data lie in the folder of the model, are there, and are as long as their shapes say.

    Source: ONNX ExternalData.md; TensorRT documentation, "Security": data paths of a model are untrusted input.
    """
    spans: dict[str, list[tuple[int, int, str]]] = {}
    for name, tensor in subject.tensors:
        reason = subject.fault(tensor)
        if reason is not None:
            yield error(name, reason, "write the model anew, its data beside it")
        elif isinstance(tensor, ir.ExternalTensor):
            start, length = span(tensor)
            if length:
                spans.setdefault(str(tensor.location), []).append((start, length, name))
    for location, found in spans.items():
        found.sort()
        for (start, length, name), (following, size, other) in pairwise(found):
            if following < start + length and (following, size) != (start, length):
                yield error(other, f"its data overlap those of {name} in {location}", "write the model anew")
