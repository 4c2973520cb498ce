"""Several commands make files of one bundle at the same time: what each of them made is there in the end."""

from __future__ import annotations

import multiprocessing
import shutil
import weakref
from collections.abc import Callable
from contextlib import ExitStack, contextmanager, suppress
from typing import TYPE_CHECKING, Any

import pytest

from deploycli.exporters import derive
from deploycli.exporters.bundle.bundle import Bundle
from deploycli.exporters.cast import cast_bundle
from deploycli.exporters.precision.options import CalibrationData, CastOptions, QuantizeOptions
from deploycli.exporters.quantize import quantize_bundle
from tests.exporters.precision.tiny import make

if TYPE_CHECKING:
    from collections.abc import Iterator
    from multiprocessing.connection import Connection
    from pathlib import Path

    import onnx_ir as ir

COMMANDS: dict[str, Callable[[Path], object]] = {
    "cast": lambda path: cast_bundle(Bundle.open(path), CastOptions("fp16")),
    "quantize": lambda path: quantize_bundle(
        Bundle.open(path), QuantizeOptions(), CalibrationData(random=True, limit=2)
    ),
    "export": lambda path: make(path.parent, path.name),
}


def serve(command: str, path: Path, connection: Connection) -> None:
    """Run a command whenever a number arrives, until none does; answer with the number."""
    with suppress(EOFError):
        while True:
            trial = connection.recv()
            COMMANDS[command](path)
            connection.send(trial)


@contextmanager
def serving(command: str, path: Path) -> Iterator[Connection]:
    """Have a process that runs the command; PyTorch is imported once for all of them, by what they are forked from."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    ours, theirs = context.Pipe()
    process = context.Process(target=serve, args=(command, path, theirs), daemon=True)
    process.start()
    theirs.close()
    with ours:
        yield ours
    process.join(30)
    assert process.exitcode == 0


def together(root: Path, trials: int) -> list[list[str]]:
    """Run cast, quantize and export of one bundle at the same time, each in a process; return what it then holds."""
    held = []
    with ExitStack() as stack:
        workers = [stack.enter_context(serving(name, root / "tiny")) for name in COMMANDS]
        for trial in range(trials + 1):  # in the first one they do not begin together
            shutil.rmtree(root / "tiny", ignore_errors=True)
            make(root)
            for worker in workers:
                worker.send(trial)
            for worker in workers:
                assert worker.poll(60)
                assert worker.recv() == trial
            held.append(sorted(a.file.path for a in Bundle.open(root / "tiny").manifest.artifacts))
    return held[1:]


def test_cast_quantize_and_export_at_the_same_time(tmp_path: Path) -> None:
    assert together(tmp_path, 2) == [["model.fp16.onnx", "model.int8.onnx", "model.onnx"]] * 2
    assert [path.name for path in tmp_path.iterdir()] == ["tiny"]


@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_a_graph_is_gone_when_its_file_is_run(precision: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both at once would not fit where one of them does: weights of several gigabytes, and ONNX Runtime's own."""
    bundle = make(tmp_path)
    graphs, alive = [], []
    load, run = derive.load_model, derive.open_runtime

    def loaded(path: Path) -> ir.Model:
        model = load(path)
        graphs.append(weakref.ref(model.graph))
        return model

    def opened(path: Path) -> Any:
        alive.append([graph() is not None for graph in graphs])
        return run(path)

    monkeypatch.setattr(derive, "load_model", loaded)
    monkeypatch.setattr(derive, "open_runtime", opened)
    if precision == "fp16":
        cast_bundle(bundle, CastOptions())
    else:
        quantize_bundle(bundle, QuantizeOptions(), CalibrationData(random=True, limit=2))
    assert alive == [[False]]
