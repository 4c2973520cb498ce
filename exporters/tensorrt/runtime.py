"""Run a plan: the very file that ships, checked against its sidecar before TensorRT sees it.

What can fail in TensorRT tells so by what it returns, None or False, and not by an exception: each return value is
looked at, and TensorRT's own words are in the message. What TensorRT for RTX does otherwise than TensorRT is in
`RtxRuntime`, and what lies on the GPU in `Device`.

Kernels of TensorRT for RTX are finished on the GPU, when a context is made and when a shape is first seen. Those for a
shape are made before it is run (eager), not while slower ones stand in: so `verify` judges the kernels that `bench`
times. CUDA graphs are the library's: it knows when its kernels are ready. Finished kernels are kept beside the engine
for the next load. They are for one engine, version, GPU and driver, whose key stands in the file; what does not fit it,
or is damaged, is as good as no file. They only save time: a cache that cannot be read or written is no error. The file
is no part of what a bundle vouches for, as the engine is not.

Sources: TensorRT, Python API of 10.13 to 11.4; "Performing inference"; "Refitting an engine"; "Security". TensorRT for
RTX 1.7, Python API; "Working with runtime cache", "Working with dynamic shapes", "Working with RTX CUDA graphs";
NVIDIA/TensorRT-RTX, samples/apiUsage/python/api_usage.py and demo/utils/engine.py.
"""

from __future__ import annotations

import hashlib
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np

from deploycli.exporters.bundle.engine import PLAN_SUFFIX
from deploycli.exporters.bundle.files import write_whole
from deploycli.exporters.graph.onnx_file import model_sha256
from deploycli.exporters.target.product import RTX
from deploycli.exporters.target.settings import shapes_text
from deploycli.exporters.tensorrt import library
from deploycli.models.errors import (
    DeployError,
    EnvironmentUnsuitable,
    ExportError,
    IntegrityError,
    UsageError,
    first_line,
)
from deploycli.models.spec import numpy_name

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path
    from types import TracebackType

    import numpy.typing as npt
    import tensorrt as trt
    from torch import Tensor
    from typing_extensions import Self

    from deploycli.exporters.bundle.engine import Sidecar
    from deploycli.exporters.tensorrt.callbacks import Log

    Array = npt.NDArray[Any]


def open_engine(
    folder: Path, sidecar: Sidecar, *, allow_host_code: bool = False, cuda_graph: bool = False
) -> TensorRtRuntime:
    """Load an engine into the runtime of its product; see `TensorRtRuntime`.

    Args:
        folder: where plan and sidecar are, in the bundle.
        sidecar: the sidecar.
        allow_host_code: see `check_host`.
        cuda_graph: `TensorRtRuntime.capture` will be called.
    """
    if sidecar.product is RTX:
        return RtxRuntime(folder, sidecar, cuda_graph=cuda_graph)
    return TensorRtRuntime(folder, sidecar, allow_host_code=allow_host_code)


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


KERNELS_SUFFIX = ".kernels"

MOST_KERNEL_BYTES = 1 << 28
"""Largest file, bytes."""

_DIGEST_BYTES = hashlib.sha256().digest_size


class RtxRuntime(TensorRtRuntime):
    """A plan of TensorRT for RTX on a GPU. No GPU of the authors has run it: names and signatures are tested, as far as
    the library tells them without one.

    Args:
        folder: where plan and sidecar are, in the bundle.
        sidecar: the sidecar.
        cuda_graph: let the library replay a CUDA graph for a shape that it has seen.
        cache: where finished kernels are kept; by default beside the plan.

    Raises:
        IntegrityError, EnvironmentUnsuitable: see `TensorRtRuntime`.
    """

    _holds = ("_context", "_kernels", "_config", "_engine", "_runtime")

    def __init__(
        self,
        folder: Path,
        sidecar: Sidecar,
        *,
        cuda_graph: bool = False,
        cache: OnDisk | InMemory | None = None,
    ) -> None:
        self._cuda_graph = cuda_graph
        self._cache = cache
        self._found = b""
        self._place = folder, sidecar
        super().__init__(folder, sidecar)

    def capture(self) -> Callable[[], None]:
        """Return what starts an inference; see `TensorRtRuntime.capture`.

        Raises:
            ExportError: it was made without CUDA graphs.
        """
        if not self._cuda_graph:
            raise ExportError(f"{self.name} was loaded without CUDA graphs")
        return self.enqueue

    def _start(self) -> trt.Runtime:
        import tensorrt_rtx as rtx

        runtime: trt.Runtime = rtx.Runtime(self._log)
        return runtime

    def _make_context(self) -> trt.IExecutionContext | None:
        import tensorrt_rtx as rtx

        engine: rtx.ICudaEngine = self._engine
        config = engine.create_runtime_config()
        kernels = None if config is None else config.create_runtime_cache()
        if config is None or kernels is None:
            raise self._refused(f"{self.name} makes no configuration for the runtime")
        config.dynamic_shapes_kernel_specialization_strategy = rtx.DynamicShapesKernelSpecializationStrategy.EAGER
        if self._cuda_graph:
            config.cuda_graph_strategy = rtx.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
        self._found = self._kept().read()
        if self._found:
            kernels.deserialize(self._found)  # what it refuses leaves the cache empty
        if not config.set_runtime_cache(kernels):
            raise self._refused(f"{self.name} takes no cache of kernels")
        self._config, self._kernels = config, kernels
        context: trt.IExecutionContext | None = engine.create_execution_context(config)
        return context

    def _kept(self) -> OnDisk | InMemory:
        """Return where kernels are kept; asked for once the GPU is open."""
        if self._cache is None:
            self._cache = kernel_cache(*self._place)
        return self._cache

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self._keep()
        super().__exit__(kind, error, trace)

    def _keep(self) -> None:
        memory = self._kernels.serialize()
        kernels = b"" if memory is None else bytes(memory)
        if kernels and kernels != self._found:
            self._kept().write(kernels)


