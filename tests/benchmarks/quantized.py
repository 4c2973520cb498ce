"""INT8 and FP16 of Swin-T, ViT-B/16 and CrossFormer-S beside other quantisers: cosine, Q/DQ count, size, CPU speed.

python -m tests.benchmarks.quantized [--models swin_t,vit_b_16,crossformer_s] [--modelopt PYTHON] [--rounds 9] [--write]

The weights are random, by the rule of tests/golden: no bias and no table is zero. The data is seeded noise: 8 samples
to calibrate with, 8 others to compare on. --modelopt names the interpreter of an environment that has
nvidia-modelopt[onnx]. OpenVINO takes part in the timing where it is installed.
"""

import argparse
import os
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType, quantize_static

from deploycli.exporters.bundle.bundle import Bundle
from deploycli.exporters.cast import cast_bundle
from deploycli.exporters.export import ExportOptions, export
from deploycli.exporters.lint import lint
from deploycli.exporters.precision.methods import Method
from deploycli.exporters.precision.options import SENSITIVE, CalibrationData, CastOptions, QuantizeOptions
from deploycli.exporters.precision.simulate import open_runtime
from deploycli.exporters.quantize import quantize_bundle
from deploycli.models.build import build
from deploycli.models.registry import resolve
from tests.benchmarks.measure import Printed, interleaved, runners, write_block
from tests.calibration import Batches
from tests.weights import golden_weight

SAMPLES = 8
CALIBRATION = np.random.RandomState(0).standard_normal((SAMPLES, 3, 224, 224)).astype(np.float32)
HELD_OUT = np.random.RandomState(7).standard_normal((SAMPLES, 3, 224, 224)).astype(np.float32)


def exported(name: str, root: Path) -> Bundle:
    """Export a model with golden weights."""
    module = build(resolve(name).spec, seed=0)
    state = {key: torch.from_numpy(golden_weight(key, tuple(p.shape))) for key, p in module.named_parameters()}
    torch.save({"model": state}, root / f"{name}.pth")
    return export(ExportOptions(name, root, checkpoint=root / f"{name}.pth"))


def ours(bundle: Bundle, root: Path) -> Iterator[tuple[str, Path]]:
    """Yield the FP16 graph, the INT8 graphs of every scheme in FP16, and the default one in FP32."""
    path = cast_bundle(bundle, CastOptions()).bundle.path / "model.fp16.onnx"
    yield "deploycli, FP16", path.rename(root / "fp16.onnx")
    settings = {
        "deploycli, auto (default)": QuantizeOptions(),
        "deploycli, gemm": QuantizeOptions(scheme="gemm"),
        "deploycli, gemm, max": QuantizeOptions(scheme="gemm", method=Method.of("max")),
        "deploycli, gemm, FP32 around": QuantizeOptions(scheme="gemm", around=None),
        "deploycli, gemm, sensitive stages in FP16": QuantizeOptions(scheme="gemm", high_precision=SENSITIVE),
        "deploycli, attention": QuantizeOptions(scheme="attention"),
        "deploycli, full": QuantizeOptions(scheme="full"),
    }
    for i, (label, quantization) in enumerate(settings.items()):
        quantize_bundle(bundle, quantization, CalibrationData(list(CALIBRATION)))
        yield label, (bundle.path / "model.int8.onnx").rename(root / f"ours{i}.onnx")


def onnxruntimes(source: Path, root: Path) -> Iterator[tuple[str, Path]]:
    """Yield what ONNX Runtime's own quantiser makes of the same graph."""
    products = ["MatMul", "Gemm"]
    symmetric = {"ActivationSymmetric": True, "WeightSymmetric": True}
    settings: dict[str, dict[str, Any]] = {
        "ONNX Runtime, every MatMul and Gemm": {"op_types_to_quantize": products},
        "ONNX Runtime, the same, INT8 symmetric per channel": {
            "op_types_to_quantize": products,
            "per_channel": True,
            "activation_type": QuantType.QInt8,
            "extra_options": symmetric,
        },
        "ONNX Runtime, every operator it can": {},
    }
    for i, (label, options) in enumerate(settings.items()):
        path = root / f"onnxruntime{i}.onnx"
        quantize_static(
            source,
            path,
            Batches(np.split(CALIBRATION, SAMPLES)),
            quant_format=QuantFormat.QDQ,
            calibrate_method=CalibrationMethod.MinMax,
            **options,
        )
        yield label, path


