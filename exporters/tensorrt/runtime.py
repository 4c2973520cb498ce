"""Run a plan: the very file that ships, checked against its sidecar before TensorRT sees it.

What can fail in TensorRT tells so by what it returns, None or False, and not by an exception: each return value is
looked at, and TensorRT's own words are in the message. `deploycli.exporters.tensorrt.rtx_runtime` is what TensorRT
for RTX does otherwise; `deploycli.exporters.tensorrt.open_engine` chooses.

Sources: TensorRT, Python API of 10.13 to 11.4; "Performing inference"; "Refitting an engine"; "Security".
"""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np

from deploycli.exporters.graph.onnx_file import model_sha256
from deploycli.exporters.target.product import RTX
from deploycli.exporters.target.settings import shapes_text
from deploycli.exporters.tensorrt import library
from deploycli.exporters.tensorrt.device import Device
from deploycli.models.errors import DeployError, EnvironmentUnsuitable, ExportError, IntegrityError, UsageError
from deploycli.models.spec import numpy_name

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path
    from types import TracebackType

    import numpy.typing as npt
    import tensorrt as trt
    from typing_extensions import Self

    from deploycli.exporters.bundle.engine import Sidecar
    from deploycli.exporters.tensorrt.callbacks import Log

    Array = npt.NDArray[Any]

NUMPY_TYPES: Mapping[str, np.dtype[Any]] = {
    name: np.dtype(ml_dtypes.bfloat16 if name == "BF16" else numpy_name(name))
    for name in ("FLOAT", "HALF", "BF16", "INT8", "UINT8", "INT32", "INT64", "BOOL")
}
"""Name of a ``tensorrt.DataType`` -> NumPy type. ``tensorrt.nptype`` knows no BF16."""


def check_host(sidecar: Sidecar, *, allow_host_code: bool = False) -> None:
    """Say why this machine cannot run a plan, or must not, without a look at the plan.

    Args:
        sidecar: the plan's.
        allow_host_code: a version compatible plan holds a lean runtime, which is code for this machine's CPU: it runs
            only where the user says so.

    Raises:
        EnvironmentUnsuitable: the plan's product or a GPU is missing, both are others than it was built for, or it
            holds host code.
    """
    if sidecar.product is RTX and not library.has_driver():
        raise EnvironmentUnsuitable(
            f"it was not run here: it is for {sidecar.runs_on}, and this machine has no NVIDIA driver",
            expected=f"a GPU of {sidecar.runs_on}, to run {sidecar.plan}",
            hint="a machine with such a GPU; on this one, verify --engines auto lists what cannot run",
        )
    library.require(sidecar.product)
    gpu = library.gpu()
    sidecar.check_host(library.version(sidecar.product), gpu.compute_capability, gpu.name)
    if sidecar.settings.version_compatible and not allow_host_code:
        raise EnvironmentUnsuitable(
            f"{sidecar.plan} is version compatible: it holds a lean runtime, which is code that would run here",
            expected="a plan without host code, or your word that you trust who built it",
            hint="--allow-engine-host-code",
        )


