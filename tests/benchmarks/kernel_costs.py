"""The kernels that are predicted for a graph, and those that TensorRT for RTX really makes of it: do they rank alike?

    python -m tests.benchmarks.kernel_costs [--only REGEX] [--write]

Graphs are the small models of `deploycli list` and some of timm's: as they are traced, simplified by OnnxSlim, and
rewritten; and two models rewritten with each pass left out. Weights are random, by the rule of tests/golden, since the
compiler leaves out biases that are zero. Each graph is predicted in FP32, cast to FP16 and compiled at batch 8.

What a pass chooses by is the order of the forms of one model; so Spearman's rank correlation is given over all graphs,
and over the forms of each model. Forms that come out alike are one. What was compiled is kept by its contents: an
interrupted run goes on where it stopped.
"""

import argparse
import hashlib
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from deploycli.exporters.graph.analysis import Analysis
from deploycli.exporters.graph.kernels import predict
from deploycli.exporters.graph.steps import KernelFigures
from deploycli.exporters.passes.any_model import optimized
from deploycli.exporters.passes.pipeline import PASSES
from deploycli.exporters.precision.insert_casts import cast
from deploycli.exporters.precision.policy import REDUCED_TYPES, Policy
from deploycli.models.codec import load
from deploycli.models.errors import BuildError
from tests.benchmarks.engines import DEPLOYCLI, MAKE_WEIGHTS, run
from tests.benchmarks.measure import save, write_block
from tests.benchmarks.plain import export_plain
from tests.benchmarks.rtx_layers import compiled_figures

FOLDER = Path(__file__).parents[2] / "build" / "kernel_costs"
BATCH = 8

REGISTERED = ("deit_t", "swin_t", "crossformer_t")
LEFT_OUT = ("deit_t", "swin_t")
"""Of these, every pass is left out once."""

TIMM = (
    "vit_small_patch16_224",
    "deit_small_distilled_patch16_224",
    "vit_small_patch14_dinov2",
    "vit_small_patch16_dinov3",
    "eva02_small_patch14_224",
    "crossvit_small_240",
    "swin_tiny_patch4_window7_224",
    "swinv2_tiny_window8_256",
    "davit_tiny",
    "maxvit_tiny_tf_224",
    "pvt_v2_b1",
    "cait_xxs24_224",
    "xcit_tiny_12_p16_224",
)

HEADER = (
    "| model | form | launches: predicted | compiled | MB: predicted | compiled | attentions: predicted | compiled |",
    "|---|---|---|---|---|---|---|---|",
)

FEWEST_FORMS = 3
WORST = 6


@dataclass(frozen=True)
class Compared:
    """One graph."""

    model: str
    form: str
    predicted: KernelFigures
    compiled: KernelFigures

    @property
    def row(self) -> str:
        """The row of a table."""
        one, other = self.predicted, self.compiled
        cells = (
            *(one.launches, other.launches, f"{one.moved_bytes / 1e6:.1f}", f"{other.moved_bytes / 1e6:.1f}"),
            *(one.attentions, other.attentions),
        )
        return f"| `{self.model}` | {self.form} | {' | '.join(map(str, cells))} |"

    @property
    def miss(self) -> float:
        """By how much the prediction is off, as a share of what is compiled: the larger of launches and bytes."""
        pairs = [(f.launches, f.moved_bytes) for f in (self.predicted, self.compiled)]
        return max(abs(a / b - 1) for a, b in zip(*pairs, strict=True))


@dataclass(frozen=True)
class Known:
    """What was compiled, by the hash of the file; None where the compiler refused it."""

    files: Mapping[str, KernelFigures | None] = field(default_factory=dict)


def traced(model: str) -> Path:
    """Return the file of a model as `export --no-rewrite` or PyTorch writes it; made once."""
    path = FOLDER / f"{model}.onnx"
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.is_file() and model in REGISTERED:
        with tempfile.TemporaryDirectory() as folder:
            run(MAKE_WEIGHTS, model, "weights.pth", cwd=Path(folder))
            run(DEPLOYCLI, "export", model, "--no-rewrite", "--checkpoint", "weights.pth", cwd=Path(folder))
            (made,) = Path(folder).glob("artifacts/*/model.onnx")
            shutil.copy(made, path)
    elif not path.is_file():
        export_plain(model, path)
    return path


