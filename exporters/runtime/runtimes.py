"""What runs a model: eager PyTorch or ONNX Runtime, behind one small interface of named NumPy arrays."""

from __future__ import annotations

from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, Protocol

from deploycli.models.errors import DeployError, EnvironmentUnsuitable, ExportError, UsageError, first_line
from deploycli.models.factory import contained, said
from deploycli.models.spec import TensorInfo, numpy_name

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path
    from types import TracebackType

    import numpy.typing as npt
    import torch
    from typing_extensions import Self

    Array = npt.NDArray[Any]


class Runtime(Protocol):
    """Runs one model; use it as a context manager, which holds and frees what the model needs."""

    @property
    def name(self) -> str:
        """What runs it, for reports: ``PyTorch eager``, ``ONNX Runtime``."""

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Run one batch.

        Args:
            inputs: name -> [B, ...].

        Returns:
            name -> [B, ...], in the model's order.

        Raises:
            UsageError: other inputs than the model has.
            ExportError: the model does not run on these inputs.
        """

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


class Closing:
    """A context manager whose end is `close`, however it comes."""

    def close(self) -> None:
        """Free what is held."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


_INDICES = "the range of the indices, where that is what an input holds: --input NAME:SHAPE:int64:0..N"
_SINGLE = "weights are FP32 here, whatever they were: --input NAME:SHAPE:float32, or x.float() in forward"


class EagerRuntime(Closing):
    """The PyTorch module itself, in evaluation mode; in full float32 on the CPU it is the truth of every comparison.

    Args:
        module: moved to the device, cast to float32 or float16 and set to evaluation mode, in place.
        input_names: names of its positional arguments, in order.
        output_names: names of the tensors that it returns, in the order of `deploycli.models.outputs.flatten`.
        poison: fill what operators allocate with NaN first, so that a model that reads memory which nothing has
            written fails; it takes a quarter of the run.
        device: ``cpu`` or ``cuda``.
        half: run in float16; inputs are rounded to it, and outputs in it are returned in float32.

    Attributes:
        module: the module, to be compiled or timed by itself.

    Raises:
        UsageError: a weight is beyond float32.
    """

    name = "PyTorch eager"

    def __init__(
        self,
        module: torch.nn.Module,
        input_names: Sequence[str],
        output_names: Sequence[str],
        *,
        poison: bool = True,
        device: str = "cpu",
        half: bool = False,
    ) -> None:
        from deploycli.models.values import to_single

        single = to_single(module.to("cpu")).eval()
        self.module = (single.half() if half else single).to(device)
        self._device, self._half = device, half
        self._input_names = tuple(input_names)
        self._output_names = tuple(output_names)
        self._poison = poison

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Run one batch; see `Runtime.run`."""
        import torch

        tensors = self.feed(inputs)
        with _exact_arithmetic(self._device, self._poison), torch.inference_mode():
            try:
                with contained():
                    outputs = self.module(*tensors)
            except DeployError:
                raise
            except Exception as error:  # a stranger's code raises what it likes
                shapes = ", ".join(f"{name}:{_described(inputs[name])}" for name in self._input_names)
                raise ExportError(
                    f"{type(self.module).__name__} does not run on {shapes}: {said(error)}",
                    expected="a model that runs at every batch size",
                    hint=_hint(error),
                ) from error
        return self.named(outputs)

    def feed(self, inputs: Mapping[str, Array]) -> list[torch.Tensor]:
        """Return the module's arguments: copies of the arrays on its device.

        Raises:
            UsageError: other inputs than the module has.
        """
        import torch

        _check_names(self.name, self._input_names, inputs)
        tensors = (torch.tensor(inputs[name], device=self._device) for name in self._input_names)
        return [tensor.half() if self._half and tensor.is_floating_point() else tensor for tensor in tensors]

    def named(self, outputs: object) -> dict[str, Array]:
        """Return what the module returned as arrays, by name.

        Raises:
            ExportError: other outputs than the module has.
        """
        from deploycli.models.outputs import flatten

        found = tuple(flatten(outputs).values())
        if len(found) != len(self._output_names):
            raise ExportError(
                f"{type(self.module).__name__} returned {len(found)} tensors",
                expected=f"one for each of {', '.join(self._output_names)}",
            )
        single = (tensor.float() if self._half and tensor.is_floating_point() else tensor for tensor in found)
        return {name: one.detach().cpu().numpy() for name, one in zip(self._output_names, single, strict=True)}

    def close(self) -> None:
        """Let go of the module: a large model's weights, while the next runtime loads its own."""
        del self.module


