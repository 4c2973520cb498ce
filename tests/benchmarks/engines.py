"""Every registered model and twenty of timm's, really compiled by TensorRT for RTX in FP16 and in INT8: what each is.

    python -m tests.benchmarks.engines [--only REGEX] [--write] [-v]

Every model is exported and compiled by the command line with its defaults, for all GPUs that the compiler knows:
smaller models first, one at a time. Weights are random, by the rule of tests/golden, since the compiler leaves out
biases that are zero; INT8 is calibrated on random numbers. So the figures are of the compiler, not of accuracy.

Each result is kept at once: an interrupted run goes on where it stopped, and what was measured with other sources is
measured again. `--write` puts all that is known into RESULTS.md; `-v` lists the kernels that are neither product nor
attention nor normalisation.
"""

import argparse
import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import onnx

from deploycli.exporters.bundle.engine import Kernel, KernelTotals, Sidecar, sidecars
from deploycli.exporters.target.product import RTX
from deploycli.exporters.tensorrt import library
from deploycli.models.codec import load
from deploycli.models.registry import variants
from tests.benchmarks.measure import save, write_block
from tests.benchmarks.model_table import parameters

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "build" / "engines.json"
BATCH = "1:8:32"
TIMEOUT_S = 1200

PRECISIONS = {"fp16": (), "int8": ("--allow-random-calibration", "--samples", "2")}
"""Precision -> how it is asked for."""

TIMM = (
    "vit_small_patch16_224",
    "deit_small_distilled_patch16_224",
    "vit_small_patch14_dinov2",
    "vit_small_patch16_dinov3",
    "beit_base_patch16_224",
    "eva02_small_patch14_224",
    "cait_xxs24_224",
    "volo_d1_224",
    "crossvit_small_240",
    "swin_tiny_patch4_window7_224",
    "swinv2_tiny_window8_256",
    "davit_tiny",
    "maxvit_tiny_tf_224",
    "twins_svt_small",
    "pvt_v2_b1",
    "xcit_tiny_12_p16_224",
    "coat_lite_small",
    "levit_256",
    "mobilevit_s",
    "convnext_tiny",
)
"""What people ship; the last has no attention."""

HEADER = (
    "| model | attentions | FP16: MB | launches | fused | moved | INT8: MB | products | launches | fused | moved | s |",
    "|---|---|---|---|---|---|---|---|---|---|---|---|",
)

NO_KERNELS = KernelTotals.of(())

NORMALISATIONS = {"BatchNormalization", "GroupNormalization", "InstanceNormalization", "LayerNormalization"}

# timm imports torchvision, whose compiled half may be missing.
DEPLOYCLI = """
import sys
if any(argument.startswith("timm:") for argument in sys.argv):
    from tests.peers import import_timm
    import_timm()
import deploycli.__main__ as program
program.main()
"""

MAKE_WEIGHTS = """
import sys, torch
from deploycli.models.build import build
from deploycli.models.registry import resolve
from tests.peers import import_timm
from tests.weights import golden_weight
name = sys.argv[1]
library, _, rest = name.partition(":")
module = import_timm().create_model(rest) if rest else build(resolve(name).spec)
state = {key: torch.from_numpy(golden_weight(key, tuple(p.shape))) for key, p in module.named_parameters()}
torch.save(module.state_dict() | state, sys.argv[2])
"""


@dataclass(frozen=True)
class OtherKernel:
    """A kernel that is neither product nor attention nor normalisation.

    Attributes:
        module: its PyTorch module.
        name: the compiler's name of it.
        operators: the ONNX operators in it, in the order of the graph.
        moved: bytes for one image, or None.
    """

    module: str
    name: str
    operators: tuple[str, ...]
    moved: int | None


@dataclass(frozen=True)
class Engine:
    """One engine.

    Attributes:
        problem: why there is none; else empty.
        size: bytes of the plan.
        seconds: that the compiler took.
        totals: of its kernels.
        others: the kernels that are none of the known kinds.
    """

    problem: str = ""
    size: int = 0
    seconds: float = 0
    totals: KernelTotals = NO_KERNELS
    others: tuple[OtherKernel, ...] = ()


