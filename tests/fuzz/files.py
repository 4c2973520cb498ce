"""Damaged ONNX files, bundles and checkpoints through every command: each run ends as documented.

A run is a command on one damaged file: an exit code of the README's table other than 1, no traceback, no control
character of the file's on the terminal, nothing half-written left behind, below 30 s and 2 GB. Every run is a process
of its own, forked from one that has imported everything.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import random
import re
import shutil
import signal
import struct
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import safetensors.torch
import torch
from onnx import TensorProto, numpy_helper

from deploycli.models.registry import register
from deploycli.models.spec import Preprocessing
from deploycli.models.swin import SwinTransformer
from deploycli.models.variants import Variant, spec
from tests.deploycli.conftest import SMALLEST
from tests.models.swins import golden_state

if TYPE_CHECKING:
    from collections.abc import Callable

SECONDS, MEMORY = 30.0, 2 * 2**30
DOCUMENTED = {0, 2, 3, 4, 5, 6, 7, 8}
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
HOSTILE = "\x1b[31mred\x1b[0m\x07\u202e[bold]"

CONFIG = {**SMALLEST, "embed_dim": 32}
"""Of a Swin that is as small as INT8 allows."""

Random = random.Random


register(Variant(spec("swin_fuzzed", "swin", CONFIG), Preprocessing(size=(16, 16))))


# --- what is damaged -------------------------------------------------------------------------------------------------


def any_bytes(r: Random, data: bytes) -> bytes:
    """Flip, cut, insert, repeat or blank a few bytes."""
    content = bytearray(data)
    for _ in range(r.choice((1, 1, 2, 8))):
        at = r.randrange(len(content)) if content else 0
        if r.random() < 0.5:
            at = min(at, r.randrange(400))  # headers are where the meaning is
        size = min(r.choice((1, 1, 4, 64, 1024)), len(content) - at)
        match r.randrange(6):
            case 0 if content:
                content[at] ^= 1 << r.randrange(8)
            case 1:
                content[at : at + size] = r.randbytes(size)
            case 2:
                del content[at : at + size]
            case 3:
                content[at:at] = content[at : at + size]
            case 4:
                content[at : at + size] = bytes(size)
            case _:
                del content[at:]
    return bytes(content)


def odd_number(r: Random) -> int:
    return r.choice((0, -1, -2, 1, 2, 7, 2**31 - 1, 2**31, -(2**31), 2**40, 2**62, 2**63 - 1, -(2**63)))


def onnx_fields(r: Random, data: bytes) -> bytes:
    """Change what an ONNX file says of itself, so that it still is one."""
    model = onnx.ModelProto.FromString(data)
    graph = model.graph
    for _ in range(r.randint(1, 3)):
        node = r.choice(graph.node) if graph.node else graph.node.add()
        tensor = r.choice(graph.initializer) if graph.initializer else graph.initializer.add()
        value = r.choice([*graph.input, *graph.output, *graph.value_info] or [graph.input.add()])
        match r.randrange(18):
            case 0:
                node.op_type = r.choice(("Loop", "If", "Gather", "Reshape", "SequenceAt", "", HOSTILE, "Softmax"))
            case 1 if node.input:
                node.input[r.randrange(len(node.input))] = r.choice((tensor.name, value.name, "", "nowhere", HOSTILE))
            case 2 if node.output:
                node.output[0] = r.choice(("", HOSTILE, value.name, tensor.name))
            case 3:
                del node.input[r.randrange(len(node.input) + 1) :]
            case 4:
                tensor.dims.append(odd_number(r))
            case 5 if tensor.dims:
                tensor.dims[r.randrange(len(tensor.dims))] = odd_number(r)
            case 6:
                tensor.data_type = r.randrange(-1, 30)
            case 7:
                tensor.raw_data = r.randbytes(r.randrange(64))
            case 8:
                tensor.data_location = TensorProto.EXTERNAL
                del tensor.external_data[:]
                place = r.choice(("/etc/passwd", "../../x", "model.onnx", HOSTILE, "", "."))
                for key, text in (("location", place), ("offset", odd_number(r)), ("length", odd_number(r))):
                    tensor.external_data.add(key=key, value=str(text))
            case 9:
                dim = value.type.tensor_type.shape.dim.add()
                dim.dim_value = odd_number(r)
            case 10:
                value.type.tensor_type.elem_type = r.randrange(-1, 30)
            case 11:
                value.ClearField("type")
            case 12:
                value.name = r.choice(("", HOSTILE, tensor.name))
            case 13 if node.attribute:
                attribute = r.choice(node.attribute)
                attribute.i = odd_number(r)
                if attribute.ints:
                    attribute.ints[0] = odd_number(r)
                if r.random() < 0.2:
                    attribute.type = r.randrange(15)
            case 14:
                if model.opset_import:
                    model.opset_import[0].version = odd_number(r)
                model.ir_version = r.choice((model.ir_version, 3, 0, 99))
            case 15:
                graph.node.append(node)
            case 16 if len(tensor.raw_data) >= 8 and tensor.data_type == TensorProto.INT64:
                numbers = numpy_helper.to_array(tensor).copy() if len(tensor.raw_data) < 2**16 else np.zeros(1, int)
                numbers.flat[0] = odd_number(r)
                tensor.raw_data = numbers.astype(np.int64).tobytes()
            case _:
                del graph.node[graph.node[:].index(node)]
    return model.SerializeToString()


ODD_JSON: tuple[Any, ...] = (
    None, True, 0, -1, 1.5, 2**63, 10**400, 1e308, "", "x", "../../../etc/passwd", "/dev/zero", HOSTILE, "\ud800",
    [], {}, [[]], ["x"], {"x": 1}, "a" * 100_000, "0" * 64, "os:system", "\x00",
)  # fmt: skip


def json_fields(r: Random, data: bytes) -> bytes:
    """Replace, drop, add or repeat a field somewhere in a JSON file."""
    root = json.loads(data)
    for _ in range(r.choice((1, 1, 1, 2))):
        places: list[tuple[Any, Any]] = []
        pending = [root]
        while pending:
            holder = pending.pop()
            items = holder.items() if isinstance(holder, dict) else enumerate(holder)
            for key, value in items:
                places.append((holder, key))
                if isinstance(value, dict | list):
                    pending.append(value)
        holder, key = r.choice(places)
        match r.randrange(5):
            case 0 if isinstance(holder, dict):
                del holder[key]
            case 1 if isinstance(holder, dict):
                holder[r.choice(("extra", "", HOSTILE))] = r.choice(ODD_JSON)
            case 2:
                other, name = r.choice(places)
                if (isinstance(other, dict) and name in other) or (isinstance(other, list) and name < len(other)):
                    holder[key] = json.loads(json.dumps(other[name]))
            case _:
                holder[key] = r.choice(ODD_JSON)
    return json.dumps(root).encode("utf-8", "surrogatepass")


def safetensors_header(r: Random, data: bytes) -> bytes:
    """Change what the header of a safetensors file claims."""
    (size,) = struct.unpack("<Q", data[:8])
    header = json_fields(r, data[8 : 8 + size])
    claimed = len(header) if r.random() < 0.7 else max(0, min(odd_number(r), 2**63 - 1))
    return struct.pack("<Q", claimed) + header + data[8 + size :]


def state_dict(r: Random, data: bytes) -> bytes:
    """Save a checkpoint again with other keys, types, nesting or values."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.pth"
        path.write_bytes(data)
        whole = torch.load(path, weights_only=True)
        state = dict(whole["model"])
        key = r.choice(list(state))
        tensor = state[key]
        odd: list[Callable[[], Any]] = [
            lambda: tensor.to(r.choice((torch.float64, torch.float16, torch.bfloat16, torch.int8, torch.bool))),
            lambda: tensor.to(torch.complex64) * 1j,
            lambda: tensor.to(torch.float8_e4m3fn),
            lambda: tensor.to_sparse(),
            lambda: tensor.to("meta"),
            lambda: tensor.double() * 1e300,
            lambda: torch.full_like(tensor, float("nan")),
            lambda: torch.quantize_per_tensor(tensor.float(), 0.1, 0, torch.qint8),
            lambda: torch.empty(0),
            lambda: tensor[None],
            lambda: torch.zeros(1).expand(2 ** r.choice((10, 40, 60))),
            lambda: r.choice((None, 3, "text", b"bytes", [tensor], {key: tensor}, (), HOSTILE)),
        ]
        match r.randrange(6):
            case 0:
                state[r.choice((0, "", HOSTILE, b"key", (1, 2), "module." + key, None, 1.5))] = tensor
            case 1:
                del state[key]
            case 2:
                prefix = r.choice(("model.", "module.", "backbone.", "", "a.b.", HOSTILE))
                state = {prefix + k: v for k, v in state.items()}
            case _:
                state[key] = r.choice(odd)()
        name = r.choice(("model", "model", "state_dict", "module", "ema", 0, HOSTILE))
        others: tuple[Any, ...] = ({"state_dict": state, "state_dict_ema": state}, [state], None, {}, 3)
        saved = r.choice((state, {name: state}, r.choice(others)))
        torch.save(saved, path)
        return path.read_bytes()


