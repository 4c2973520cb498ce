"""What runs a model: eager PyTorch or ONNX Runtime, behind one small interface of named NumPy arrays."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol

from deploycli.models.errors import DeployError, EnvironmentUnsuitable, ExportError, UsageError, first_line
from deploycli.models.factory import contained, raised_at
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


_INDICES = "the range of the indices, where that is what an input holds: --input NAME:SHAPE:int64:0..N"
_SINGLE = "weights are FP32 here, whatever they were: --input NAME:SHAPE:float32, or x.float() in forward"


class EagerRuntime:
    """The PyTorch module itself, in evaluation mode and full float32 on the CPU: the truth of every comparison.

    Args:
        module: moved to the CPU, cast to float32 and set to evaluation mode, in place.
        input_names: names of its positional arguments, in order.
        output_names: names of the tensors that it returns, in the order of `deploycli.models.outputs.flatten`.
        poison: fill what operators allocate with NaN first, so that a model that reads memory which nothing has
            written fails; it takes a quarter of the run.
    """

    name = "PyTorch eager"

    def __init__(
        self,
        module: torch.nn.Module,
        input_names: Sequence[str],
        output_names: Sequence[str],
        *,
        poison: bool = True,
    ) -> None:
        from deploycli.models.values import to_single

        self._module = to_single(module.to("cpu")).eval()
        self._input_names = tuple(input_names)
        self._output_names = tuple(output_names)
        self._poison = poison

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Run one batch; see `Runtime.run`."""
        import torch

        from deploycli.models.outputs import flatten

        _check_names(self.name, self._input_names, inputs)
        with _exact_arithmetic(self._poison), torch.inference_mode():
            tensors = [torch.tensor(inputs[name]) for name in self._input_names]
            try:
                with contained():
                    outputs = self._module(*tensors)
            except DeployError:
                raise
            except Exception as error:  # a stranger's code raises what it likes
                shapes = ", ".join(f"{name}:{_described(inputs[name])}" for name in self._input_names)
                raise ExportError(
                    f"{type(self._module).__name__} does not run on {shapes}: "
                    f"{type(error).__name__}: {first_line(error)}{raised_at(error)}",
                    expected="a model that runs at every batch size",
                    hint=_hint(error),
                ) from error
        found = tuple(flatten(outputs).values())
        if len(found) != len(self._output_names):
            raise ExportError(
                f"{type(self._module).__name__} returned {len(found)} tensors",
                expected=f"one for each of {', '.join(self._output_names)}",
            )
        return {name: tensor.detach().numpy() for name, tensor in zip(self._output_names, found, strict=True)}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        del self._module  # a large model's weights, while the next runtime loads its own


def _hint(error: Exception) -> str:
    if isinstance(error, IndexError):
        return _INDICES
    return _SINGLE if isinstance(error, RuntimeError) and "dtype" in str(error) else ""


@contextmanager
def _exact_arithmetic(poison: bool) -> Iterator[None]:
    """No autocast, no reduced-precision matrix products, deterministic kernels; the caller's settings come back."""
    import torch

    settings: Any = torch.utils.deterministic  # a module whose attributes no type checker sees
    precision = torch.get_float32_matmul_precision()
    deterministic = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    fill = settings.fill_uninitialized_memory
    torch.set_float32_matmul_precision("highest")  # "high" and "medium" reach BF16 on CPUs too
    torch.use_deterministic_algorithms(True)
    settings.fill_uninitialized_memory = poison
    try:
        with torch.autocast("cpu", enabled=False):
            yield
    finally:
        settings.fill_uninitialized_memory = fill
        torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)
        torch.set_float32_matmul_precision(precision)


PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
"""Device -> what ONNX Runtime calls that which runs on it."""


class OrtRuntime:
    """An ONNX file in ONNX Runtime.

    Args:
        path: the ONNX file.
        optimize: let ONNX Runtime rewrite the graph; off, it runs node by node as written.
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
        """Return what the graph reads of arrays: those in FP32 are rounded where it reads FP16."""
        half = {info.name for info in self.inputs if info.dtype == "float16"}
        return {name: array.astype("float16") if name in half else array for name, array in inputs.items()}

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Run one batch; see `Runtime.run` and `feed`."""
        names = [info.name for info in self.outputs]
        _check_names(self.name, [info.name for info in self.inputs], inputs)
        try:
            return dict(zip(names, self.session.run(names, self.feed(inputs)), strict=True))
        except Exception as error:  # its exceptions share no base class
            shapes = ", ".join(f"{name}:{_described(array)}" for name, array in inputs.items())
            raise ExportError(f"{self.name} failed on {shapes}: {first_line(error)}") from error

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        del self.session


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
