"""Where the time of an export goes: `deploycli export swin_t`, and the plain torch.onnx.export of timm's Swin-T.

    python -m tests.benchmarks.export_time [--rounds 5] [--threads 1] [--write]

Both are whole processes with random weights, and take turns. Ours also runs the model, rewrites the graph, writes the
bundle to disk and checks the file in ONNX Runtime. On a machine that does other things as well, compare the seconds of
CPU with one thread: threads that wait for one another count their waiting.
"""

import argparse
import builtins
import functools
import importlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.benchmarks.measure import write_block

IMPORTS, REST = "imports", "everything else"

# Phase -> where the function is looked up that does it. What a phase calls of another phase counts there.
OURS = (
    ("building the model", "deploycli.exporters.export:_weighted"),
    ("running it in PyTorch", "deploycli.exporters.export:EagerRuntime.run"),
    ("tracing", "torch.export:export"),
    ("decomposing", "torch.export:ExportedProgram.run_decompositions"),
    ("translating to ONNX", "deploycli.exporters.trace:_translate"),
    ("optimizing", "deploycli.exporters.trace:tidy"),
    ("optimizing", "deploycli.exporters.passes.pipeline:rewrite"),
    ("optimizing", "deploycli.exporters.passes.common.names:name_nodes"),
    ("writing", "deploycli.exporters.export:save_golden"),
    ("writing", "deploycli.exporters.graph.onnx_file:write_model"),
    ("writing", "deploycli.exporters.export:FileRecord.of"),
    ("writing", "deploycli.exporters.bundle.files:_sync_tree"),
    ("checking in ONNX Runtime", "deploycli.exporters.export:_check"),
)
PLAIN = (
    ("building the model", "timm:create_model"),
    ("tracing", "torch.export:export"),
    ("decomposing", "torch.export:ExportedProgram.run_decompositions"),
    ("translating to ONNX", "torch.onnx._internal.exporter._core:_exported_program_to_onnx_program"),
    ("optimizing", "torch.onnx:ONNXProgram.optimize"),
    ("writing", "torch.onnx:ONNXProgram.save"),
)
PHASES = (IMPORTS, *dict.fromkeys(phase for phase, _ in (*OURS, *PLAIN)), REST)


class Clock:
    """Adds up the seconds of phases; the innermost phase is the one that runs."""

    def __init__(self) -> None:
        self.seconds: Counter[str] = Counter()
        self._running = [REST]
        self._since = time.perf_counter()

    def _turn(self) -> None:
        now = time.perf_counter()
        self.seconds[self._running[-1]] += now - self._since
        self._since = now

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count the time of the block for a phase."""
        self._turn()
        self._running.append(name)
        try:
            yield
        finally:
            self._turn()
            self._running.pop()

    def watch(self, name: str, where: str) -> None:
        """Count the calls of ``module:attribute`` for a phase."""
        module, _, path = where.partition(":")
        *outer, attribute = path.split(".")
        owner = functools.reduce(getattr, outer, importlib.import_module(module))
        function: Any = getattr(owner, attribute)

        @functools.wraps(function)
        def timed(*args: object, **kwargs: object) -> object:
            with self.phase(name):
                return function(*args, **kwargs)

        setattr(owner, attribute, timed)

    def watch_imports(self) -> None:
        """Count the time of all imports from here on."""
        plain = builtins.__import__

        def timed(*args: Any, **kwargs: Any) -> object:
            if self._running[-1] == IMPORTS:
                return plain(*args, **kwargs)
            with self.phase(IMPORTS):
                return plain(*args, **kwargs)

        builtins.__import__ = timed


def export_ours(clock: Clock, folder: str, model: str) -> None:
    """Run the command."""
    for phase, where in OURS:
        clock.watch(phase, where)
    main = importlib.import_module("deploycli.__main__").main
    sys.argv = ["deploycli", "export", model, "-o", folder, "--json"]
    try:
        main()
    except SystemExit as end:
        if end.code:
            raise


def export_plain(clock: Clock, folder: str, _model: str) -> None:
    """Do what PyTorch's documentation says."""
    import torch

    from tests.peers import import_timm

    timm = import_timm()
    for phase, where in PLAIN:
        clock.watch(phase, where)
    model = timm.create_model("swin_tiny_patch4_window7_224").eval()
    batch = ({0: torch.export.Dim("batch")},)
    example = (torch.zeros(2, 3, 224, 224),)
    program = torch.onnx.export(
        model, example, dynamo=True, dynamic_shapes=batch, opset_version=20, verbose=False
    )  # fmt: skip
    assert program is not None
    program.save(f"{folder}/plain.onnx")