def damage(r: Random, path: Path) -> str:
    """Damage a file in place; return how."""
    kinds: list[Callable[[Random, bytes], bytes]] = [any_bytes]
    kinds += {".onnx": [onnx_fields] * 3, ".json": [json_fields] * 4, ".pth": [state_dict] * 2}.get(path.suffix, [])
    kinds += [safetensors_header] * 2 if path.suffix == ".safetensors" else []
    kind = r.choice(kinds)
    try:
        path.write_bytes(kind(r, path.read_bytes()))
    except (ValueError, TypeError, IndexError, RuntimeError, OverflowError, onnx.shape_inference.InferenceError):
        path.write_bytes(any_bytes(r, path.read_bytes()))  # a field that its own format refuses
        return "any_bytes"
    return kind.__name__


# --- what is run -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ended:
    """How a run ended."""

    code: int
    seconds: float  # of the processor, or of the clock where the run was ended for it
    memory: int
    text: str


def forked(arguments: list[str], cwd: Path) -> Ended:
    """Run a command in a forked process, within the limits of time."""
    start = time.perf_counter()
    log = cwd / ".log"
    child = os.fork()
    if child == 0:
        os.setpgid(0, 0)
        out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(out, 1)
        os.dup2(out, 2)
        code = 1
        try:
            os.chdir(cwd)
            sys.argv = ["deploycli", *arguments]
            from deploycli.__main__ import main

            main()
        except SystemExit as error:
            code = error.code if isinstance(error.code, int) else 1
        except BaseException:  # the parent reads it in the log
            import traceback

            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    while True:
        done, status, usage = os.wait4(child, os.WNOHANG)
        if done:
            seconds = usage.ru_utime + usage.ru_stime
            break
        if (seconds := time.perf_counter() - start) > 4 * SECONDS:
            os.killpg(child, signal.SIGKILL)
            _, status, usage = os.wait4(child, 0)
            break
        time.sleep(0.005)
    text = log.read_bytes().decode("utf-8", "backslashreplace")
    log.unlink()
    return Ended(os.waitstatus_to_exitcode(status), seconds, usage.ru_maxrss * 1024, text)


