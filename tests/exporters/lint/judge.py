"""What NVIDIA's own compiler says of a graph: TensorRT for RTX, driven as ``build-trt`` drives it, in a process that is
kept for many graphs. It needs no GPU. A graph may crash it or hang it: that is a verdict, and the next graph gets a
new process.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from deploycli.exporters.runtime.isolated import die_with, what_ended
from deploycli.exporters.target.product import RTX
from deploycli.exporters.target.settings import DEFAULT_BATCH, BuildSettings, ShapeRange
from deploycli.exporters.tensorrt.compilers.rtx import LISTING

if TYPE_CHECKING:
    from collections.abc import Sequence

    import onnx

    from deploycli.exporters.target.targets import Capability

Kind = Literal["accepted", "unparsed", "unbuilt", "crashed", "hung"]

TARGETS: tuple[Capability, ...] = ((8, 6),)

OTHER = (8, 8, 16)
"""Smallest, best and largest size of a dynamic axis that is not the batch."""

LIMIT_S = 60.0
"""A small graph that takes longer hangs, seconds: the slowest that does not takes some five."""


@dataclass(frozen=True)
class Verdict:
    """What became of one graph.

    Attributes:
        kind: ``accepted``: there is an engine; ``unparsed`` and ``unbuilt``: the parser, or the builder, refuses it.
        message: why it is refused, in NVIDIA's words: the parser's errors with their nodes, or the builder's last.
        layers: the builder's list of the engine's layers, see `deploycli.exporters.tensorrt.compilers.rtx`; empty where
            it made none.
    """

    kind: Kind
    message: str = ""
    layers: str = ""

    @property
    def refused(self) -> bool:
        """Whether there is no engine."""
        return self.kind != "accepted"


class Judge:
    """The compiler, in a process of its own, which starts with the first graph; a context manager.

    Args:
        targets: compute capabilities to compile for.
        limit: seconds that one graph may take.
    """

    def __init__(self, targets: Sequence[Capability] = TARGETS, limit: float = LIMIT_S) -> None:
        self._targets = tuple(targets)
        self._limit = limit
        self._child: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Judge:
        return self

    def __exit__(self, *_: object) -> None:
        self._end()

    def __call__(self, model: onnx.ModelProto | bytes) -> Verdict:
        """Return the verdict on a graph without external data.

        Raises:
            RuntimeError: our own code failed.
        """
        if self._child is None:
            self._start()
        self._pipe.send(model if isinstance(model, bytes) else model.SerializeToString())
        if not self._pipe.poll(self._limit):
            self._end()
            return Verdict("hung", f"after {self._limit:g} s")
        try:
            kind, message, layers = self._pipe.recv()
        except (EOFError, OSError):
            return Verdict("crashed", what_ended(self._end()))
        if kind == "failed":
            raise RuntimeError(message)
        return Verdict(kind, message, layers)

    def _start(self) -> None:
        self._pipe, theirs = Pipe()
        arguments = [str(theirs.fileno()), str(os.getpid()), *(f"{major}.{minor}" for major, minor in self._targets)]
        self._child = subprocess.Popen(
            [sys.executable, "-m", __name__, *arguments],
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,  # that there is no driver
        )
        theirs.close()
        if not self._pipe.poll(self._limit) or (problem := self._pipe.recv()):
            self._end()
            raise RuntimeError(f"the judge does not start: {problem}")

    def _end(self) -> int:
        if self._child is None:
            return 0
        self._pipe.close()
        status = self._child.poll()  # how it ended by itself, if it did
        self._child.kill()
        ended, self._child = self._child.wait(), None
        return ended if status is None else status


class _Compiler:
    """The compiler, in the child."""

    def __init__(self, targets: tuple[Capability, ...], folder: Path) -> None:
        from deploycli.exporters.tensorrt import library

        library.use(RTX)
        from deploycli.exporters.tensorrt import build_engine  # it imports TensorRT
        from deploycli.exporters.tensorrt.callbacks import Log

        self._steps, self._log_class = build_engine, Log
        self._targets, self._file = targets, folder / "model.onnx"
        self._monitor = build_engine.make_monitor(lambda _: None)

    def __call__(self, model: bytes) -> Verdict:
        from deploycli.exporters.tensorrt.compilers.rtx import Rtx
        from deploycli.exporters.tensorrt.job import Job
        from deploycli.models.errors import BuildError, DeployError

        self._file.write_bytes(model)
        log, steps, lists = self._log_class(), self._steps, [""]
        log.listen(lambda message: lists.append(message) if message.startswith(LISTING) else None)
        builder = steps.make_builder(log, RTX.title)  # a new one, for it keeps its log
        network = steps.make_network(builder, RTX.title)
        try:
            parser = steps.parse(network, self._file, log, RTX.title)
        except BuildError as error:
            return Verdict("unparsed", "\n".join(line.strip() for line in error.found.splitlines()[1:]) or error.found)
        try:
            settings = BuildSettings(_profile(network))
            compiler = Rtx(Job(self._file, settings, self._file.parent, False, "rtx", self._targets), log)
            compiler.adapt(network)
            config = compiler.configure(builder, self._monitor)
            if settings.profile:
                steps.add_profiles(builder, network, config, settings)
        except DeployError as error:
            return Verdict("unbuilt", error.found)
        plan = builder.build_serialized_network(network, config)
        del parser
        return Verdict("unbuilt", log.last()) if plan is None else Verdict("accepted", layers=lists[-1])


def _profile(network: Any) -> dict[str, ShapeRange]:
    """Return a profile for the inputs; none where all are static, for then it may be left out."""
    inputs = [network.get_input(i) for i in range(network.num_inputs)]
    if not any(-1 in tuple(value.shape) for value in inputs):
        return {}
    batches = {value.get_dimension_name(0) for value in inputs if len(value.shape)}  # one name has one range
    profile = {}
    for value in inputs:
        sizes = [
            (size,) * 3
            if size >= 0
            else OTHER
            if value.get_dimension_name(axis) not in batches and axis
            else DEFAULT_BATCH
            for axis, size in enumerate(tuple(value.shape))
        ]
        low, best, high = (tuple(size[i] for size in sizes) for i in range(3))
        profile[value.name] = ShapeRange(low, best, high)
    return profile


def main(arguments: Sequence[str]) -> None:
    """Be the child: answer until nobody asks any more."""
    descriptor, parent, *targets = arguments
    die_with(int(parent))
    pipe = Connection(int(descriptor))
    with tempfile.TemporaryDirectory() as folder:
        compile_, problem = None, ""
        try:
            numbers = (tuple(map(int, target.split("."))) for target in targets)
            compile_ = _Compiler(tuple((major, minor) for major, minor in numbers), Path(folder))
        except Exception as error:
            problem = f"{type(error).__name__}: {error}"
        pipe.send(problem)
        while compile_ is not None:
            try:
                model = pipe.recv()
            except EOFError:
                break
            try:
                found = compile_(model)
                pipe.send((found.kind, found.message, found.layers))  # not the object: its class is another here
            except Exception as error:
                pipe.send(("failed", f"{type(error).__name__}: {error}", ""))


if __name__ == "__main__":
    main(sys.argv[1:])