class InMemory:
    """No kernels at first, and no file."""

    def __init__(self) -> None:
        self._kernels = b""

    def read(self) -> bytes:
        """Return what was written last."""
        return self._kernels

    def write(self, kernels: bytes) -> None:
        """Keep them as long as this object lives."""
        self._kernels = kernels


@dataclass(frozen=True)
class OnDisk:
    """A file: the SHA-256 of the key and the kernels, and the kernels.

    Attributes:
        path: of the file.
        key: what the kernels are for.
    """

    path: Path
    key: str

    def read(self) -> bytes:
        """Return the kernels; nothing where there is no file, or one that is damaged or for something else."""
        if not self._is_ours():
            return b""
        try:
            with self.path.open("rb") as stream:
                content = stream.read(MOST_KERNEL_BYTES + 1)
        except OSError:
            return b""
        digest, kernels = content[:_DIGEST_BYTES], content[_DIGEST_BYTES:]
        return kernels if len(content) <= MOST_KERNEL_BYTES and digest == self._digest(kernels) else b""

    def write(self, kernels: bytes) -> None:
        """Replace the file, whole or not at all, where that is possible."""
        if self._is_ours() and len(kernels) <= MOST_KERNEL_BYTES - _DIGEST_BYTES:
            with suppress(DeployError):
                write_whole(self.path, self._digest(kernels) + kernels)

    def _is_ours(self) -> bool:
        """Whether a file is here, or may be: a link, which is followed, may lead anywhere, and a pipe never ends."""
        return not self.path.is_symlink() and (self.path.is_file() or not self.path.exists())

    def _digest(self, kernels: bytes) -> bytes:
        return hashlib.sha256(self.key.encode() + b"\0" + kernels).digest()


def kernel_cache(folder: Path, sidecar: Sidecar) -> OnDisk:
    """Return where the kernels of an engine are kept: ``fp16-rtx1.7.1.116.sm89-nvidia-geforce-rtx-4090.kernels``.

    Args:
        folder: of the engine.
        sidecar: of the engine.

    Raises:
        EnvironmentUnsuitable: there is no GPU, or no TensorRT for RTX.
    """
    gpu = library.gpu()
    key = "\n".join((sidecar.sha256, library.version(sidecar.product), gpu.slug, gpu.driver))
    return OnDisk(folder / f"{sidecar.plan.removesuffix(PLAN_SUFFIX)}.{gpu.slug}{KERNELS_SUFFIX}", key)


class Device:
    """The first GPU, with one stream of its own: on the default stream every call would wait for every other.

    Raises:
        EnvironmentUnsuitable: of every method, CUDA fails.
    """

    def __init__(self) -> None:
        import torch  # slow

        self._torch = torch
        self._stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        self._buffers: dict[int, Tensor] = {}
        self._graphs: list[Any] = []

    @property
    def stream(self) -> int:
        """Handle of the stream."""
        return int(self._stream.cuda_stream)

    def allocate(self, size: int) -> int:
        """Reserve ``size`` bytes until `free` or `close`; return their address."""
        # On the stream that uses them: PyTorch gives memory that was freed to others of the same stream at once.
        with self._torch.cuda.stream(self._stream):
            buffer = self._guarded(lambda: self._torch.empty(max(size, 1), dtype=self._torch.uint8, device="cuda"))
        self._buffers[int(buffer.data_ptr())] = buffer
        return int(buffer.data_ptr())

    def free(self, address: int) -> None:
        """Give memory back to PyTorch; the stream must be done with it."""
        del self._buffers[address]

    def upload(self, address: int, array: Array) -> None:
        """Copy a C-contiguous array to the GPU, in the order of the stream; keep the array until `synchronize`."""
        host = self._host(np.require(array, requirements="W"))  # PyTorch warns of arrays that cannot be written
        with self._torch.cuda.stream(self._stream):
            self._guarded(lambda: self._buffers[address][: host.numel()].copy_(host))

    def download(self, address: int, array: Array) -> None:
        """Fill a C-contiguous array from the GPU, in the order of the stream; it is filled after `synchronize`."""
        host = self._host(array)
        with self._torch.cuda.stream(self._stream):
            self._guarded(lambda: host.copy_(self._buffers[address][: host.numel()]))

    def synchronize(self) -> None:
        """Wait until the stream is done."""
        self._guarded(self._stream.synchronize)

    def capture(self, enqueue: Callable[[], None]) -> Callable[[], None]:
        """Record what is enqueued on the stream, and return what enqueues it again, in one call, until `close`."""
        graph = self._torch.cuda.CUDAGraph()
        with self._torch.cuda.graph(graph, stream=self._stream):
            enqueue()
        self._graphs.append(graph)

        def replay() -> None:
            with self._torch.cuda.stream(self._stream):
                self._guarded(graph.replay)

        return replay

    def close(self) -> None:
        """Free everything."""
        self._graphs.clear()
        self._buffers.clear()

    def _host(self, array: Array) -> Tensor:
        tensor: Tensor = self._torch.from_numpy(array.reshape(-1).view(np.uint8))
        return tensor

    def _guarded(self, call: Callable[[], Any]) -> Any:
        """Return what a call gives; PyTorch raises CUDA's errors as RuntimeError."""
        try:
            return call()
        except RuntimeError as error:
            raise EnvironmentUnsuitable(
                f"CUDA failed: {first_line(error)}", hint="nvidia-smi, to see what else uses the GPU and its memory"
            ) from error
