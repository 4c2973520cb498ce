"""Ours beside what else makes an ONNX file of a model: launches and bytes that NVIDIA's compiler needs, in FP16.

    python -m tests.benchmarks.rivals [--only REGEX] [--gpu 8.9] [--simplifier PYTHON] [--modelopt PYTHON] [--write]

Models are timm's, with weights by the rule of tests/golden: the compiler leaves out biases that are zero. `plain` is
`torch.onnx.export(dynamo=True)`; `OnnxSlim` and `onnxsim` simplify that file, `AutoCast` (of ModelOpt) types it, `ours`
is `deploycli optimize` of it. All but AutoCast's are typed by the same cast, with the defaults of `deploycli cast`.
`--simplifier` and `--modelopt` name interpreters that have onnxsim and nvidia-modelopt[onnx]; what is not asked for is
not measured.

Each is compiled for batch 8, for batch 1 and for the profile 1:8:32 (whose bytes are not known, as they have no one
size). Each result is kept at once in build/rivals.json, and an interrupted run goes on where it was. Ratios are to the
better of `plain` and `OnnxSlim`; below the table stands their geometric mean.
"""

import argparse
import math
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import onnx_ir as ir

from deploycli.exporters.bundle.engine import KernelTotals
from deploycli.exporters.precision.insert_casts import cast
from deploycli.exporters.precision.policy import REDUCED_TYPES, Policy
from deploycli.exporters.target.settings import BuildSettings, ShapeRange
from deploycli.exporters.target.targets import Capability
from deploycli.exporters.tensorrt.traffic import compiled as read_compiled
from deploycli.models.codec import load
from deploycli.models.errors import DeployError
from tests.benchmarks.engines import DEPLOYCLI, Failed, run, sources
from tests.benchmarks.measure import save, write_block

RESULTS = Path(__file__).parents[2] / "build" / "rivals.json"

MODELS = (
    "vit_small_patch16_224",
    "deit_small_distilled_patch16_224",
    "vit_small_patch14_dinov2",
    "vit_small_patch16_dinov3",
    "eva02_small_patch14_224",
    "swin_tiny_patch4_window7_224",
    "swinv2_tiny_window8_256",
    "cait_xxs24_224",
    "crossvit_small_240",
    "davit_tiny",
    "maxvit_tiny_tf_224",
    "pvt_v2_b1",
    "xcit_tiny_12_p16_224",
    "coat_lite_small",
    "levit_256",
    "mobilevit_s",
    "convnext_tiny",
    "gcvit_xxtiny",
    "pit_s_224",
    "tnt_s_patch16_224",
    "nest_tiny",
    "deit3_small_patch16_224",
    "vit_relpos_small_patch16_224",
    "convit_tiny",
)

BATCHES = {"8": (8, 8, 8), "1": (1, 1, 1), "1:8:32": (1, 8, 32)}
"""Name -> least, best and most images of a run."""

RIVALS = ("plain", "OnnxSlim")
"""The better of these is what ours is compared with."""

EXPORT = """
import sys, onnxslim
from pathlib import Path
from tests.benchmarks.plain import export_plain
name, folder = sys.argv[1:]
export_plain(name, Path(folder) / "plain.onnx")
onnxslim.slim(f"{folder}/plain.onnx", f"{folder}/OnnxSlim.onnx")
"""

SIMPLIFY = """
import sys, onnx, onnxsim
model, ok = onnxsim.simplify(onnx.load(sys.argv[1]))
assert ok, "onnxsim says that its own result is wrong"
onnx.save(model, sys.argv[2])
"""

AUTOCAST = """
import sys, onnx
from modelopt.onnx.autocast import convert_to_mixed_precision
onnx.save(convert_to_mixed_precision(onnx_path=sys.argv[1], low_precision_type="fp16"), sys.argv[2])
"""


@dataclass(frozen=True)
class Measured:
    """What the compiler makes of one file.

    Attributes:
        problem: why it makes nothing of it; else empty.
        totals: kernels, by the name of the batch.
    """

    problem: str = ""
    totals: Mapping[str, KernelTotals] = field(default_factory=dict)


@dataclass(frozen=True)
class Results:
    """The file of results: file name without its suffix -> what is known, by model."""

    sources: str = ""
    models: Mapping[str, Mapping[str, Measured]] = field(default_factory=dict)


def typed(path: Path) -> Path:
    """Write the FP16 graph of a file beside it, by the defaults of the command."""
    model = ir.load(path)
    cast(model, Policy(REDUCED_TYPES["fp16"]))
    reduced = path.with_suffix(".fp16.onnx")
    ir.save(model, reduced)
    return reduced


def compiled(path: Path, gpu: Capability) -> Measured:
    """Compile a file for all batches."""
    (images,) = (value for value in ir.load(path).graph.inputs if not value.is_initializer())
    assert images.shape is not None, "an image has a shape"
    sizes = tuple(int(dim) for dim in list(images.shape)[1:] if isinstance(dim, int))
    totals: dict[str, KernelTotals] = {}
    for name, batches in BATCHES.items():
        least, best, most = ((batch, *sizes) for batch in batches)
        settings = BuildSettings({images.name or "": ShapeRange(least, best, most)})
        with tempfile.TemporaryDirectory() as work:
            try:
                reading = read_compiled(path, settings, Path(work) / "work", (gpu,), timeout=900)
            except DeployError as error:
                return Measured(str(error).splitlines()[0])
        totals[name] = KernelTotals.of(reading.kernels)
    return Measured(totals=totals)


