"""The bytes that each registered model is exported to: one SHA-256 each, over its ONNX file and external data.

    python -m tests.benchmarks.export_bytes [MODEL]...

Weights are random, by the rule of tests/golden: no bias is zero. Two states of the sources that print the same lines
write the same files.
"""

import argparse
import hashlib
import tempfile
from pathlib import Path

from deploycli.models.registry import variants
from tests.benchmarks.engines import DEPLOYCLI, MAKE_WEIGHTS, run


def exported(model: str) -> str:
    """Export a model; return the hash of what was written."""
    with tempfile.TemporaryDirectory() as top:
        folder = Path(top)
        run(MAKE_WEIGHTS, model, "weights.pth", cwd=folder)
        run(DEPLOYCLI, "export", model, "--name", "model", "--checkpoint", "weights.pth", "--no-lint", cwd=folder)
        digest = hashlib.sha256()
        for file in sorted((folder / "artifacts" / "model").glob("model.onnx*")):  # external data beside it
            digest.update(file.read_bytes())
        return digest.hexdigest()


def main() -> None:
    """Print a line a model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", metavar="MODEL", help="all registered ones by default")
    for model in parser.parse_args().models or [variant.name for variant in variants()]:
        print(exported(model)[:16], model, flush=True)


if __name__ == "__main__":
    main()