def _hint(error: Exception) -> str:
    if isinstance(error, IndexError):
        return _INDICES
    return _SINGLE if isinstance(error, RuntimeError) and "dtype" in str(error) else ""


@contextmanager
def full_float32(device: str) -> Iterator[None]:
    """FP32 that is FP32, inside the block: PyTorch may take BF16 for a product on a CPU, TF32 for one on a GPU."""
    import torch

    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")  # "high" and "medium" reach BF16 on CPUs too
    convolutions = torch.backends.cudnn.flags(enabled=True, allow_tf32=False) if device == "cuda" else nullcontext()
    try:
        with convolutions:
            yield
    finally:
        torch.set_float32_matmul_precision(precision)


@contextmanager
def _exact_arithmetic(device: str, poison: bool) -> Iterator[None]:
    """Full float32, no autocast, deterministic kernels; the caller's settings come back."""
    import torch

    settings: Any = torch.utils.deterministic  # a module whose attributes no type checker sees
    deterministic = torch.get_deterministic_debug_mode()
    fill = settings.fill_uninitialized_memory
    torch.set_deterministic_debug_mode("error")  # use_deterministic_algorithms imports PyTorch's compiler besides
    settings.fill_uninitialized_memory = poison
    try:
        with full_float32(device), torch.autocast(device, enabled=False):
            yield
    finally:
        settings.fill_uninitialized_memory = fill
        torch.set_deterministic_debug_mode(deterministic)


PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
"""Device -> what ONNX Runtime calls that which runs on it."""


