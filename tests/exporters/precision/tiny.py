"""A bundle of a transformer of one block, made by hand in milliseconds, and pictures for it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from deploycli.exporters.bundle.golden import GOLDEN_NAME, save_golden, synthetic_inputs
from deploycli.exporters.bundle.manifest import SCHEMA_VERSION, Artifact, FileRecord, Manifest
from deploycli.exporters.graph.onnx_file import write_model
from deploycli.exporters.runtime.runtimes import OrtRuntime
from deploycli.models.spec import ModelSpec, Preprocessing, TensorSpec, Weights
from tests.exporters.bundle.bundles import write_bundle
from tests.exporters.precision.networks import BLOCK_TEXT, block, graph, normal

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    import onnx_ir as ir

    from deploycli.exporters.bundle.bundle import Bundle

CLASSES = 5
SPEC = ModelSpec("tiny", "by-hand", {}, (TensorSpec("images", (3, 8, 8)),), ("logits",))

# Result -> name of its operator; the others are called after their operators.
_MODULES = {
    "c": "patch_embed/Conv",
    "n1": "norm1/LayerNormalization",
    "q0": "attn.q/MatMul",
    "k0": "attn.k/MatMul",
    "v0": "attn.v/MatMul",
    "s0": "attn/MatMul",
    "p": "attn/Softmax",
    "o": "attn/MatMul_1",
    "o3": "attn.proj/MatMul",
    "r": "Add_attn",
    "n2": "norm2/LayerNormalization",
    "h0": "mlp.fc1/MatMul",
    "h2": "mlp.act/Gelu",
    "h3": "mlp.fc2/MatMul",
    "y": "Add_mlp",
    "logits": "head/Gemm",
}
GEMMS = ("attn.q/MatMul", "attn.k/MatMul", "attn.v/MatMul", "attn.proj/MatMul", "mlp.fc1/MatMul", "mlp.fc2/MatMul")
"""What the default scheme quantises."""


def network(*, batch: int | str = "batch", **weights: Any) -> ir.Model:
    """Patch embedding, one block, a head; some weights may be others."""
    text = BLOCK_TEXT.replace("(float[b,8,32] x) => (float[b,8,32] y) {", "").rstrip("}")
    constants: dict[str, Any] = {
        name: value.const_value.numpy() for name, value in block().graph.initializers.items() if value.const_value
    }
    constants |= {"wp": 0.3 * normal(32, 3, 4, 2), "wh": 0.3 * normal(CLASSES, 32), "bh": normal(CLASSES)}
    constants |= {"flat": np.array([0, 32, 8], np.int64), "one": np.array([1], np.int64)}
    model = graph(
        f"""(float[{batch},3,8,8] images) => (float[{batch},{CLASSES}] logits) {{
            c = Conv<strides=[4,2]>(images, wp) f = Reshape(c, flat) x = Transpose<perm=[0,2,1]>(f)
            {text}
            l = LayerNormalization(y, g1, z1) m = ReduceMean<keepdims=0>(l, one) logits = Gemm<transB=1>(m, wh, bh)
        }}""",
        **{**constants, **weights},
    )
    for node in model.graph:
        node.name = _MODULES.get(node.outputs[0].name or "", node.name)
    return model


def make(
    root: Path,
    name: str = "tiny",
    *,
    batch: int | None = None,
    external: bool = False,
    change: Callable[[ir.Model], None] = lambda model: None,
    **weights: Any,
) -> Bundle:
    """Write a bundle."""

    def fill(folder: Path) -> Manifest:
        model = network(batch=batch or "batch", **weights)
        change(model)
        written = write_model(model, folder / "model.onnx", "always" if external else "auto")
        inputs, size = synthetic_inputs(SPEC, 8), batch or 8
        with OrtRuntime(folder / "model.onnx") as runtime:
            logits = [runtime.run({"images": inputs["images"][i : i + size]})["logits"] for i in range(0, 8, size)]
        save_golden(folder / GOLDEN_NAME, inputs, {"logits": np.concatenate(logits)})
        record, *data = (FileRecord.of(folder, file.name) for file in written)
        artifact = Artifact(record, tuple(data), "fp32", 20, batch, {}, {}, ())
        golden = FileRecord.of(folder, GOLDEN_NAME)
        recipe = Preprocessing(size=(8, 8), crop_pct=1.0)
        weights_record = Weights("checkpoint", path="/nowhere/model.pth", sha256="0" * 64)
        return Manifest(SCHEMA_VERSION, "0.1.0", name, SPEC, weights_record, recipe, (artifact,), golden, {})

    return write_bundle(root, name, fill)


def labelled(bundle: Bundle, count: int) -> tuple[Any, Any]:
    """Return inputs and the classes that the model gives them; of many, those where no CPU's rounding decides."""
    rows = normal(4 * count, 3, 8, 8, seed=5)
    batch = bundle.manifest.artifacts[0].batch or len(rows)
    with OrtRuntime(bundle.path / "model.onnx") as runtime:
        found = [runtime.run({"images": rows[i : i + batch]})["logits"] for i in range(0, len(rows), batch)]
    logits = np.concatenate(found)
    second, first = np.sort(logits)[:, -2:].T
    clear = np.sort(np.argsort(first - second)[-count:])
    return rows[clear], logits[clear].argmax(1)


def pictures(folder: Path, count: int, broken: int = 0) -> Path:
    """Write pictures of noise, some of which are none, in a folder for each class."""
    rng = np.random.default_rng(0)
    for i in range(count):
        path = folder / f"class {i % CLASSES}" / f"{i:03}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        if i < broken:
            path.write_bytes(b"no picture")
        else:
            Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8)).save(path)
    return folder
