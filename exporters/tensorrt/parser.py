"""NVIDIA's own ONNX parser as a judge of a file: that of TensorRT for RTX is the parser of TensorRT, and needs no GPU.

It runs in a process of its own, which a file may crash, hang or fill: that is told, and nothing else ends with it. It
refuses some operators that TensorRT takes, since TensorRT for RTX ships no library of plugins.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

from deploycli.exporters.runtime.isolated import Died, begun
from deploycli.exporters.target.product import RTX
from deploycli.exporters.target.verdict import Verdict
from deploycli.exporters.tensorrt import library
from deploycli.models.errors import DeployError
from deploycli.models.memory import available, size

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path


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
    from deploycli.exporters.tensorrt.network import NO_DRIVER, fill, make_builder, make_network

    log = Log()
    log.dropped = NO_DRIVER
    network = make_network(make_builder(log, RTX.title), RTX.title)
    progress("parsing")
    parser, refusals = fill(network, path, log)
    return Verdict(f"{RTX.title} {library.version(RTX)}", refusals, max(0, parser.num_errors - len(refusals)))
