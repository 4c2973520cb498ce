"""Open the model beside this file in ONNX Runtime, on an RTX GPU by NVIDIA's TensorRT RTX execution provider.

    pip install "onnxruntime>=1.24" onnxruntime-ep-nv-tensorrt-rtx-cu12
    python load.py             # says what runs the model, and runs it once on zeros

    import load
    outputs = load.open_session().run(None, {"images": images})

Where the provider or a GPU that it takes is missing, the CPU runs it, which is said on stderr. ``onnxruntime.json`` has
the provider's options, the hashes of the files, and where the model came from.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import importlib
import json
import sys
from pathlib import Path
from typing import Any

import numpy
import onnxruntime

FOLDER = Path(__file__).resolve().parent
CONFIGURATION = "onnxruntime.json"
PACKAGE = "onnxruntime_ep_nv_tensorrt_rtx"


def open_session(folder: Path = FOLDER) -> Any:
    """Check the files of the folder and open its model; return an ``onnxruntime.InferenceSession``.

    Raises:
        SystemExit: a file is not the one that was packaged.
    """
    config = json.loads((folder / CONFIGURATION).read_text("utf-8"))
    for name, sha256 in config["files"].items():
        if hashlib.sha256((folder / name).read_bytes()).hexdigest() != sha256:
            sys.exit(f"error: {folder / name} is not the file that was packaged, expected sha256 {sha256}")
    devices, why = rtx_devices(config["execution_provider"])
    options = onnxruntime.SessionOptions()
    if devices:
        given = dict(config["provider_options"])
        cache = folder / given["nv_runtime_cache_path"]
        with contextlib.suppress(OSError):  # then every start compiles
            cache.mkdir(exist_ok=True)
        options.add_provider_for_devices(devices[:1], {**given, "nv_runtime_cache_path": str(cache)})
        return onnxruntime.InferenceSession(folder / config["model"], options)
    print(f"{config['execution_provider']} cannot run here, the CPU does: {why}", file=sys.stderr)
    return onnxruntime.InferenceSession(folder / config["model"], options, providers=["CPUExecutionProvider"])


def rtx_devices(provider: str) -> tuple[list[Any], str]:
    """Register the provider, once; return the GPUs that it takes, and why there are none."""
    try:
        if not devices_of(provider):
            library = Path(importlib.import_module(PACKAGE).get_library_path())
            for cudart in library.parent.glob("libcudart.so.*"):  # the provider looks for it under a shorter name
                ctypes.CDLL(str(cudart), mode=ctypes.RTLD_GLOBAL)
            onnxruntime.register_execution_provider_library(provider, str(library))
        return devices_of(provider), "there is no GPU that it takes (GeForce RTX 30 or later)"
    except Exception as error:  # ONNX Runtime's share no base class; before 1.24 it has no plug-ins
        return [], (str(error).splitlines() or [type(error).__name__])[0]


def devices_of(provider: str) -> list[Any]:
    """Return what a registered provider can run on."""
    return [device for device in onnxruntime.get_ep_devices() if device.ep_name == provider]


def main() -> None:
    """Run the model once on zeros, and say what ran it."""
    session = open_session()
    types = {"tensor(float)": "float32", "tensor(double)": "float64"}
    feed = {
        node.name: numpy.zeros(
            [size if isinstance(size, int) else 1 for size in node.shape],
            types.get(node.type) or node.type.removeprefix("tensor(").removesuffix(")"),
        )
        for node in session.get_inputs()
    }
    for node, value in zip(session.get_outputs(), session.run(None, feed), strict=True):
        print(f"{node.name}: {'x'.join(map(str, value.shape))} {value.dtype}")
    print(f"ran by {session.get_providers()[0]}")


if __name__ == "__main__":
    main()
