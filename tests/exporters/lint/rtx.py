"""NVIDIA's own parser, where TensorRT for RTX is installed: it needs no GPU."""

from __future__ import annotations

import contextlib
import os
from functools import cache
from typing import TYPE_CHECKING, Any

import onnx_ir as ir
import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator

    import onnx

WHY = "needs NVIDIA's parser: pip install tensorrt-rtx-cu12"


@cache
def _parts() -> tuple[Any, Any, Any]:
    trt = pytest.importorskip("tensorrt_rtx", reason=WHY)

    class Silent(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, _severity: Any, _message: str) -> None:
            """Errors are asked of the parser."""

    logger = Silent()
    with _nothing_on_stderr():
        return trt, logger, trt.Builder(logger)


def refusals(model: onnx.ModelProto | ir.Model) -> list[str]:
    """Return why the parser refuses a model; nothing where it takes it. Skips the test where it is not installed."""
    trt, logger, builder = _parts()
    message = ir.to_proto(model) if isinstance(model, ir.Model) else model
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, logger)
    with _nothing_on_stderr():
        if parser.parse(message.SerializeToString()):
            return []
    return [parser.get_error(i).desc() for i in range(min(parser.num_errors, 5))] or ["it does not say why"]


@contextlib.contextmanager
def _nothing_on_stderr() -> Iterator[None]:
    """Keep quiet that there is no driver: the library writes that itself, past Python."""
    before, null = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 2)
    try:
        yield
    finally:
        os.dup2(before, 2)
        os.close(before)
        os.close(null)