EXPORTS: dict[str, Callable[[Clock, str, str], None]] = {"ours": export_ours, "plain": export_plain}


@dataclass(frozen=True)
class Run:
    """One process.

    Attributes:
        wall: seconds from its start to its end.
        cpu: seconds of its threads, user and system.
        phases: phase -> seconds.
    """

    wall: float
    cpu: float
    phases: dict[str, float]

    @property
    def without_imports(self) -> float:
        """Seconds inside Python that were spent on anything but imports."""
        return sum(seconds for phase, seconds in self.phases.items() if phase != IMPORTS)


def run(which: str, model: str, threads: int | None) -> Run:
    """Export once, in a process of its own."""
    environment = os.environ if threads is None else {**os.environ, "OMP_NUM_THREADS": str(threads)}
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "phases.json"
        command = [sys.executable, "-m", __spec__.name, "--child", which, folder, str(report), "--model", model]
        start = time.perf_counter()
        child = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        _, status, usage = os.wait4(child.pid, 0)
        wall = time.perf_counter() - start
        child.returncode = os.waitstatus_to_exitcode(status)
        assert child.returncode == 0, f"{' '.join(command)} failed"
        return Run(wall, usage.ru_utime + usage.ru_stime, json.loads(report.read_text("utf-8")))


def _child(which: str, folder: str, report: str, model: str) -> None:
    warnings.simplefilter("ignore")
    clock = Clock()
    clock.watch_imports()
    EXPORTS[which](clock, folder, model)
    with clock.phase(REST):
        pass  # so that the last phase is counted to its end
    Path(report).write_text(json.dumps(clock.seconds), "utf-8")


def table(runs: dict[str, list[Run]]) -> list[str]:
    """Return Markdown: the medians of the phases, and of the ratios of neighbouring runs."""
    lines = ["| seconds, median | plain torch.onnx.export (timm) | deploycli export |", "|---|---|---|"]
    for phase in PHASES:
        cells = [statistics.median(r.phases.get(phase, 0) for r in runs[which]) for which in ("plain", "ours")]
        lines.append(f"| {phase} | {' | '.join(f'{cell:.2f}' if cell else '' for cell in cells)} |")
    outside = [statistics.median(r.wall - sum(r.phases.values()) for r in runs[which]) for which in ("plain", "ours")]
    lines.append(f"| Python's start and end | {outside[0]:.2f} | {outside[1]:.2f} |")
    figures: dict[str, Callable[[Run], float]] = {
        "whole process": lambda r: r.wall,
        "whole process, seconds of CPU": lambda r: r.cpu,
        "without imports, start and end": lambda r: r.without_imports,
    }
    ratios = {}
    for name, figure in figures.items():
        plain, ours = ([figure(r) for r in runs[which]] for which in ("plain", "ours"))
        lines.append(f"| {name} | {statistics.median(plain):.2f} | {statistics.median(ours):.2f} |")
        ratios[name] = statistics.median(b / a for a, b in zip(plain, ours, strict=True))
    told = "; ".join(f"{name} {ratio:.2f}" for name, ratio in ratios.items())
    return [*lines, "", f"Ours over plain, median of {len(runs['ours'])} interleaved pairs: {told}."]


def main() -> None:
    """Measure and print Markdown."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--model", default="swin_t", help="the model that deploycli exports")
    parser.add_argument("--threads", type=int, help="threads of PyTorch's operators")
    parser.add_argument("--write", action="store_true", help="put the table into RESULTS.md")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        _child(*arguments.child, arguments.model)
        return
    runs: dict[str, list[Run]] = {"plain": [], "ours": []}
    for _ in range(arguments.rounds):
        for which, done in runs.items():
            done.append(run(which, arguments.model, arguments.threads))
    lines = table(runs)
    print(*lines, sep="\n")
    if arguments.write:
        write_block("export_time", lines)


if __name__ == "__main__":
    main()
