"""What the tests of this folder ask of the bindings: run by `child.call`."""

from __future__ import annotations

from typing import Any


def facts() -> dict[str, Any]:
    import tensorrt as trt

    return {
        "version": trt.__version__,
        "typed": 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED),
        "dims": list(trt.Dims([1, 3, 224])),
        "has FP16 flag": hasattr(trt.BuilderFlag, "FP16"),
    }


def class_names() -> list[str]:
    import tensorrt

    from tests.tensorrt_api.stubs import classes_of

    return list(classes_of(tensorrt.tensorrt))


def warning() -> None:
    import warnings

    warnings.warn("old", DeprecationWarning, stacklevel=1)


def failing(divisor: int) -> float:
    return 1 / divisor