def modelopts(python: str, source: Path, root: Path) -> Iterator[tuple[str, Path]]:
    """Yield what NVIDIA's Model Optimizer makes of the same graph, in its own environment."""
    np.save(root / "calibration.npy", CALIBRATION)
    for method in ("max", "entropy"):
        path = root / f"modelopt_{method}.onnx"
        command = [python, "-m", "modelopt.onnx.quantization", "--onnx_path", str(source), "--output_path", str(path)]
        command += ["--quantize_mode", "int8", "--calibration_method", method, "--calibration_eps", "cpu"]
        command += ["--calibration_data_path", str(root / "calibration.npy"), "--high_precision_dtype", "fp16"]
        subprocess.run(command, check=True, capture_output=True, cwd=root)
        yield f"Model Optimizer, {method}", path


def cosine(path: Path, truth: np.ndarray[Any, Any]) -> float:
    """Return the lowest cosine of any held-out sample's logits."""
    with open_runtime(path) as runtime:
        found = np.concatenate([runtime.run({"images": HELD_OUT[i : i + 1]})["logits"] for i in range(SAMPLES)]).astype(
            np.float64
        )
    return float(((truth * found).sum(1) / np.linalg.norm(truth, axis=1) / np.linalg.norm(found, axis=1)).min())


def counts(path: Path) -> tuple[int, int]:
    """Return the number of QuantizeLinear and of DequantizeLinear nodes."""
    ops = [node.op_type for node in onnx.load(path, load_external_data=False).graph.node]
    return ops.count("QuantizeLinear"), ops.count("DequantizeLinear")


def show_accuracy(name: str, bundle: Bundle, root: Path, modelopt: str | None, table: Printed) -> dict[str, Path]:
    """Print the comparison of one model; return the files."""
    source = bundle.path / "model.onnx"
    with open_runtime(source) as runtime:
        truth = runtime.run({"images": HELD_OUT})["logits"].astype(np.float64)
    makers = [ours(bundle, root), onnxruntimes(source, root)]
    if modelopt is not None:
        makers.append(modelopts(modelopt, source, root))
    table.line(f"| {name} | cosine | Q / DQ | size of FP32 | TensorRT lint errors |\n|---|---|---|---|---|")
    files = {}
    for label, path in (pair for maker in makers for pair in maker):
        files[label] = path
        quantize, dequantize = counts(path)
        size, errors = path.stat().st_size / source.stat().st_size, len(lint(path).errors)
        table.line(f"| {label} | {cosine(path, truth):.5f} | {quantize} / {dequantize} | {size:.2f} | {errors} |")
    return files


def show_speed(name: str, files: dict[str, Path], rounds: int) -> list[str]:
    """Return a table of the speed of FP32 and INT8, all interleaved at each batch."""
    rows: dict[str, list[str]] = {}
    for batch in (1, 8):
        runs = {
            f"{label} in {runtime}": make(path, batch)
            for label, path in files.items()
            for runtime, make in runners().items()
        }
        seconds = interleaved(runs, rounds)
        base = next(iter(seconds.values()))
        for run, value in seconds.items():
            rows.setdefault(run, []).append(f"{base / value:.2f}")
    head = [f"| {name}, times the speed of the first row | batch 1 | batch 8 |", "|---|---|---|"]
    return head + [f"| {run} | {' | '.join(speeds)} |" for run, speeds in rows.items()]


def main() -> None:
    """Measure and print Markdown."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", default="swin_t,vit_b_16,crossformer_s")
    parser.add_argument("--modelopt", help="Python interpreter of an environment with nvidia-modelopt[onnx]")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--write", action="store_true", help="put the table into RESULTS.md")
    arguments = parser.parse_args()
    table, speeds = Printed(), list[str]()
    for name in arguments.models.split(","):
        with tempfile.TemporaryDirectory() as folder:
            root = Path(folder)
            bundle = exported(name, root)
            files = show_accuracy(name, bundle, root, arguments.modelopt, table)
            table.line("")
            timed = {"FP32": bundle.path / "model.onnx", "INT8": files["deploycli, gemm, FP32 around"]}
            if name == "swin_t":
                speeds = show_speed(name, timed, arguments.rounds)
    if speeds:
        how = "everything interleaved in one run; the INT8 graph has FP32 around it"
        table.line(f"Speed on {os.cpu_count()} cores of a CPU, {how}:\n")
        table.line("\n".join(speeds))
    if arguments.write:
        write_block("quantized", table)


if __name__ == "__main__":
    main()