@dataclass(frozen=True)
class Measured:
    """What is known of one model.

    Attributes:
        sources: what it was measured with, see `sources`.
        seconds: that the export took.
        problem: why there is no bundle; else empty.
        attentions: softmaxes of the traced graph: of these models, each is an attention.
        engines: by precision; empty where there is no bundle.
    """

    sources: str
    seconds: float
    problem: str = ""
    attentions: int = 0
    engines: Mapping[str, Engine] = field(default_factory=dict)


@dataclass(frozen=True)
class Results:
    """The file of results: what is known, by model."""

    models: Mapping[str, Measured] = field(default_factory=dict)


def sources() -> str:
    """Return a hash of all that decides what is compiled: our sources and the compiler's version."""
    digest = hashlib.sha256(library.version(RTX).encode())
    for path in sorted(path for package in ("exporters", "models") for path in (ROOT / package).rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


class Failed(Exception):  # noqa: N818 - it is a result
    """A command ended with an error; its first line."""


def run(code: str, *arguments: str, cwd: Path) -> None:
    """Run Python in a process of its own.

    Raises:
        Failed: it ended with an error.
    """
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code, *arguments]
    ended = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)
    if ended.returncode:
        said = [line.removeprefix("error: ") for line in ended.stderr.splitlines() if line.startswith("error: ")]
        raise Failed(f"exit {ended.returncode}: {(said or ended.stderr.splitlines() or ['it does not say why'])[0]}")


def measure(model: str, digest: str) -> Measured:
    """Export a model and compile it, in a folder that is gone afterwards."""
    with tempfile.TemporaryDirectory() as folder:
        cwd, bundle = Path(folder), Path(folder) / "artifacts" / "model"
        run(MAKE_WEIGHTS, model, "weights.pth", cwd=cwd)
        start = time.perf_counter()
        try:
            run(DEPLOYCLI, "export", model, "--name", bundle.name, "--checkpoint", "weights.pth", cwd=cwd)
        except Failed as error:
            return Measured(digest, time.perf_counter() - start, problem=str(error))
        seconds = time.perf_counter() - start
        manifest = json.loads((bundle / "manifest.json").read_text("utf-8"))
        attentions = manifest["artifacts"][0]["ops_before"].get("Softmax", 0)
        engines = {precision: compiled(bundle, precision) for precision in PRECISIONS}
        return Measured(digest, seconds, attentions=attentions, engines=engines)


def compiled(bundle: Path, precision: str) -> Engine:
    """Compile a model in one precision."""
    asked = ("--compiler", "rtx", "--batch", BATCH, "--precision", precision, *PRECISIONS[precision])
    try:
        run(DEPLOYCLI, "build-trt", *asked, "--timeout", str(TIMEOUT_S), cwd=bundle.parents[1])
    except Failed as error:
        return Engine(str(error))
    (sidecar,) = (s for s in sidecars(bundle / "engines") if s.precision == precision)
    others = tuple(other_kernels(sidecar, bundle / sidecar.onnx))
    return Engine("", sidecar.size, sidecar.seconds, sidecar.totals, others)


def other_kernels(sidecar: Sidecar, path: Path) -> Iterator[OtherKernel]:
    """Yield the kernels of an engine that are neither product nor attention nor normalisation."""
    operators = {node.name: node.op_type for node in onnx.load(path, load_external_data=False).graph.node}

    def of(kernel: Kernel) -> tuple[str, ...]:
        return tuple(operators[node] for node in kernel.nodes if node in operators)

    for kernel in sidecar.first_kernels:
        if not kernel.product and NORMALISATIONS.isdisjoint(of(kernel)):
            yield OtherKernel(kernel.module, kernel.name, of(kernel), kernel.moved)


