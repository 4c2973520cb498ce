"""The PyTorch module itself: eager, and compiled by torch.compile."""

from __future__ import annotations

from contextlib import ExitStack, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

from deploycli.exporters.bench.candidate import Candidate, Prepared
from deploycli.exporters.bundle.reference import choose_reference, reference_model
from deploycli.exporters.runtime.runtimes import EagerRuntime, full_float32
from deploycli.models.errors import DeployError, EnvironmentUnsuitable, first_line
from deploycli.models.factory import contained
from deploycli.models.sources import IMPORTED

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from deploycli.exporters.bench.candidate import Arrays, BenchOptions, Prepare
    from deploycli.exporters.bundle.bundle import Bundle


def pytorch_candidates(bundle: Bundle, options: BenchOptions) -> Iterator[Candidate]:
    """Return eager and compiled PyTorch: on a GPU where there is one, in FP16 as well; else on the CPU.

    Of an ONNX file that was imported there is no such model.
    """
    if bundle.manifest.spec.family == IMPORTED:
        return
    import torch  # slow

    device = "cuda" if torch.cuda.is_available() else "cpu"
    models = _Models(bundle, options, device)
    for precision in ("fp32", "fp16") if device == "cuda" else ("fp32",):
        for name in ("eager", "compile"):
            yield Candidate(
                name, precision, device, partial(_open, models, precision, options, compiled=name == "compile")
            )


class _Models:
    """Builds the bundle's module once for all that run it, and keeps it while one of them does."""

    def __init__(self, bundle: Bundle, options: BenchOptions, device: str) -> None:
        self.manifest = bundle.manifest
        self.device = device
        self._checkpoint, self._trust = options.checkpoint, options.trust_factory
        self._built: dict[str, EagerRuntime] = {}
        self._users = 0

    @contextmanager
    def use(self, precision: str) -> Iterator[EagerRuntime]:
        """Yield the module on the device, in this precision.

        Raises:
            EnvironmentUnsuitable: PyTorch or the weights are not at hand.
            IntegrityError: the checkpoint is not the recorded file.
        """
        self._users += 1
        try:
            yield self._runtime(precision)
        finally:
            self._users -= 1
            if not self._users:
                self._built.clear()

    def _runtime(self, precision: str) -> EagerRuntime:
        if precision not in self._built:
            choose_reference(
                self.manifest, "eager", self._checkpoint, trust_factory=self._trust
            )  # says what is missing
            # Anew for each precision: a copy of a module need not work.
            module = reference_model(self.manifest, self._checkpoint, trust_factory=self._trust)
            spec = self.manifest.spec
            self._built[precision] = EagerRuntime(
                module, [i.name for i in spec.inputs], spec.outputs, device=self.device, half=precision == "fp16"
            )
        return self._built[precision]


@contextmanager
def _open(models: _Models, precision: str, options: BenchOptions, *, compiled: bool) -> Iterator[Prepare]:
    with ExitStack() as stack:
        runtime = stack.enter_context(models.use(precision))
        import torch

        stack.enter_context(full_float32(models.device))
        run: Callable[..., Any] = runtime.module
        if compiled:
            # Replayed graphs are what a server that cares for latency has, and what TensorRT is timed with.
            graphs = models.device == "cuda" and options.cuda_graph
            run = torch.compile(runtime.module, dynamic=False, mode="reduce-overhead" if graphs else None)
            stack.callback(torch.compiler.reset)  # PyTorch compiles a function anew for a few shapes only
        notes = ("TF32 off",) if models.device == "cuda" and precision == "fp32" else ()
        yield partial(_prepare, runtime, run, models.device, options, notes, compiled=compiled)


def _prepare(
    runtime: EagerRuntime,
    module: Callable[..., Any],
    device: str,
    options: BenchOptions,
    notes: tuple[str, ...],
    inputs: Arrays,
    *,
    compiled: bool,
) -> Prepared:
    import torch

    on_gpu = device == "cuda"
    arguments = runtime.feed(inputs)
    last: list[Any] = []

    def run() -> None:
        with torch.inference_mode():
            last[:] = [module(*arguments)]
        if on_gpu:
            torch.cuda.synchronize()

    try:
        with contained():
            run()  # compiles; and where a first run fails, so would the others
    except DeployError:
        raise
    except Exception as error:  # compilers share no base class
        what, hint = ("torch.compile", "a C++ compiler in PATH, or in CXX") if compiled else ("PyTorch", "")
        raise EnvironmentUnsuitable(f"{what} failed: {_reason(error)}", hint=hint) from error
    return Prepared(
        run,
        lambda: runtime.named(last[0]),
        transfers="excluded" if on_gpu else "none",
        cuda_graph=compiled and on_gpu and options.cuda_graph,
        threads=None if on_gpu else torch.get_num_threads(),
        notes=notes,
    )


def _reason(error: Exception) -> str:
    """Return the line of a long message that tells: Inductor's begin with the name of an exception of its own."""
    cause = error.__cause__ or error.__context__
    inner = first_line(cause) if cause is not None else ""
    return inner if inner and len(inner) < len(first_line(error)) else first_line(error)


@contextmanager
def torch_threads(threads: int | None) -> Iterator[None]:
    """Let PyTorch's operators use so many threads on the CPU for a while; None changes nothing."""
    if threads is None:
        yield
        return
    import torch  # slow

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)
