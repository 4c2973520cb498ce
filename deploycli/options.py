"""Options that several commands share, and how the text of an option is read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from models.spec import TensorSpec

if TYPE_CHECKING:
    from exporters.bundle import Bundle

DEFAULT_ROOT = Path("artifacts")

output_option = click.option(
    "-o",
    "--output",
    "root",
    type=click.Path(path_type=Path, file_okay=False),
    default=DEFAULT_ROOT,
    show_default=True,
    metavar="DIR",
    help="Folder of bundles.",
)

json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON to stdout.")

attention_option = click.option(
    "--attention",
    type=click.Choice(["4d", "5d", "onnx"]),
    default="4d",
    show_default=True,
    help="Scores of masked windows: [B, nW*N, S, S], which TensorRT documents to fuse, or [B, nW, N, S, S]; "
    "or the ONNX operator Attention, of opset 23.",
)

external_option = click.option(
    "--external-data",
    "external",
    type=click.Choice(["auto", "always", "never"]),
    default="auto",
    show_default=True,
    help="Weights beside the file; auto: only above 2 GiB.",
)

lint_option = click.option(
    "--no-lint", is_flag=True, help="Write the graph even where TensorRT could not read it; without this it is exit 3."
)

SEEDS = click.IntRange(0, 2**32 - 1)
"""What both NumPy and PyTorch take for a seed."""


def image_size(text: str) -> tuple[int, int]:
    """Read ``224`` or ``256x192`` (height x width), pixels."""
    sides = text.lower().split("x")
    if len(sides) > 2 or not all(side.isdigit() and int(side) > 0 for side in sides):
        raise click.BadParameter(f"{text!r} is no image size; write 224, or 256x192 for height x width")
    return int(sides[0]), int(sides[-1])


def batch_size(text: str) -> int:
    """Read a batch size, or ``dynamic``, which is 0: click takes None for "not given"."""
    if text == "dynamic":
        return 0
    if not text.isdigit() or int(text) < 1:
        raise click.BadParameter(f"{text!r} is no batch; write dynamic, or a positive number")
    return int(text)


def batch_sizes(text: str) -> tuple[int, ...]:
    """Read ``1,3,8``."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdigit() and int(part) > 0 for part in parts):
        raise click.BadParameter(f"{text!r}: write batch sizes as 1,3,8")
    return tuple(int(part) for part in parts)


def tolerance(text: str) -> tuple[str, float]:
    """Read ``1e-3`` for every output, or ``logits:1e-3`` for one, as Polygraphy writes it."""
    name, _, number = text.rpartition(":")
    try:
        return name, float(number)
    except ValueError:
        raise click.BadParameter(f"{text!r} is no tolerance; write 1e-3, or logits:1e-3") from None


def labels_source(text: str) -> Path | Literal["folders"]:
    """Read ``folders``, or the path of a CSV file."""
    return "folders" if text == "folders" else Path(text)


def json_object(text: str) -> dict[str, Any]:
    """Read a JSON object."""
    try:
        value = json.loads(text)
    except ValueError as error:
        raise click.BadParameter(f"{text!r} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise click.BadParameter(f"{text!r} is no JSON object; write '{{\"num_classes\": 10}}'")
    return value


def tensor_spec(text: str) -> TensorSpec:
    """Read ``images:2x3x224x224``: a name, and a shape whose first axis is the batch."""
    name, dims = _named_dims(text, "no input; write name:2x3x224x224, the batch first", axes=2)
    return TensorSpec(name, dims[1:])


def input_shape(text: str) -> tuple[str, tuple[int, ...]]:
    """Read ``images:1x3x224x224``: a name, and a whole shape, which may be empty of elements."""
    return _named_dims(text, "no shape of an input; write name:1x3x224x224", least=0)


def profile_shape(text: str) -> tuple[str, tuple[int, ...]]:
    """Read ``images:1x3x224x224``, as trtexec writes it."""
    return _named_dims(text, "no shape; write images:1x3x224x224")


def _named_dims(text: str, otherwise: str, *, least: int = 1, axes: int = 1) -> tuple[str, tuple[int, ...]]:
    name, _, shape = text.rpartition(":")
    dims = shape.lower().split("x")
    if not name or len(dims) < axes or not all(dim.isdigit() and int(dim) >= least for dim in dims):
        raise click.BadParameter(f"{text!r} is {otherwise}")
    return name, tuple(int(dim) for dim in dims)


def open_bundles(root: Path, names: tuple[str, ...]) -> list[Bundle]:
    """Open the named bundles, or all below ``root``; a name is a folder, or a bundle's name below ``root``.

    Raises:
        UsageError: there is none.
        IntegrityError: a file is missing or has changed.
    """
    from exporters.bundle import Bundle, find_bundles

    return [Bundle.open(path) for path in ([bundle_path(root, name) for name in names] or find_bundles(root))]


def bundle_path(root: Path, name: str) -> Path:
    """Return the folder that a name on the command line means."""
    below = root / name
    return below if below.is_dir() or not Path(name).exists() else Path(name)
