"""NVIDIA's own ONNX parser as a judge of a file: that of TensorRT for RTX is the parser of TensorRT, and needs no GPU.

It runs in a process of its own, which a file may crash, hang or fill: that is told, and nothing else ends with it. It
refuses some operators that TensorRT takes, since TensorRT for RTX ships no library of plugins.
"""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from exporters.isolated import Died, begun
from exporters.tensorrt import library
from exporters.tensorrt.product import RTX
from models.errors import DeployError
from models.memory import available, size

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator
    from pathlib import Path

    from exporters.tensorrt.network import Refusal

TIME_S = 60.0
"""A small file takes a tenth of a second, seconds."""

_BYTES_PER_S = 10e6  # of the file, beyond that; two cores that do something else as well parse ten times as many
_MEMORY_PER_BYTE = 2.0  # of the file: its message, and the weights that are copied from it; external data are mapped


@dataclass(frozen=True)
class Verdict:
    """What the parser says of a file: it takes it, it refuses it, or there is a reason why nothing is known.

    Attributes:
        judge: whose parser, with its version where that is known.
        refusals: its errors, at most `MOST_REFUSALS`; none where it takes the file.
        more: how many errors there are beside them.
        lacking: operators that it refuses since TensorRT for RTX lacks them, and that TensorRT, or a plugin of the
            user's, has: neither they nor what comes after them are judged.
        problem: why there is no verdict; empty where there is one.
    """

    judge: str
    refusals: tuple[Refusal, ...] = ()
    more: int = 0
    lacking: tuple[str, ...] = ()
    problem: str = ""

    @property
    def is_taken(self) -> bool:
        """Whether the parser takes the file."""
        return not (self.refusals or self.lacking or self.problem)

    def excusing(self, operators: Collection[str]) -> Verdict:
        """Return the verdict in which it is no fault of the file that some operators are refused."""
        left = tuple(refusal for refusal in self.refusals if refusal.operator not in operators)
        lacking = {refusal.operator for refusal in self.refusals} & set(operators)
        return replace(self, refusals=left, lacking=tuple(sorted(lacking)))

    def to_json(self) -> dict[str, Any]:
        """Return the verdict as JSON values; ``taken`` is null where there is none."""
        taken = None if self.problem or (self.lacking and not self.refusals) else self.is_taken
        return {**asdict(self), "taken": taken}


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
    from exporters.tensorrt.callbacks import Log  # it imports TensorRT
    from exporters.tensorrt.network import NO_DRIVER, fill, make_builder, make_network

    log = Log()
    log.dropped = NO_DRIVER
    network = make_network(make_builder(log, RTX.title), RTX.title)
    progress("parsing")
    parser, refusals = fill(network, path, log)
    return Verdict(f"{RTX.title} {library.version(RTX)}", refusals, max(0, parser.num_errors - len(refusals)))
