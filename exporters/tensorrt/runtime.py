"""Run a plan: the very file that ships, checked against its sidecar before TensorRT sees it.

Every call of TensorRT that can fail says so by what it returns, not by an exception: each return value is looked at.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np

from exporters.precision.observed import model_sha256
from exporters.tensorrt import library
from exporters.tensorrt.device import open_device
from models.errors import EnvironmentUnsuitable, ExportError, IntegrityError, UsageError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path
    from types import ModuleType, TracebackType

    import numpy.typing as npt
    import tensorrt as trt
    from typing_extensions import Self

    from exporters.tensorrt.device import Device
    from exporters.tensorrt.sidecar import Sidecar

    Array = npt.NDArray[Any]

NUMPY_TYPES: Mapping[str, Any] = {
    "FLOAT": np.float32,
    "HALF": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "INT8": np.int8,
    "UINT8": np.uint8,
    "INT32": np.int32,
    "INT64": np.int64,
    "BOOL": np.bool_,
}
"""Name of a ``tensorrt.DataType`` -> NumPy type. ``tensorrt.nptype`` knows no BF16."""


class TensorRtRuntime:
    """A plan on a GPU.

    Args:
        folder: where plan and sidecar are.
        sidecar: the sidecar.
        device: the GPU; by default the one that this machine has.

    Raises:
        IntegrityError: the plan is not the recorded file.
        EnvironmentUnsuitable: no TensorRT, no GPU, or others than the plan was built for; or TensorRT refuses the plan.
    """

    def __init__(self, folder: Path, sidecar: Sidecar, *, device: Device | None = None) -> None:
        plan = sidecar.check_file(folder)
        trt = library.require()
        gpu = library.gpu()
        sidecar.check_host(library.version(), gpu.compute_capability, gpu.name)
        self._device = open_device() if device is None else device
        self.name = f"TensorRT {library.version()}"
        self._log = library.log()
        runtime = trt.Runtime(self._log)
        runtime.engine_host_code_allowed = False  # a plan may carry host code; ours have none
        engine = runtime.deserialize_cuda_engine(plan.read_bytes())
        if engine is None:
            raise self._refused(f"TensorRT cannot load {plan}")
        if sidecar.settings.strip_weights:
            self._refit(trt, engine, folder.parent / sidecar.onnx, sidecar.onnx_sha256)
        context = engine.create_execution_context()
        if context is None:
            raise self._refused(f"TensorRT cannot make an execution context for {plan}: is there GPU memory left?")
        self._runtime, self._engine, self._context = runtime, engine, context
        names = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
        inputs = [name for name in names if engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT]
        self._types = {name: NUMPY_TYPES[engine.get_tensor_dtype(name).name] for name in names}
        self._inputs = tuple(inputs)
        self._outputs = tuple(name for name in names if name not in inputs)
        self._buffers: dict[str, tuple[int, int]] = {}  # name -> address, bytes
        self._profile: int | None = None

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Run one batch; see `exporters.runtimes.Runtime.run`. Arrays are converted to the engine's types."""
        if set(inputs) != set(self._inputs):
            raise UsageError(
                f"{self.name} was given the inputs {', '.join(sorted(inputs)) or 'none'}",
                expected=", ".join(sorted(self._inputs)),
            )
        feed = {name: np.ascontiguousarray(array, dtype=self._types[name]) for name, array in inputs.items()}
        self._select_profile(feed)
        for name, array in feed.items():
            self._must(self._context.set_input_shape(name, array.shape), f"shape {array.shape} of input {name}")
            address = self._buffer(name, array.nbytes)
            self._must(self._context.set_tensor_address(name, address), f"address of {name}")
            self._device.upload(address, array)
        if missing := self._context.infer_shapes():
            raise ExportError(f"{self.name} does not know the shape of {', '.join(missing)}")
        outputs = {name: np.empty(self._shape(name), self._types[name]) for name in self._outputs}
        for name, array in outputs.items():
            self._must(self._context.set_tensor_address(name, self._buffer(name, array.nbytes)), f"address of {name}")
        self._must(self._context.execute_async_v3(self._device.stream), "execution")
        for name, array in outputs.items():
            self._device.download(self._buffers[name][0], array)
        self._device.synchronize()
        return outputs

    def _refit(self, trt: ModuleType, engine: trt.ICudaEngine, onnx: Path, sha256: str) -> None:
        """Give a stripped engine the weights of the very file that it was built from."""
        if (found := model_sha256(onnx)) != sha256:
            raise IntegrityError(
                f"{onnx} is not the file that the stripped engine was built from: sha256 {found}",
                expected=f"sha256 {sha256}",
                hint="build the engine again: deploycli build-trt",
            )
        refitter = trt.Refitter(engine, self._log)
        parser = trt.OnnxParserRefitter(refitter, self._log)
        if not parser.refit_from_file(str(onnx)):
            raise self._refused(f"TensorRT cannot take the weights of {onnx}")
        missing = refitter.get_missing_weights()
        if missing or not refitter.refit_cuda_engine():
            raise self._refused(f"TensorRT lacks {len(missing)} weights of the stripped engine after reading {onnx}")

    def _select_profile(self, feed: Mapping[str, Array]) -> None:
        """Choose the first optimization profile whose shapes hold the batch."""
        for i in range(self._engine.num_optimization_profiles):
            shapes = {name: self._engine.get_tensor_profile_shape(name, i) for name in feed}
            if all(_within(feed[name].shape, low, high) for name, (low, _opt, high) in shapes.items()):
                if i != self._profile:
                    self._must(
                        self._context.set_optimization_profile_async(i, self._device.stream),
                        f"optimization profile {i}",
                    )
                    self._profile = i
                return
        given = ", ".join(f"{name} {'x'.join(map(str, array.shape))}" for name, array in feed.items())
        ranges = ", ".join(
            f"{name} {'x'.join(map(str, low))} to {'x'.join(map(str, high))}"
            for name in feed
            for low, _opt, high in [self._engine.get_tensor_profile_shape(name, 0)]
        )
        raise ExportError(
            f"no profile of the engine takes {given}", expected=ranges, hint="deploycli build-trt --batch"
        )

    def _buffer(self, name: str, size: int) -> int:
        """Return the address of a buffer that holds a tensor; it is kept from call to call, and grows."""
        address, held = self._buffers.get(name, (0, -1))
        if held < size:
            address, held = self._device.allocate(size), size
            self._buffers[name] = address, held
        return address

    def _shape(self, name: str) -> tuple[int, ...]:
        shape = tuple(self._context.get_tensor_shape(name))
        if any(size < 0 for size in shape):
            raise ExportError(f"{self.name} does not know the shape of output {name}: {shape}")
        return shape

    def _must(self, succeeded: bool, what: str) -> None:
        if not succeeded:
            raise ExportError(f"{self.name} refused: {what}", expected=self._log.last())

    def _refused(self, found: str) -> EnvironmentUnsuitable:
        return EnvironmentUnsuitable(
            found, expected=self._log.last() or "a plan that was built here", hint="build it again: deploycli build-trt"
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._device.synchronize()
        del self._context, self._engine, self._runtime  # in this order: each needs the next
        self._device.close()


def _within(shape: tuple[int, ...], low: trt.Dims, high: trt.Dims) -> bool:
    bounds = list(zip(shape, tuple(low), tuple(high), strict=False))
    return len(shape) == len(tuple(low)) and all(a <= size <= b for size, a, b in bounds)