def measure(
    model: str, gpu: Capability, known: Mapping[str, Measured], others: Mapping[str, str]
) -> dict[str, Measured]:
    """Measure what is not known yet of a model; ``others`` are interpreters by what they are asked for."""
    wanted = [name for name in (*RIVALS, *others, "ours") if name not in known]
    if not wanted:
        return dict(known)
    found = dict(known)
    with tempfile.TemporaryDirectory() as top:
        folder = Path(top)
        try:
            run(EXPORT, model, str(folder), cwd=folder)
        except Failed:
            return {name: Measured("PyTorch's exporter cannot") for name in wanted}
        for name in wanted:
            path = folder / f"{name}.onnx"
            try:
                if name == "ours":
                    run(DEPLOYCLI, "optimize", "plain.onnx", "-o", path.name, "--no-lint", cwd=folder)
                elif name in others:
                    code = AUTOCAST if name == "AutoCast" else SIMPLIFY
                    subprocess.run([others[name], "-c", code, "plain.onnx", path.name], cwd=folder, check=True,
                                   capture_output=True)  # fmt: skip
                found[name] = compiled(path if name == "AutoCast" else typed(path), gpu)
            except (Failed, subprocess.CalledProcessError) as error:
                found[name] = Measured(f"{name}: {error}")
    return found


def ratios(measured: Mapping[str, Measured], batch: str) -> tuple[float, float] | None:
    """Return launches and bytes of ours by those of the better rival; None where one is not known."""
    rivals = [measured[name].totals[batch] for name in RIVALS if batch in measured[name].totals]
    ours = measured["ours"].totals.get(batch)
    if ours is None or not rivals:
        return None
    moved = math.nan if any(t.unknown for t in (ours, *rivals)) else ours.moved / min(t.moved for t in rivals)
    return ours.launches / min(rival.launches for rival in rivals), moved


def lines(models: Mapping[str, Mapping[str, Measured]]) -> Iterator[str]:
    """Yield the table, and the geometric means."""
    names = list(dict.fromkeys(name for measured in models.values() for name in measured))
    yield f"| model | {' | '.join(names)} | ratio, batch 8 | batch 1 | 1:8:32 |"
    yield "|" + "---|" * (len(names) + 4)
    logs: dict[str, list[tuple[float, float]]] = {batch: [] for batch in BATCHES}
    for model, measured in models.items():
        cells = [cell(measured.get(name, Measured("not measured"))) for name in names]
        for batch in BATCHES:
            ratio = ratios(measured, batch)
            if ratio is None:
                cells.append("")
                continue
            logs[batch].append(ratio)
            cells.append(f"{ratio[0]:.2f}" if math.isnan(ratio[1]) else f"{ratio[0]:.2f} / {ratio[1]:.2f}")
        yield f"| `{model}` | {' | '.join(cells)} |"
    yield ""
    for batch, found in logs.items():
        launches, moved = (math.exp(sum(map(math.log, part)) / len(part)) for part in zip(*found, strict=True))
        worst = max(max(a, b) if not math.isnan(b) else a for a, b in found)
        size = "" if math.isnan(moved) else f", {moved:.3f} of the bytes"
        yield f"Batch {batch}, {len(found)} models: {launches:.3f} of the launches{size}; none above {worst:.2f}."


def cell(measured: Measured) -> str:
    """Return launches, bytes and fused attentions at batch 8, or why there are none."""
    if measured.problem:
        return measured.problem.replace("|", "\\|")[:80]
    totals = measured.totals["8"]
    return f"{totals.launches} / {totals.moved / 1e6:.1f} / {totals.attention}"


def main() -> None:
    """Measure and print Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", type=re.compile, default="", metavar="REGEX", help="models to measure")
    parser.add_argument("--gpu", default="8.9", metavar="X.Y", help="compute capability to compile for")
    parser.add_argument("--simplifier", metavar="PYTHON", help="an interpreter that has onnxsim")
    parser.add_argument("--modelopt", metavar="PYTHON", help="an interpreter that has nvidia-modelopt[onnx]")
    parser.add_argument("--write", action="store_true", help="put what is known into RESULTS.md")
    asked = parser.parse_args()
    major, minor = map(int, asked.gpu.split("."))
    digest = sources()
    results = load(RESULTS, Results, what="results") if RESULTS.is_file() else Results()
    models = {model: dict(found) for model, found in results.models.items()}
    if results.sources != digest:  # what others make does not depend on our sources
        models = {model: {n: m for n, m in found.items() if n != "ours"} for model, found in models.items()}
    others = {"onnxsim": asked.simplifier, "AutoCast": asked.modelopt}
    for model in MODELS:
        if asked.only.search(model):
            known = {name: python for name, python in others.items() if python}
            models[model] = measure(model, (major, minor), models.get(model, {}), known)
            save(Results(digest, models), RESULTS)
            print(model, *(f"{name} {cell(found)}" for name, found in models[model].items()), sep="  ", flush=True)
    table = list(lines({model: models[model] for model in MODELS if "ours" in models.get(model, {})}))
    print(*table, sep="\n")
    if asked.write:
        write_block("rivals", [f"GPU {asked.gpu}, batch 8:", "", *table])


if __name__ == "__main__":
    sys.exit(main())
