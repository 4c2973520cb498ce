"""Every registered model: parameters, multiply-adds, nodes before and after, and the error against eager.

    python -m tests.benchmarks.model_table [PATTERN ...] [--write]

Each model is exported and verified in a process of its own, with random weights. `--write` puts the rows into
RESULTS.md; without a pattern, all of them.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from deploycli.models.registry import variants
from tests.benchmarks.measure import graph_figures, write_block

HEADER = (
    "| model | image | parameters | multiply-adds | traced | written | largest rel. error | peak memory |",
    "|---|---|---|---|---|---|---|---|",
)

# The child reports its own peak; getrusage would pass on that of the process that forked it.
EXPORT = """
import re, sys
from pathlib import Path
from deploycli.exporters.export import ExportOptions, export
bundle = export(ExportOptions(sys.argv[1], Path(sys.argv[2])))
print(int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024)
"""


def row(name: str, root: Path) -> str:
    """Export, verify and count one model."""
    peak = int(subprocess.run([sys.executable, "-c", EXPORT, name, str(root)], check=True, capture_output=True).stdout)
    command = [sys.executable, "-m", "deploycli", "verify", name, "-o", str(root), "--batches", "1,3", "--json"]
    (report,) = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
    error = max(c["max_rel_error"] for stage in report["stages"] for c in stage["comparisons"])
    manifest = json.loads((root / name / "manifest.json").read_text("utf-8"))
    (artifact,) = manifest["artifacts"]
    figures = graph_figures(root / name / artifact["file"]["path"])
    weights = parameters(name) * 4
    height, width = manifest["spec"]["inputs"][0]["shape"][1:]
    image = str(height) if height == width else f"{height}x{width}"
    return (
        f"| `{name}` | {image} | {weights / 4e6:.1f} M | {figures.multiply_adds / 1e9:.1f} G "
        f"| {sum(artifact['ops_before'].values())} | {figures.nodes} | {error:.0e} "
        f"| {peak / 2**30:.1f} GiB ({peak / weights:.1f}x) |"
    )


def parameters(name: str) -> int:
    """Count a model's parameters without making its weights."""
    import torch

    from deploycli.models.build import build
    from deploycli.models.registry import resolve

    with torch.device("meta"):
        return sum(parameter.numel() for parameter in build(resolve(name).spec).parameters())


def main() -> None:
    """Measure and print Markdown."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("patterns", nargs="*")
    parser.add_argument("--write", action="store_true", help="put the rows into RESULTS.md")
    arguments = parser.parse_args()
    names = list(dict.fromkeys(v.name for p in (arguments.patterns or [None]) for v in variants(p)))
    lines = list(HEADER)
    print(*lines, sep="\n")
    for name in names:
        with tempfile.TemporaryDirectory() as folder:
            lines.append(row(name, Path(folder)))
        print(lines[-1], flush=True)
    if arguments.write:
        write_block("model_table", lines)


if __name__ == "__main__":
    main()