def forms(model: str) -> Iterator[tuple[str, ir.Model]]:
    """Yield the forms of a model, each under its name."""
    path = traced(model)
    yield "traced", ir.load(path)
    if model in TIMM:
        import onnxslim

        slim = path.with_suffix(".slim.onnx")
        if not slim.is_file():
            onnxslim.slim(str(path), str(slim))
        yield "OnnxSlim", ir.load(slim)
    yield "rewritten", optimized(ir.load(path))[0]
    for name in PASSES if model in LEFT_OUT else ():
        yield f"without {name}", optimized(ir.load(path), without=frozenset({name}))[0]


def compared(models: Sequence[str]) -> Iterator[Compared]:
    """Predict and compile all forms of models; what comes out as another one did is left out."""
    results = FOLDER / "compiled.json"
    known = dict(load(results, Known, what="results").files) if results.is_file() else {}
    for model in models:
        seen = set[str]()
        for form, graph in forms(model):
            predicted = predict(graph.graph, Analysis(graph.graph)).figures
            cast(graph, Policy(REDUCED_TYPES["fp16"], frozenset({"softmax"})))
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder) / "model.onnx"
                ir.save(graph, path)
                digest = hashlib.sha256(path.read_bytes()).hexdigest()
                if digest in seen:
                    continue
                seen.add(digest)
                if digest not in known:
                    known[digest] = compiled(path)
                    save(Known(known), results)
            if (figures := known[digest]) is not None:
                yield Compared(model, form, predicted, figures)


def compiled(path: Path) -> KernelFigures | None:
    """Compile a file; None where the compiler refuses it."""
    try:
        return compiled_figures(path, BATCH)
    except BuildError:
        return None


def ranks(numbers: Sequence[float]) -> npt.NDArray[np.float64]:
    """Return the rank of each number; equal ones share the mean of theirs."""
    _, place, count = np.unique(np.asarray(numbers), return_inverse=True, return_counts=True)
    last = np.cumsum(count)
    return np.asarray((last - (count - 1) / 2)[place], np.float64)


def rank_correlation(one: Sequence[float], other: Sequence[float]) -> float | None:
    """Return Spearman's rank correlation; None where all numbers of one side are equal."""
    if len(set(one)) < 2 or len(set(other)) < 2:
        return None
    return float(np.corrcoef(ranks(one), ranks(other))[0, 1])


def correlations(graphs: Sequence[Compared]) -> tuple[float | None, float | None]:
    """Return the rank correlations of launches and of bytes, those to a tenth of a megabyte."""
    pairs = [(graph.predicted, graph.compiled) for graph in graphs]
    return (
        rank_correlation([a.launches for a, _ in pairs], [b.launches for _, b in pairs]),
        rank_correlation(*([round(f.moved_bytes / 1e6, 1) for f in side] for side in zip(*pairs, strict=True))),
    )


def summary(graphs: Sequence[Compared]) -> Iterator[str]:
    """Yield what all graphs together say, in Markdown."""

    def text(found: tuple[float | None, float | None]) -> str:
        return " and ".join("-" if value is None else f"{value:.3f}" for value in found)

    models = dict.fromkeys(graph.model for graph in graphs)
    yield f"Rank correlation of launches and of bytes over {len(graphs)} graphs of {len(models)} models: "
    yield f"**{text(correlations(graphs))}**. Over the forms of one model:"
    yield ""
    yield "| model | forms | launches and bytes | exact launches |"
    yield "|---|---|---|---|"
    for model in models:
        own = [graph for graph in graphs if graph.model == model]
        exact = sum(graph.predicted.launches == graph.compiled.launches for graph in own)
        if len(own) >= FEWEST_FORMS:
            yield f"| `{model}` | {len(own)} | {text(correlations(own))} | {exact} |"
    worst = sorted(graphs, key=lambda graph: -graph.miss)[:WORST]
    yield ""
    yield "Furthest off: " + ", ".join(f"`{graph.model}` {graph.form} {graph.miss:.0%}" for graph in worst) + "."


def main() -> None:
    """Compare and print Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", type=re.compile, default="", metavar="REGEX", help="models to compare")
    parser.add_argument("--write", action="store_true", help="put the tables into RESULTS.md")
    arguments = parser.parse_args()
    print(*HEADER, sep="\n")
    graphs: list[Compared] = []
    for graph in compared([model for model in (*REGISTERED, *TIMM) if arguments.only.search(model)]):
        print(graph.row, flush=True)
        graphs.append(graph)
    lines = list(summary(graphs))
    print("", *lines, sep="\n")
    if arguments.write:
        write_block("kernel_costs", [*lines, "", *HEADER, *(graph.row for graph in graphs)])


if __name__ == "__main__":
    main()
