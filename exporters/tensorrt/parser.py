"""NVIDIA's own ONNX parser: what it reads into an empty network of either product, or why it refuses the file.

As a judge of a file (`judging`) it is that of TensorRT for RTX, which is the parser of TensorRT and needs no GPU. It
runs in a process of its own, which a file may crash, hang or fill: that is told, and nothing else ends with it. It
refuses some operators that TensorRT takes, since TensorRT for RTX ships no library of plugins.

`make_builder`, `make_network` and `fill` import TensorRT: first `deploycli.exporters.tensorrt.library.use`, in a
process that serves nothing else. What fails there tells so by what it returns, and not by an exception.

Source: onnx-tensorrt, ModelImporter.cpp, onnxOpImporters.cpp and onnxOpCheckers.cpp, as of TensorRT for RTX 1.7.1.
"""

from __future__ import annotations

import re
from contextlib import contextmanager
from typing import TYPE_CHECKING

from deploycli.exporters.runtime.isolated import Died, begun
from deploycli.exporters.target.product import RTX
from deploycli.exporters.target.verdict import MOST_REFUSALS, Refusal, Verdict
from deploycli.exporters.tensorrt import library
from deploycli.models.errors import BuildError, DeployError, EnvironmentUnsuitable, first_line
from deploycli.models.memory import available, size

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    import tensorrt as trt

    from deploycli.exporters.tensorrt.callbacks import Log


TIME_S = 60.0
"""A small file takes a tenth of a second, seconds."""

_BYTES_PER_S = 10e6  # of the file, beyond that; two cores that do something else as well parse ten times as many
_MEMORY_PER_BYTE = 2.0  # of the file: its message, and the weights that are copied from it; external data are mapped


@contextmanager
def judging(path: Path, *, timeout: float | None = None) -> Iterator[Callable[[], Verdict]]:
    """Let the parser of TensorRT for RTX begin to read a file; yield what waits for its verdict.

    The parser works while this process does something else, and has ended when the block ends.

    Args:
        path: the file; its external data lie beside it.
        timeout: seconds that the parser may take; by default what its size allows for.

    Raises:
        EnvironmentUnsuitable: no process can be started.
    """
    length = path.stat().st_size if path.is_file() else 0
    left, needed = available(), int(length * _MEMORY_PER_BYTE)
    if left is not None and needed > left:
        problem = f"there is not enough memory: it takes some {size(needed)}, and {size(left)} are left"
        yield lambda: Verdict(RTX.title, problem=problem)
        return
    with begun(_judge, path, timeout=timeout or TIME_S + length / _BYTES_PER_S) as result:
        yield lambda: _verdict(result)


def judge(path: Path, *, timeout: float | None = None) -> Verdict:
    """Return what the parser of TensorRT for RTX says of a file; see `judging`."""
    with judging(path, timeout=timeout) as verdict:
        return verdict()


def _verdict(result: Callable[[], Verdict]) -> Verdict:
    """Return the verdict, or why there is none, in words."""
    try:
        return result()
    except DeployError as error:  # the library is not there, or broken
        return Verdict(RTX.title, problem=error.found)
    except Died as end:
        if end.shortage is not None:
            asked = f" for {end.shortage}" if end.shortage else ""
            return Verdict(RTX.title, problem=f"there was not enough memory{asked} while {end.step or 'starting'}")
        return Verdict(RTX.title, problem=f"it {end.reason}, while {end.step or 'starting'}")


def _judge(path: Path, *, progress: Callable[[str], None]) -> Verdict:
    """Parse a file, in the child."""
    progress(f"loading {RTX.title}")
    library.use(RTX)
    from deploycli.exporters.tensorrt.callbacks import Log  # it imports TensorRT

    log = Log()
    log.dropped = NO_DRIVER
    network = make_network(make_builder(log, RTX.title), RTX.title)
    progress("parsing")
    parser, refusals = fill(network, path, log)
    return Verdict(f"{RTX.title} {library.version(RTX)}", refusals, max(0, parser.num_errors - len(refusals)))


NO_DRIVER = re.compile(r"cudaError 35\b|CUDA driver version is insufficient|cudaErrorInsufficientDriver")
"""What most messages are followed by where there is no driver; it tells nothing, for none is needed."""

_MOST_WORDS = 600  # characters of one refusal

_READING = re.compile(r"(?:Static check for parsing|Parsing) node: (.*) \[(\w+)\]\Z", re.DOTALL)
_SOURCE_LINE = re.compile(r"\.? In \w+ at /\S+:\d+(?=\))")
_NO_WORDS = ("", "false")


def make_builder(log: Log, title: str) -> trt.Builder:
    """Return a builder.

    Raises:
        EnvironmentUnsuitable: TensorRT does not start on this machine.
    """
    import tensorrt as trt

    try:
        return trt.Builder(log)
    except TypeError as error:  # pybind11's "factory function returned nullptr"
        raise EnvironmentUnsuitable(
            f"{title} does not start: {log.last() or first_line(error)}",
            expected="a GPU and a driver that it supports, with free memory",
            hint="nvidia-smi",
        ) from error


def make_network(builder: trt.Builder, title: str) -> trt.INetworkDefinition:
    """Return an empty, strongly typed network.

    Raises:
        BuildError: TensorRT makes none.
    """
    import tensorrt as trt

    # The flag's number is 1 in TensorRT 10 and 0 in 11, where all networks are strongly typed.
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    if network is None:
        raise BuildError(f"{title} makes no strongly typed network")
    return network


def fill(network: trt.INetworkDefinition, onnx: Path, log: Log) -> tuple[trt.OnnxParser, tuple[Refusal, ...]]:
    """Read an ONNX file into an empty network, in a process that has imported TensorRT.

    Returns:
        The parser, which must outlive the network, and why it refuses the file, at most `MOST_REFUSALS` reasons. That
        a file holds no graph is one of them, though the parser takes it.
    """
    import tensorrt as trt

    parser, read = trt.OnnxParser(network, log), _Read()
    log.listen(read.hear)
    if not parser.parse_from_file(str(onnx)):  # from a file, so that external data is found
        count = min(parser.num_errors, MOST_REFUSALS)
        errors = tuple(_refusal(parser.get_error(place), read) for place in range(count))
        return parser, errors or (Refusal("", -1, "", log.last() or "it does not say why"),)
    if not network.num_outputs:
        found = f"it holds no graph: the parser reads {network.num_layers} layers and no output of it"
        return parser, (Refusal("", -1, "", found),)
    return parser, ()


class _Read:
    """Which node the parser is reading, as its verbose messages tell."""

    def __init__(self) -> None:
        self.node = self.operator = ""

    def hear(self, message: str) -> None:
        if found := _READING.match(message):
            self.node, self.operator = found.groups()


def _refusal(error: trt.ParserError | None, read: _Read) -> Refusal:
    if error is None:
        return Refusal("", -1, "", "an error that TensorRT does not describe")
    name, operator, words = error.node_name(), error.node_operator(), error.desc()
    lines = [line for line in words.removeprefix(f"Invalid Node - {name}\n").splitlines() if not NO_DRIVER.search(line)]
    text = _SOURCE_LINE.sub("", " ".join(" ".join(lines).split()))
    if not operator and error.func().startswith("import"):  # an operator's importer, which leaves it to the log
        name, operator = read.node, read.operator
    return Refusal(
        node=name,
        index=error.node(),
        operator=operator,
        message="there is no form of it that is taken" if text in _NO_WORDS else text[:_MOST_WORDS],
        code=error.code().name,
        inside=tuple(error.local_function_stack()),
    )
