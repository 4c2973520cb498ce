"""Swin-T, dynamic batch: the plain dynamo export of timm's, OnnxSlim's result on it, and ours; same weights, one run.

python -m tests.benchmarks.export_swin [--rounds 15] [--export-rounds 3]
"""

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.benchmarks.measure import graph_figures, interleaved, onnxruntime_runner

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


def _seconds(command: list[str]) -> float:
    start = time.perf_counter()
    subprocess.run(command, check=True, capture_output=True)
    return time.perf_counter() - start


def main() -> None:
    """Measure and print Markdown."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--export-rounds", type=int, default=3)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        weights, plain, slim = root / "weights.pth", root / "plain.onnx", root / "slim.onnx"
        subprocess.run([sys.executable, "-c", MAKE_WEIGHTS, str(weights)], check=True)
        theirs = [sys.executable, "-c", PLAIN_EXPORT, str(weights), str(plain)]
        ours = [sys.executable, "-m", "deploycli", "export", "swin_t", "--checkpoint", str(weights), "-o", str(root)]
        ratios, pairs = [], []
        for _ in range(arguments.export_rounds):
            pairs.append((_seconds(theirs), _seconds(ours)))
            ratios.append(pairs[-1][1] / pairs[-1][0])
        subprocess.run([sys.executable, "-m", "onnxslim", str(plain), str(slim)], check=True, capture_output=True)
        files = {
            "plain dynamo export (timm)": plain,
            "OnnxSlim of it": slim,
            "deploycli": root / "swin_t" / "model.onnx",
        }
        latency = {
            batch: interleaved(
                {name: onnxruntime_runner(path, batch) for name, path in files.items()}, arguments.rounds
            )
            for batch in (1, 8)
        }
        baseline = next(iter(files))
        print("| Swin-T, dynamic batch | nodes | movement nodes | moved per image | ORT batch 1 | ORT batch 8 |")
        print("|---|---|---|---|---|---|")
        for name, path in files.items():
            figures = graph_figures(path)
            speed = [f"{latency[batch][name] / latency[batch][baseline]:.2f}" for batch in (1, 8)]
            print(
                f"| {name} | {figures.nodes} | {figures.movement_nodes} | {figures.moved_bytes / 1e6:.1f} MB "
                f"| {speed[0]} | {speed[1]} |"
            )
        print()
        best = sorted(ratios)[len(ratios) // 2]
        print(
            f"ORT: median latency of {arguments.rounds} interleaved runs over the plain export's. "
            f"`deploycli export swin_t`, which also runs the model and checks the file, took {best:.2f} times the wall "
            f"time of the plain `torch.onnx.export` (median of {len(ratios)} pairs of processes: "
            + ", ".join(f"{b:.1f} s / {a:.1f} s" for a, b in pairs)
            + ")."
        )


if __name__ == "__main__":
    main()