def prepare(folder: Path) -> None:
    """Write the files that are damaged: a bundle of three precisions, two checkpoints, ONNX files of several kinds."""
    state = golden_state(SwinTransformer(**CONFIG))
    torch.save({"model": state}, folder / "weights.pth")
    safetensors.torch.save_file(state, folder / "weights.safetensors")
    for arguments in (
        ["export", "swin_fuzzed", "--checkpoint", "weights.pth", "-o", "artifacts"],
        ["cast", "artifacts/swin_fuzzed"],
        ["quantize", "artifacts/swin_fuzzed", "--allow-random-calibration", "--samples", "2"],
    ):
        ended = forked(arguments, folder)
        assert ended.code == 0, ended.text
    shutil.copy(folder / "artifacts/swin_fuzzed/model.onnx", folder / "model.onnx")
    onnx.save(onnx.load(folder / "model.onnx"), folder / "external.onnx", save_as_external_data=True, size_threshold=0,
              location="external.data")  # fmt: skip
    onnx.save(inner_graphs(), folder / "inner.onnx")


def inner_graphs() -> onnx.ModelProto:
    """An If, a Loop and a local function around a little arithmetic."""
    text = """
        <ir_version: 8, opset_import: ["" : 18, "local" : 1]>
        g (float[N, 4] x, bool c) => (float[N, 4] y)
        <float[4] w = {1.0, 2.0, 3.0, 4.0}, int64 n = {3}>
        {
            a = If (c) <
                then_branch = t () => (float[N, 4] p) { p = Mul (x, w) },
                else_branch = e () => (float[N, 4] q) { q = Add (x, w) }
            >
            b = local.twice (a)
            y = Loop (n, c, b) <
                body = l (int64 i, bool k, float[N, 4] s) => (bool k2, float[N, 4] s2) {
                    k2 = Identity (k)
                    s2 = Relu (s)
                }
            >
        }
        <domain: "local", opset_import: ["" : 18]>
        twice (z) => (r) { r = Add (z, z) }
    """
    model = onnx.parser.parse_model(text)
    onnx.checker.check_model(model)
    return model