def models() -> list[str]:
    """Return all models, in the order of the table."""
    return [*(variant.name for variant in variants()), *(f"timm:{name}" for name in TIMM)]


def smaller_first(names: Sequence[str]) -> list[str]:
    """Return timm's models, which are small, and then the others by what they compute."""
    registered = {variant.name: variant for variant in variants()}

    def cost(name: str) -> int:
        if name not in registered:
            return 0
        height, width = registered[name].spec.inputs[0].shape[1:]
        return parameters(name) * height * width

    return sorted(names, key=cost)


def row(model: str, measured: Measured) -> str:
    """Return the row of a model."""
    cells, seconds = [str(measured.attentions)], [measured.seconds]
    for precision, engine in measured.engines.items():
        cells += engine_cells(precision, engine)
        seconds += [] if engine.problem else [engine.seconds]
    if measured.problem:
        cells = ["", escaped(measured.problem), *[""] * (HEADER[0].count("|") - 5)]
    return f"| {' | '.join([f'`{model}`', *cells, ' + '.join(f'{s:.0f}' for s in seconds)])} |"


def escaped(text: str) -> str:
    """Return a text as a cell of a table shows it."""
    return text.replace("|", "\\|")


def engine_cells(precision: str, engine: Engine) -> list[str]:
    """Return what stands of an engine in a row; of INT8 the share of products, too."""
    totals = engine.totals
    products = f"{totals.products.get(precision, 0)} of {sum(totals.products.values())}"
    cells = [
        f"{engine.size / 1e6:.1f}",
        *([products] if precision == "int8" else []),
        str(totals.launches),
        str(totals.attention),
        f"{totals.moved / 1e6:.1f}" + ("+" if totals.unknown else ""),
    ]
    problem = escaped(engine.problem.replace(f"the {precision} engine of artifacts/model: ", ""))
    return [problem, *[""] * (len(cells) - 1)] if engine.problem else cells


def show_others(model: str, measured: Measured) -> None:
    """Print the kernels of a model that are none of the known kinds: by module, those of all blocks together."""
    for precision, engine in measured.engines.items():
        count = len(engine.others)
        print(f"\n{model}, {precision}: {count} kernels are neither product nor attention nor normalisation")
        print("\n| module | operators | kernels | moved, MB |\n|---|---|---|---|")
        alike: dict[tuple[str, str], list[int]] = {}
        for kernel in engine.others:
            module = re.sub(r"\b\d+\b", "*", kernel.module) or "-"
            alike.setdefault((module, " ".join(kernel.operators) or kernel.name), []).append(kernel.moved or 0)
        for (module, operators), moved in alike.items():
            print(f"| {module} | {operators} | {len(moved)} | {sum(moved) / 1e6:.2f} |")


def main() -> None:
    """Measure and print Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", type=re.compile, default="", metavar="REGEX", help="models to measure")
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="FILE", help="where results are kept")
    parser.add_argument("--write", action="store_true", help="put the rows of what is known into RESULTS.md")
    parser.add_argument("-v", "--verbose", action="store_true", help="list kernels of no known kind")
    arguments = parser.parse_args()
    known = dict(load(arguments.results, Results, what="results").models) if arguments.results.is_file() else {}
    digest = sources()
    known = {model: measured for model, measured in known.items() if measured.sources == digest}
    print(*HEADER, sep="\n")
    for model in smaller_first([model for model in models() if arguments.only.search(model)]):
        if model not in known:
            known[model] = measure(model, digest)
            save(Results(known), arguments.results)
        print(row(model, known[model]), flush=True)
        if arguments.verbose:
            show_others(model, known[model])
    if arguments.write:
        lines = [*HEADER, *(row(model, known[model]) for model in models() if model in known)]
        if missing := sum(model not in known for model in models()):
            lines += [
                "",
                f"{missing} of {len(models())} models are not measured yet: the command goes on where it was.",
            ]
        write_block("engines", lines)


if __name__ == "__main__":
    main()
