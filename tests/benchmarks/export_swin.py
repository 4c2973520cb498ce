"""Swin-T, dynamic batch: timm's plain dynamo export, what OnnxSlim, onnxsim and we make of it, and our own export.

python -m tests.benchmarks.export_swin [--rounds 9] [--write]

All have the same weights and are timed in one run, in ONNX Runtime and, where it is installed, in OpenVINO.

How long the exports themselves take: `tests.benchmarks.export_time`.
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.benchmarks.measure import graph_figures, interleaved, runners, write_block

PLAIN_EXPORT = """
import sys, warnings
warnings.simplefilter("ignore")
import torch
from tests.peers import import_timm
timm = import_timm()
model = timm.create_model("swin_tiny_patch4_window7_224").eval()
state = torch.load(sys.argv[1], weights_only=True)
model.load_state_dict(state)
program = torch.onnx.export(
    model, (torch.zeros(2, 3, 224, 224),), dynamo=True, dynamic_shapes=({0: torch.export.Dim("batch")},),
    opset_version=20, verbose=False)
program.save(sys.argv[2])
"""

MAKE_WEIGHTS = """
import sys, torch
from tests.peers import import_timm
timm = import_timm()
model = timm.create_model("swin_tiny_patch4_window7_224")
torch.manual_seed(0)  # no zero biases, which a simplifier would delete
state = {key: torch.randn_like(value) * 0.05 for key, value in model.state_dict().items()}
torch.save(state, sys.argv[1])
"""


def main() -> None:
    """Measure and print Markdown."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--write", action="store_true", help="put the table into RESULTS.md")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        weights, plain = root / "weights.pth", root / "plain.onnx"
        slim, simple, optimized = (root / f"{name}.onnx" for name in ("slim", "simple", "optimized"))
        python = [sys.executable]
        export = [*python, "-m", "deploycli", "export", "swin_t", "--checkpoint", str(weights), "-o", str(root)]
        for command in (
            [*python, "-c", MAKE_WEIGHTS, str(weights)],
            [*python, "-c", PLAIN_EXPORT, str(weights), str(plain)],
            [*python, "-m", "onnxslim", str(plain), str(slim)],
            [*python, "-m", "onnxsim", str(plain), str(simple)],
            [*python, "-m", "deploycli", "optimize", str(plain), "-o", str(optimized)],
            [*export, "--name", "traced", "--no-rewrite"],
            [*export, "--name", "ours"],
            [*export, "--name", "five", "--attention", "5d"],
        ):
            subprocess.run(command, check=True, capture_output=True)
        files = {
            "plain dynamo export (timm)": plain,
            "OnnxSlim of it": slim,
            "onnxsim of it": simple,
            "`deploycli optimize` of it": optimized,
            "`deploycli export --no-rewrite`": root / "traced" / "model.onnx",
            "`deploycli export`": root / "ours" / "model.onnx",
            "`deploycli export --attention 5d`": root / "five" / "model.onnx",
        }
        lines = table(files, arguments.rounds)
    print(*lines, sep="\n")
    if arguments.write:
        write_block("export_swin", lines)


def table(files: dict[str, Path], rounds: int) -> list[str]:
    """Time the files and return the table."""
    speed: dict[str, list[str]] = {name: [] for name in files}
    columns = []
    for runtime, make in runners().items():
        for batch in (1, 8):
            columns.append(f"{runtime} batch {batch}")
            seconds = interleaved({name: make(path, batch) for name, path in files.items()}, rounds)
            base = next(iter(seconds.values()))
            for name, value in seconds.items():
                speed[name].append(f"{base / value:.2f}")
    lines = [f"| Swin-T, dynamic batch | nodes | movement nodes | moved per image | {' | '.join(columns)} |"]
    lines.append("|---" * (4 + len(columns)) + "|")
    for name, path in files.items():
        figures = graph_figures(path)
        moved = f"{figures.moved_bytes / 1e6:.1f} MB"
        cells = [name, str(figures.nodes), str(figures.movement_nodes), moved, *speed[name]]
        lines.append(f"| {' | '.join(cells)} |")
    return [*lines, "", f"Speeds are times that of the first row, median of {rounds} interleaved runs."]


if __name__ == "__main__":
    main()
