"""Several commands make files of one bundle at the same time: what each of them made is there in the end."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import weakref
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from deploycli.exporters import derive
from deploycli.exporters.bundle.bundle import Bundle
from deploycli.exporters.cast import cast_bundle
from deploycli.exporters.precision.options import CalibrationData, CastOptions, QuantizeOptions
from deploycli.exporters.quantize import quantize_bundle
from tests.exporters.precision.tiny import make

if TYPE_CHECKING:
    import onnx_ir as ir

COMMANDS = """
import sys
from pathlib import Path
from deploycli.exporters.bundle.bundle import Bundle
from deploycli.exporters.quantize import quantize_bundle
from deploycli.exporters.precision.options import CalibrationData, QuantizeOptions, CastOptions
from deploycli.exporters.cast import cast_bundle
from tests.exporters.precision.tiny import make
path = Path(sys.argv[2])
commands = {
    "cast": lambda: cast_bundle(Bundle.open(path), CastOptions("fp16")),
    "quantize": lambda: quantize_bundle(Bundle.open(path), QuantizeOptions(), CalibrationData(random=True, limit=2)),
    "export": lambda: make(path.parent, path.name),
}
for line in sys.stdin:
    commands[sys.argv[1]]()
    print(line, end="", flush=True)
"""


def start(command: str, bundle: Path) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    pipe = subprocess.PIPE
    line = [sys.executable, "-c", COMMANDS, command, str(bundle)]
    return subprocess.Popen(line, env=environment, text=True, stdin=pipe, stdout=pipe)


def together(root: Path, trials: int) -> list[list[str]]:
    """Run cast, quantize and export of one bundle at the same time, each in a process; return what it then holds."""
    held = []
    with ExitStack() as stack:
        names = ("cast", "quantize", "export")
        workers = [stack.enter_context(start(name, root / "tiny")) for name in names]
        for trial in range(trials + 1):  # the first one imports
            shutil.rmtree(root / "tiny", ignore_errors=True)
            make(root)
            for worker in workers:
                assert worker.stdin is not None
                worker.stdin.write(f"{trial}\n")
                worker.stdin.flush()
            assert [worker.stdout.readline() for worker in workers if worker.stdout] == [f"{trial}\n"] * 3
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
