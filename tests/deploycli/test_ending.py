"""Whatever ends a command: one message, a documented exit code, no traceback."""

from __future__ import annotations

import errno
import os
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch

from deploycli.ending import explain, note_step
from deploycli.models.errors import DeployError, ExportError, UsageError
from deploycli.models.memory import shortage, size
from tests.deploycli.commands import ENVIRONMENT, SCRIPT, Result, assert_refused, files, run
from tests.exporters.bundle.bundles import make

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.deploycli.conftest import Command

LONG = "n" * 300

FACTORIES = """
import sys
import torch

class Net(torch.nn.Linear):
    def __init__(self, ends=None):
        super().__init__(8, 4)
        self.ends = ends

    def forward(self, x):
        if self.ends is not None and x.shape[0] >= self.ends[0]:
            self.ends[1]()
        return super().forward(x)

def fails(): raise OSError(28, "No space left on device")
def asks(): raise KeyboardInterrupt
class Stop(BaseException): pass
def stops(): raise Stop("enough")
def lazy(): return torch.nn.Sequential(torch.nn.LazyLinear(4))
def exits(): sys.exit(0)
def exits_with_text(): sys.exit("no licence")
def zeros():
    net = Net()
    torch.nn.init.zeros_(net.weight), torch.nn.init.zeros_(net.bias)
    return net
def huge(): return torch.zeros(2 ** 50)
def forward_stops(): return Net((0, stops))
def forward_exits(): return Net((0, sys.exit))
def only_small_batches(): return Net((5, sys.exit))
def forward_fails(): return Net((5, fails))
def forward_is_huge(): return Net((0, huge))
def samples(): sys.exit(0)
"""


@pytest.fixture
def factories(tmp_path: Path) -> Path:
    path = tmp_path / "mine.py"
    path.write_text(FACTORIES)
    return path


@pytest.mark.parametrize(
    ("factory", "code", "parts"),
    [
        ("exits", 2, ["mine.py:exits could not be made", "it called sys.exit(0)", "mine.py:20"]),
        ("exits_with_text", 2, ["sys.exit('no licence')", "mine.py:21"]),
        ("stops", 2, ["mine.py:stops could not be made", "raised Stop, which is no Exception: enough", "mine.py:18"]),
        ("forward_stops", 2, ["does not run on x:2x8", "raised Stop"]),
        ("lazy", 2, ["shapes when it first runs (2): 0.weight, 0.bias"]),
        ("asks", 2, ["ended the process: KeyboardInterrupt"]),
        ("fails", 2, ["mine.py:fails could not be made: OSError: [Errno 28]"]),
        ("forward_exits", 2, ["does not run on x:2x8", "it called sys.exit(None)"]),
        (
            "only_small_batches",
            3,
            ["Net does not run on x:8x8 float32: Exited: it called sys.exit(None)", "mine.py:12"],
        ),
        ("zeros", 3, ["the model itself answers zero everywhere", "'logits'"]),
        ("forward_fails", 3, ["Net does not run on x:8x8 float32: OSError: [Errno 28]"]),
        ("huge", 7, ["not enough memory for 4.0 PiB", "mine.py:huge"]),
        ("forward_is_huge", 7, ["not enough memory for 4.0 PiB"]),
    ],
)
def test_what_the_code_of_a_model_may_do(
    factories: Path, deploycli: Command, tmp_path: Path, factory: str, code: int, parts: list[str]
) -> None:
    assert_refused(deploycli("export", f"mine.py:{factory}", "--input", "x:2x8"), code, *parts)
    assert not (tmp_path / "artifacts").exists()


def test_samples_that_end_the_process(factories: Path, deploycli: Command, tmp_path: Path) -> None:
    make(tmp_path / "artifacts")
    result = deploycli("cast", "linear", "--calibrate", "mine.py:samples")
    assert_refused(result, 2, "mine.py:samples gave no samples", "sys.exit(0)")