class TensorRtRuntime:
    """A plan on a GPU. What is TensorRT's alone is in methods that the runtime of the other product has otherwise.

    Args:
        folder: where plan and sidecar are, in the bundle.
        sidecar: the sidecar.
        allow_host_code: see `check_host`.

    Attributes:
        product: what it is a plan of.
        name: what runs it, for reports.

    Raises:
        IntegrityError: the plan is not the recorded file, or the ONNX file of a stripped one is not.
        EnvironmentUnsuitable: see `check_host`; or TensorRT refuses the plan.
    """

    _holds: tuple[str, ...] = ("_context", "_engine", "_runtime")
    """Attributes that are freed in this order: each needs the next."""

    def __init__(self, folder: Path, sidecar: Sidecar, *, allow_host_code: bool = False) -> None:
        plan = sidecar.read_plan(folder)
        check_host(sidecar, allow_host_code=allow_host_code)
        self.product = sidecar.product
        self.name = f"{self.product.title} {library.version(self.product)}"
        self._log = library.log(self.product)
        self._buffers: dict[str, tuple[int, int]] = {}  # name -> address, bytes
        self._profile: int | None = None
        self._runtime, self._engine = self._load(folder / sidecar.plan, plan, allow_host_code)
        if sidecar.settings.strip_weights:
            self._refit(folder.parent / sidecar.onnx, sidecar.onnx_sha256)
        self._types, self._inputs, self._outputs = self._interface()
        self._device = Device()
        try:
            context = self._make_context()
            if context is None:
                raise self._refused(f"{self.name} makes no execution context for {folder / sidecar.plan}")
        except BaseException:
            self._device.close()
            raise
        self._context = context

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Run one batch; see `deploycli.exporters.runtime.runtimes.Runtime.run`.

        Arrays are converted to the engine's types; outputs of type BF16, which NumPy lacks, are returned as float32.
        """
        self.prepare(inputs)
        self.enqueue()
        return self.outputs()

    def prepare(self, inputs: Mapping[str, Array]) -> None:
        """Choose a profile, set the shapes, and copy one batch to the GPU.

        Raises:
            UsageError: other inputs than the engine has.
            ExportError: shapes that the engine does not take.
            EnvironmentUnsuitable: CUDA fails, such as for lack of memory.
        """
        if set(inputs) != set(self._inputs):
            raise UsageError(
                f"{self.name} was given the inputs {', '.join(sorted(inputs)) or 'none'}",
                expected=", ".join(sorted(self._inputs)),
            )
        with np.errstate(over="ignore"):  # what FP16 cannot hold becomes infinite, as it does in a graph's own cast
            feed = {name: np.ascontiguousarray(array, dtype=self._types[name]) for name, array in inputs.items()}
        try:
            self._select_profile(feed)
            for name, array in feed.items():
                shape = tuple(array.shape)
                self._must(self._context.set_input_shape(name, shape), f"the shape {shape} of input {name}")
                address = self._buffer(name, array.nbytes)
                self._must(self._context.set_tensor_address(name, address), f"the address of {name}")
                self._device.upload(address, array)
            if missing := self._context.infer_shapes():
                raise ExportError(f"{self.name} does not know the shape of {', '.join(missing)}")
            for name in self._outputs:
                address = self._buffer(name, self._empty(name).nbytes)
                self._must(self._context.set_tensor_address(name, address), f"the address of {name}")
            self._device.synchronize()  # the copies read from arrays that end here
        except BaseException:
            with suppress(DeployError):
                self._device.synchronize()
            raise

    def enqueue(self) -> None:
        """Start one inference on what was prepared; it is done after `synchronize`, or with `outputs`.

        Raises:
            ExportError: TensorRT refuses.
        """
        self._must(self._context.execute_async_v3(self._device.stream), "to run")

    def synchronize(self) -> None:
        """Wait for everything that was started."""
        self._device.synchronize()

    def capture(self) -> Callable[[], None]:
        """Record an inference as a CUDA graph; return what starts it, in place of `enqueue`, until `prepare`.

        Raises:
            ExportError: the engine cannot be recorded.
        """
        self.enqueue()  # TensorRT allocates at the first run after a change of shapes, which a graph cannot record
        self.synchronize()
        return self._device.capture(self.enqueue)

    def outputs(self) -> dict[str, Array]:
        """Return what the last inference gave, name -> [B, ...]."""
        arrays = {name: self._empty(name) for name in self._outputs}
        try:
            for name, array in arrays.items():
                self._device.download(self._buffers[name][0], array)
        finally:
            self._device.synchronize()  # the arrays are filled now, and not before
        wide = ml_dtypes.bfloat16
        return {name: array.astype(np.float32) if array.dtype == wide else array for name, array in arrays.items()}

    def _load(self, path: Path, plan: bytes, allow_host_code: bool) -> tuple[trt.Runtime, trt.ICudaEngine]:
        try:
            runtime = self._start()
        except TypeError as error:  # pybind11's "factory function returned nullptr"
            raise self._refused(f"{self.name} does not start") from error
        runtime.engine_host_code_allowed = allow_host_code
        engine = runtime.deserialize_cuda_engine(plan)
        if engine is None:
            raise self._refused(f"{self.name} cannot load {path}")
        return runtime, engine

    def _start(self) -> trt.Runtime:
        import tensorrt as trt

        if not trt.init_libnvinfer_plugins(self._log, ""):
            raise self._refused("TensorRT cannot register its plugins")
        return trt.Runtime(self._log)

    def _make_context(self) -> trt.IExecutionContext | None:
        return self._engine.create_execution_context()

    def _refit(self, onnx: Path, sha256: str) -> None:
        """Give a stripped engine the weights of the very file that it was built from."""
        import tensorrt as trt

        if not onnx.is_file() or not onnx.resolve().is_relative_to(onnx.parent.resolve()):
            found = "is a link that leaves the bundle" if onnx.is_file() else "is missing"
            raise IntegrityError(f"{onnx}, whose weights a stripped engine needs, {found}", expected="in the bundle")
        if (digest := model_sha256(onnx)) != sha256:
            raise IntegrityError(
                f"{onnx} is not the file that the stripped engine was built from: sha256 {digest}",
                expected=f"sha256 {sha256}",
                hint="build the engine again: deploycli build-trt",
            )
        refitter = trt.Refitter(self._engine, self._log)
        parser = trt.OnnxParserRefitter(refitter, self._log)
        if not parser.refit_from_file(str(onnx)):
            raise self._refused(f"TensorRT cannot take the weights of {onnx}")
        if missing := refitter.get_missing_weights():
            raise self._refused(f"{onnx} lacks weights of the stripped engine: {', '.join(map(str, missing[:3]))}")
        if not refitter.refit_cuda_engine():
            raise self._refused(f"TensorRT cannot put the weights of {onnx} into the stripped engine")

    def _interface(self) -> tuple[dict[str, Any], tuple[str, ...], tuple[str, ...]]:
        """Return the types of all tensors, the names of inputs, and those of outputs."""
        engine = self._engine
        names = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
        types = {name: engine.get_tensor_dtype(name).name for name in names}
        for name, dtype in types.items():
            if dtype not in NUMPY_TYPES:
                raise ExportError(f"the engine's {name} is of type {dtype}", expected=", ".join(NUMPY_TYPES))
            if engine.get_tensor_location(name).name != "DEVICE":
                raise ExportError(f"the engine wants {name} in host memory", expected="inputs and outputs on the GPU")
        inputs = tuple(name for name in names if engine.get_tensor_mode(name).name == "INPUT")
        outputs = tuple(name for name in names if name not in inputs)
        return {name: NUMPY_TYPES[dtype] for name, dtype in types.items()}, inputs, outputs

    def _select_profile(self, feed: Mapping[str, Array]) -> None:
        """Choose the first optimization profile whose shapes hold the batch."""
        engine, ranges = self._engine, []
        for i in range(engine.num_optimization_profiles):
            shapes = {name: [tuple(s) for s in engine.get_tensor_profile_shape(name, i)] for name in feed}
            if all(_within(feed[name].shape, low, high) for name, (low, _opt, high) in shapes.items()):
                if i != self._profile:
                    chosen = self._context.set_optimization_profile_async(i, self._device.stream)
                    self._must(chosen, f"optimization profile {i}")
                    self._profile = i
                return
            ranges.append(
                ", ".join(
                    f"{name} {shapes_text(low)} to {shapes_text(high)}" for name, (low, _, high) in shapes.items()
                )
            )
        given = ", ".join(f"{name} {shapes_text(array.shape)}" for name, array in feed.items())
        raise ExportError(
            f"no profile of the engine takes {given}", expected="; or ".join(ranges), hint="deploycli build-trt --batch"
        )

    def _buffer(self, name: str, size: int) -> int:
        """Return the address of a buffer that holds a tensor; it is kept from run to run, and replaced to grow."""
        address, held = self._buffers.get(name, (0, -1))
        if held < size:
            if self._buffers.pop(name, None) is not None:
                self._device.free(address)  # no run is under way: each ends with a synchronisation
            address = self._device.allocate(size)
            self._buffers[name] = address, size
        return address

    def _empty(self, name: str) -> Array:
        shape = tuple(self._context.get_tensor_shape(name))
        if any(size < 0 for size in shape):
            raise ExportError(f"{self.name} does not know the shape of output {name}: {shapes_text(shape)}")
        return np.empty(shape, self._types[name])

    def _must(self, succeeded: bool, what: str) -> None:
        if not succeeded:
            raise ExportError(f"{self.name} refuses {what}: {_said(self._log)}")

    def _refused(self, found: str) -> EnvironmentUnsuitable:
        return EnvironmentUnsuitable(
            f"{found}: {_said(self._log)}",
            expected="a plan that was built here, and free GPU memory",
            hint="nvidia-smi; or build it again: deploycli build-trt",
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            with suppress(DeployError):
                self._device.synchronize()
            for held in self._holds:
                delattr(self, held)
            self._device.close()
        except DeployError:
            if error is None:  # else what came first says more
                raise


def _said(log: Log) -> str:
    return " | ".join(log.last().splitlines()) or "it does not say why"


def _within(shape: tuple[int, ...], low: tuple[int, ...], high: tuple[int, ...]) -> bool:
    return len(shape) == len(low) and all(a <= size <= b for size, a, b in zip(shape, low, high, strict=True))