class OrtRuntime(Closing):
    """An ONNX file in ONNX Runtime.

    Args:
        path: the ONNX file.
        optimize: let ONNX Runtime rewrite the graph; off, it runs node by node as written.
        move_qdq: let it move and fuse Q/DQ pairs as well. Of FP8 it must not: it moves them across a Transpose, and
            then has no such Transpose.
        threads: threads within an operator; None leaves the choice to ONNX Runtime.
        device: of `PROVIDERS`.
        timed: for the clock: kernels need not be deterministic, and threads do not wait for work by spinning, which
            would slow down whoever runs next.

    Attributes:
        inputs: graph inputs; in shapes a text is a symbolic axis, None an unknown one.
        outputs: graph outputs, likewise.
        session: ONNX Runtime's.

    Raises:
        EnvironmentUnsuitable: ONNX Runtime has not what runs on the device.
        UsageError: the file's name is not in UTF-8.
        ExportError: it cannot load the file.
    """

    name = "ONNX Runtime"

    def __init__(
        self,
        path: Path,
        *,
        optimize: bool = True,
        move_qdq: bool = True,
        threads: int | None = None,
        device: str = "cpu",
        timed: bool = False,
    ) -> None:
        import onnxruntime as ort  # slow

        try:
            str(path).encode()
        except UnicodeEncodeError as error:
            raise UsageError(
                f"{path} is no name in UTF-8, and ONNX Runtime opens no other", hint="rename it"
            ) from error
        provider = PROVIDERS[device]
        if provider not in ort.get_available_providers():
            raise EnvironmentUnsuitable(
                f"this ONNX Runtime has no {provider}", expected=provider, hint="pip install onnxruntime-gpu"
            )
        options = ort.SessionOptions()
        options.log_severity_level = 4  # errors are raised as well, and warnings are not ours to act on
        options.use_deterministic_compute = not timed
        options.intra_op_num_threads = threads or 0
        if not move_qdq:
            options.add_session_config_entry("session.disable_quant_qdq", "1")
        if timed:
            options.add_session_config_entry("session.force_spinning_stop", "1")
        level = ort.GraphOptimizationLevel
        options.graph_optimization_level = level.ORT_ENABLE_ALL if optimize else level.ORT_DISABLE_ALL
        given: dict[str, str] = {"use_tf32": "0"} if device == "cuda" else {}
        try:
            self.session = ort.InferenceSession(path, options, providers=[(provider, given)])
        except Exception as error:  # its exceptions share no base class
            raise ExportError(
                f"ONNX Runtime {ort.__version__} cannot load {path}: {first_line(error)}",
                hint="an opset that this version knows, or a newer onnxruntime",
            ) from error
        if provider not in self.session.get_providers():  # it falls back on the CPU where a CUDA library is missing
            raise EnvironmentUnsuitable(
                f"ONNX Runtime could not start its {provider}",
                hint="the CUDA and cuDNN that this onnxruntime-gpu is for",
            )
        self.path = path
        self.inputs = tuple(_tensor_info(node) for node in self.session.get_inputs())
        self.outputs = tuple(_tensor_info(node) for node in self.session.get_outputs())

    def feed(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Return what the graph reads of arrays: floating-point numbers in the width that it reads."""
        floats = {info.name: info.dtype for info in self.inputs if info.dtype in ("float16", "float32", "float64")}
        return {
            name: array.astype(floats[name], copy=False)
            if name in floats and getattr(array, "dtype", None) in ("float16", "float32", "float64")
            else array
            for name, array in inputs.items()
        }

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Run one batch; see `Runtime.run` and `feed`."""
        names = [info.name for info in self.outputs]
        _check_names(self.name, [info.name for info in self.inputs], inputs)
        try:
            return dict(zip(names, self.session.run(names, self.feed(inputs)), strict=True))
        except Exception as error:  # its exceptions share no base class
            shapes = ", ".join(f"{name}:{_described(array)}" for name, array in inputs.items())
            raise ExportError(f"{self.name} failed on {shapes}: {first_line(error)}") from error

    def close(self) -> None:
        """Let go of the session, and of the weights that it holds."""
        del self.session


class InBatches(Closing):
    """Runs any number of samples in a runtime of one fixed batch; the last batch is filled with its last sample.

    Args:
        runtime: what runs them; it is closed with this.
        batch: samples of a run.
    """

    def __init__(self, runtime: OrtRuntime, batch: int) -> None:
        self.name = runtime.name
        self._runtime, self._batch = runtime, batch

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Run all samples; see `Runtime.run`."""
        import numpy as np

        held = len(next(iter(inputs.values())))
        answers = []
        for first in range(0, held, self._batch):
            order = np.minimum(np.arange(first, first + self._batch), held - 1)
            outputs = self._runtime.run({name: array[order] for name, array in inputs.items()})
            answers.append({name: np.asarray(array)[: held - first] for name, array in outputs.items()})
        return {name: np.concatenate([answer[name] for answer in answers]) for name in answers[0]}

    def close(self) -> None:
        """Let go of the runtime."""
        self._runtime.close()


def _described(array: Any) -> str:
    """Return shape and type of an input; one that is a sequence has neither."""
    return f"{len(array)} tensors" if isinstance(array, list) else f"{'x'.join(map(str, array.shape))} {array.dtype}"


def _tensor_info(node: Any) -> TensorInfo[int | str | None]:
    dtype = node.type.removeprefix("tensor(").removesuffix(")")
    return TensorInfo(node.name, numpy_name(dtype), tuple(node.shape))


def _check_names(runtime: str, expected: Sequence[str], inputs: Mapping[str, Array]) -> None:
    if set(expected) != set(inputs):
        raise UsageError(
            f"{runtime} was given the inputs {', '.join(sorted(inputs)) or 'none'}",
            expected=", ".join(sorted(expected)),
        )