def test_a_module_that_ends_the_process_when_it_is_imported(deploycli: Command, tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text("import sys\nsys.exit(0)\n")
    assert_refused(deploycli("export", "script.py:main"), 2, "script.py:main could not be made", "sys.exit(0)")


# --- names


@pytest.mark.parametrize(
    "arguments",
    [
        ("export", "swin_t", "--name", LONG),
        ("export", "swin_t", "-o", LONG),
        ("export", "swin_t", "--checkpoint", LONG),
        ("export", f"{LONG}.py:make"),
        ("inspect", LONG),
        ("inspect", f"{LONG}.onnx"),
        ("lint", f"{LONG}.onnx"),
        ("optimize", f"{LONG}.onnx", "--dry-run"),
        ("verify", LONG),
        ("verify", "-o", LONG),
        ("cast", LONG),
        ("bench", LONG),
        ("package", LONG, "--triton", "models"),
    ],
)
def test_names_that_are_too_long(deploycli: Command, tmp_path: Path, arguments: tuple[str, ...]) -> None:
    assert_refused(deploycli(*arguments), 2)
    assert files(tmp_path) == {}


@pytest.mark.parametrize("letter", ["n", "é", "漢"])
def test_the_longest_name_that_there_may_be(deploycli: Command, tmp_path: Path, letter: str) -> None:
    make(tmp_path)
    name = letter * ((255 - len(".onnx")) // len(letter.encode())) + ".onnx"
    assert deploycli("optimize", "linear/model.onnx", "-o", name).code == 0
    assert [path.name for path in tmp_path.iterdir() if path.name != "linear"] == [name]


def test_a_name_that_is_not_utf_8(deploycli: Command, tmp_path: Path) -> None:
    make(tmp_path)
    result = deploycli("optimize", "linear/model.onnx", "-o", os.fsdecode(b"\xff.onnx"))
    assert_refused(result, 2, "no name in UTF-8")
    assert [path.name for path in tmp_path.iterdir()] == ["linear"]


@pytest.mark.parametrize(
    "environment",
    [
        {"PYTHONIOENCODING": "ascii"},
        {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"},
    ],
)
def test_a_terminal_without_the_letters_of_a_path(tmp_path: Path, environment: dict[str, str]) -> None:
    make(tmp_path / "bündel")
    done = run("inspect", "linear", "-o", "bündel", cwd=tmp_path, **environment)
    assert (done.code, done.err) == (0, "")
    assert "b\\xfcndel/linear" in done.out or "b\\udcc3\\udcbcndel/linear" in done.out
    assert_refused(run("inspect", "größe.onnx", cwd=tmp_path, **environment), 2, "there is no file gr\\")


# --- streams


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no device that is always full")
@pytest.mark.parametrize("line", ["list", "list --json", "--help", "--version", "inspect linear"])
def test_a_full_device_behind_stdout(tmp_path: Path, line: str) -> None:
    make(tmp_path / "artifacts")
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [SCRIPT, *line.split()], cwd=tmp_path, env=ENVIRONMENT, stdout=full, stderr=subprocess.PIPE, check=False
        )
    assert_refused(
        Result(done.returncode, "", done.stderr.decode()), 7, "could not be written to stdout: No space left on device"
    )


@pytest.mark.parametrize("line", ["list", "list --json", "--help", "inspect linear", "lint linear"])
def test_a_reader_that_has_left(tmp_path: Path, line: str) -> None:
    """As head does: no fault, and the exit code is the command's own."""
    make(tmp_path / "artifacts")
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as left:
        done = subprocess.run(
            [SCRIPT, *line.split()], cwd=tmp_path, env=ENVIRONMENT, stdout=left, stderr=subprocess.PIPE, check=False
        )
    assert (done.returncode, done.stderr) == (0, b"")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no device that is always full")
def test_nobody_to_tell(tmp_path: Path) -> None:
    with Path("/dev/full").open("w") as full:
        done = subprocess.run([SCRIPT, "inspect", "absent"], cwd=tmp_path, env=ENVIRONMENT, stderr=full, check=False)
    assert done.returncode == 2


# --- memory


def _chained() -> None:
    try:
        np.zeros((2**20, 2**30))
    except MemoryError as error:
        raise ExportError("it cannot be traced") from error


@pytest.mark.parametrize(
    ("ask", "told"),
    [
        (lambda: np.zeros((2**20, 2**30)), "8.00 PiB for an array with shape (1048576, 1073741824)"),
        (lambda: torch.zeros(2**45), "128.0 TiB"),
        (lambda: torch.zeros(2**40, 2**40), ""),
        (lambda: bytearray(2**62), ""),
        (_chained, "8.00 PiB"),
    ],
)
def test_memory_that_is_asked_for_in_vain(ask: Callable[[], object], told: str) -> None:
    note_step("tracing")
    with pytest.raises((MemoryError, RuntimeError, DeployError)) as caught:
        ask()
    found = explain(caught.value)
    assert found is not None
    assert found.exit_code == 7
    assert found.found.startswith(f"there is not enough memory{f' for {told}' if told else ''}")
    assert "while tracing" in found.found


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("bfc_arena.cc Failed to allocate memory for requested buffer of size 17179869184", "16.0 GiB"),
        ("std::bad_alloc", ""),
        ("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has 1 GiB", "2.00 GiB"),
        ("not enough memory: you tried to allocate 4096 bytes.", "4.0 KiB"),
        ("Error parsing message with type 'onnx.ModelProto': Arena alloc failed", ""),
        ("a table of allocated seats", None),
    ],
)
def test_words_of_several_libraries(text: str, told: str | None) -> None:
    assert shortage(RuntimeError(text)) == told


def test_memory_that_ends_is_no_fault_of_an_artifact(
    deploycli: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from deploycli.exporters.runtime.runtimes import OrtRuntime

    def run_out(self: OrtRuntime, inputs: object) -> None:
        raise ExportError("ONNX Runtime failed") from RuntimeError(
            "Failed to allocate memory for requested buffer of size 1024"
        )

    make(tmp_path / "artifacts")
    monkeypatch.setattr(OrtRuntime, "run", run_out)
    result = deploycli("verify", "--reference", "golden")
    assert_refused(result, 7, "not enough memory for 1.0 KiB", "ONNX Runtime failed")
    assert not (tmp_path / "artifacts/linear/reports").exists()


def test_what_led_to_an_error_counts_only_where_it_did() -> None:
    def another() -> None:
        try:
            raise MemoryError
        except MemoryError:
            raise UsageError("another thing") from None

    with pytest.raises(UsageError) as caught:
        another()
    assert shortage(caught.value) is None


def test_sizes() -> None:
    assert [size(n) for n in (0, 1023, 1536, 2**30)] == ["0 bytes", "1023 bytes", "1.5 KiB", "1.0 GiB"]
    assert size(2**70) == "1024.0 EiB"


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG), LONG), 2),
        (PermissionError(errno.EACCES, "Permission denied", "/etc/shadow"), 7),
        (OSError("short write"), 7),
        (SystemExit(0), 2),
        (UsageError("no"), 2),
    ],
)
def test_codes(error: BaseException, code: int) -> None:
    found = explain(error)
    assert found is not None
    assert found.exit_code == code


def test_a_bug_stays_one() -> None:
    assert explain(KeyError("bug")) is None