ON_FILE = (
    ["optimize", "{}", "-o", "out.onnx"], ["optimize", "{}", "--check", "0", "--dry-run"], ["inspect", "{}"],
    ["lint", "{}"], ["inspect", "{}", "--json"],
)  # fmt: skip
ON_BUNDLE = (
    ["inspect", "{}"], ["inspect", "{}", "--json"], ["verify", "{}", "--batches", "2"],
    ["verify", "{}", "--reference", "golden"], ["cast", "{}"], ["lint", "{}"],
    ["quantize", "{}", "--allow-random-calibration", "--samples", "2"], ["package", "{}", "--triton", "repository"],
    ["bench", "{}", "--only", "ort-cpu", "--rounds", "1", "--warmup", "1", "--batches", "1"],
    ["build-trt", "{}", "--dry-run"],
)  # fmt: skip


def one_run(r: Random, folder: Path, source: Path) -> tuple[str, Ended, list[str]]:
    """Damage one file in a copy of what was prepared, run one command; return what, how it ended, what is wrong."""
    shutil.copytree(source, folder, dirs_exist_ok=True)
    what = r.randrange(10)
    bundle = folder / "artifacts/swin_fuzzed"
    if what < 4:
        victim = folder / r.choice(("model.onnx", "external.onnx", "inner.onnx", "external.data"))
        target = "external.onnx" if victim.name == "external.data" else victim.name
        arguments = [a.format(target) for a in r.choice(ON_FILE)]
    elif what < 8:
        names = sorted(p.name for p in bundle.iterdir() if p.is_file())
        victim = bundle / r.choice(["manifest.json"] * 4 + names)
        arguments = [a.format("artifacts/swin_fuzzed") for a in r.choice(ON_BUNDLE)]
    else:
        victim = folder / r.choice(("weights.pth", "weights.pth", "weights.safetensors"))
        arguments = ["export", "swin_fuzzed", "--checkpoint", victim.name, "-o", "fresh"]
    how = damage(r, victim)
    before = {path.relative_to(folder) for path in folder.rglob("*") if not path.is_dir()}
    ended = forked(arguments, folder)
    faults = []
    if ended.code not in DOCUMENTED:
        faults.append(f"exit {ended.code}")
    if "Traceback (most recent call last)" in ended.text:
        faults.append("traceback")
    if found := CONTROL.search(ended.text):
        faults.append(f"control character {found.group()!r}")
    if ended.seconds > SECONDS:
        faults.append(f"{ended.seconds:.0f} s")
    if ended.memory > MEMORY:
        faults.append(f"{ended.memory / 2**30:.1f} GiB")
    new = {path.relative_to(folder) for path in folder.rglob("*") if not path.is_dir()} - before
    if ended.code not in (0, 5) and (
        left := sorted(str(p) for p in new if p.suffix != ".lock" and "report" not in str(p))
    ):
        faults.append(f"left behind: {left[:4]}")
    return f"{' '.join(arguments)} with {victim.name} damaged by {how}", ended, faults


def main() -> int:
    """Run many, save those that went wrong, print what was counted."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument("--seed", type=int, default=None, help="of the first run; the next ones follow")
    parser.add_argument("--save", type=Path, help="folder for the inputs of the runs that went wrong")
    options = parser.parse_args()
    first = options.seed if options.seed is not None else random.SystemRandom().randrange(2**31)
    print(f"seed {first}", flush=True)
    for module in ("export", "verify", "optimize", "quantize", "lint", "bench.run", "serving.triton"):
        importlib.import_module(f"deploycli.exporters.{module}")
    importlib.import_module("onnxruntime")
    codes: Counter[int] = Counter()
    wrong, slowest, largest = 0, 0.0, 0
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as top:
        source = Path(top) / "source"
        source.mkdir()
        prepare(source)
        for seed in range(first, first + options.count):
            folder = Path(top) / "run"
            what, ended, faults = one_run(random.Random(seed), folder, source)
            codes[ended.code] += 1
            slowest, largest = max(slowest, ended.seconds), max(largest, ended.memory)
            if faults:
                wrong += 1
                last = "\n    ".join(ended.text.strip().splitlines()[-12:])
                print(f"seed {seed}: {'; '.join(faults)}: deploycli {what}\n    {last}", flush=True)
                if options.save:
                    shutil.copytree(folder, options.save / str(seed), dirs_exist_ok=True)
            shutil.rmtree(folder)
            if (seed + 1 - first) % 1000 == 0:
                print(f"{seed + 1 - first} after {time.perf_counter() - start:.0f} s, {wrong} wrong", flush=True)
    print(
        f"{options.count} runs in {time.perf_counter() - start:.0f} s, {wrong} wrong; "
        f"exits {dict(sorted(codes.items()))}; "
        f"slowest {slowest:.1f} s, largest {largest / 2**30:.2f} GiB"
    )
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
