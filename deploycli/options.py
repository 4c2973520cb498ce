"""Options that several commands share, and how the text of an option is read."""

from __future__ import annotations

import json
import math
import re
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import click
from click.core import ParameterSource

from deploycli.models.errors import DeployError, UsageError
from deploycli.models.files import text_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    from deploycli.exporters.bundle.bundle import Bundle
    from deploycli.exporters.graph.onnx_file import ExternalData
    from deploycli.exporters.tune import TuneOptions
    from deploycli.exporters.typed_file import FileOptions
    from deploycli.models.spec import PreprocessingChange, TensorSpec

F = TypeVar("F", bound="Callable[..., Any]")

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

target_option = click.option(
    "-o",
    "--output",
    "root",
    type=click.Path(path_type=Path),
    default=DEFAULT_ROOT,
    show_default=True,
    metavar="DIR|OUT.onnx",
    help="Folder of bundles; of a file, the file to write.",
)

json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON to stdout.")

checkpoint_option = click.option(
    "--checkpoint",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="Where the bundle's checkpoint is now; its hash must be the recorded one.",
)

trust_option = click.option(
    "--trust-factory",
    is_flag=True,
    help="Run the function that a bundle names, though you did not export it on this machine: whoever wrote the bundle "
    "chose it.",
)

attention_option = click.option(
    "--attention",
    type=click.Choice(["4d", "5d", "onnx"]),
    default="4d",
    show_default=True,
    help="Scores of masked windows: [B, nW*N, S, S], which TensorRT documents to fuse, or [B, nW, N, S, S]; "
    "or the ONNX operator Attention, which needs opset 23 and, on a GPU, TensorRT 10.14.",
)

external_option = click.option(
    "--external-data",
    "external",
    type=click.Choice(["auto", "always", "never"]),
    default="auto",
    show_default=True,
    help="Weights beside the file; auto: only above 2 GiB.",
)


def gpu_option(meaning: str) -> Callable[[F], F]:
    """Return the option that names GPUs."""
    return click.option(
        "--gpu",
        "gpus",
        multiple=True,
        metavar="GPU",
        help=f"{meaning}: 8.6, sm86, turing, ampere, ada, blackwell, all, or a card such as rtx-3090 or l4. "
        "Repeatable.",
    )


def tensorrt_option(meaning: str) -> Callable[[F], F]:
    """Return the option that names a version of TensorRT."""
    return click.option("--tensorrt", "version", default="11.4", show_default=True, metavar="VERSION", help=meaning)


lint_option = click.option(
    "--no-lint",
    is_flag=True,
    help="Write the graph even where TensorRT could not read it, by the rules of `deploycli lint` or by NVIDIA's "
    "parser; without this it is exit 3.",
)


def tune_options(command: F) -> F:
    """Add the options of a search for the form that compiles best."""
    options = (
        click.option(
            "--tune", is_flag=True,
            help="Compile forms of the graph with TensorRT for RTX, which needs no GPU, and keep the one that launches "
            "fewest kernels and moves fewest bytes.",
        ),
        click.option(
            "--tune-seconds", type=Count(), default=300, show_default=True, metavar="S",
            help="Begin no more forms after so long.",
        ),
        click.option(
            "--tune-gpu", default="8.9", show_default=True, metavar="GPU",
            help="GPU to compile for, named as build-trt's --gpu.",
        ),
    )  # fmt: skip
    for option in reversed(options):
        command = option(command)
    return command


def tuning_of(tune: bool, seconds: int, gpu: str) -> TuneOptions | None:
    """Return what was asked of the search, or None for none.

    Raises:
        UsageError: TensorRT for RTX does not compile for the GPU.
    """
    if not tune:
        return None
    from deploycli.exporters.target.targets import parse_targets
    from deploycli.exporters.tune import TuneOptions

    return TuneOptions(parse_targets([gpu]), seconds)


inputs_option = click.option(
    "--inputs",
    "inputs_file",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE.npz",
    help="Run the graph on these arrays, one for each input by name, where it takes no random numbers.",
)


def _three(text: str) -> tuple[float, float, float]:
    """Read ``0.485,0.456,0.406``."""
    try:
        red, green, blue = (float(part) for part in text.split(","))
    except ValueError:
        raise click.BadParameter(f"{_shown(text)} is not one number a channel; write 0.485,0.456,0.406") from None
    if not all(map(math.isfinite, (red, green, blue))):
        raise click.BadParameter(f"{_shown(text)} has a number that is not finite")
    return red, green, blue


def _positive_three(text: str) -> tuple[float, float, float]:
    numbers = _three(text)
    if min(numbers) <= 0:
        raise click.BadParameter(f"{_shown(text)}: a standard deviation is above 0")
    return numbers


def preprocessing_options(command: F) -> F:
    """Add how a picture becomes the model's input."""
    options = (
        click.option(
            "--mean", type=_three, metavar="R,G,B",
            help="Mean of each channel, of values from 0 to 1; in place of what the model's library says.",
        ),
        click.option("--std", type=_positive_three, metavar="R,G,B", help="Standard deviation of each channel."),
        click.option(
            "--crop", type=Number(0, 1, above=True), metavar="SHARE",
            help="Share of the resized shorter side that the centre crop takes, such as 0.875.",
        ),
        click.option(
            "--resize", type=Count(most=2**16), metavar="PIXELS", help="The shorter side before the crop, instead."
        ),
        click.option(
            "--interpolation", type=click.Choice(["bicubic", "bilinear", "box", "hamming", "lanczos", "nearest"]),
            help="How pictures are resized.",
        ),
    )  # fmt: skip
    for option in reversed(options):
        command = option(command)
    return command


def preprocessing_of(
    mean: tuple[float, float, float] | None,
    std: tuple[float, float, float] | None,
    crop: float | None,
    resize: int | None,
    interpolation: str | None,
) -> PreprocessingChange:
    """Return what was said of how pictures become inputs."""
    from deploycli.models.spec import PreprocessingChange

    return PreprocessingChange(crop, resize, interpolation, mean, std)


@dataclass(frozen=True)
class FileArguments:
    """What a command is told of an ONNX file that it takes in place of bundles.

    Attributes:
        samples: a ``.npz`` file of arrays to run it on.
        inputs: inputs whose sizes or values the graph does not tell.
        preprocessing: how a picture becomes the input.
        external: where weights are stored.
    """

    samples: Path | None
    inputs: tuple[TensorSpec, ...]
    preprocessing: PreprocessingChange
    external: ExternalData

    def options(self, source: Path, target: Path, *, lint: bool = True) -> FileOptions:
        """Return the file and what it is run on."""
        from deploycli.exporters.compare_files import FeedOptions
        from deploycli.exporters.typed_file import FileOptions

        feeds = FeedOptions(self.samples, self.inputs)
        return FileOptions(source, target, feeds, self.preprocessing, self.external, lint)


_RUN = {"inputs_file": "--inputs", "inputs": "--input"}
_PREPARED = {name: f"--{name}" for name in ("mean", "std", "crop", "resize", "interpolation")}


def run_options(command: Callable[..., int]) -> Callable[..., int]:
    """Add what an ONNX file in place of bundles is run on; the command is given it as ``of_file``.

    Raises:
        UsageError: one of the options was given for a bundle, which knows these things.
    """
    return inputs_option(file_input_option(_gathered(command, _RUN)))


def file_options(command: Callable[..., int]) -> Callable[..., int]:
    """Add to `run_options` how its pictures are prepared, and where weights are stored."""
    options = _RUN | _PREPARED | {"external": "--external-data"}
    return inputs_option(file_input_option(preprocessing_options(external_option(_gathered(command, options)))))


def prepared_options(command: Callable[..., int]) -> Callable[..., int]:
    """Add what a bundle or an ONNX file is run on, and how the pictures of a file are prepared."""
    return inputs_option(
        file_input_option(preprocessing_options(_gathered(command, {"inputs": "--input"} | _PREPARED)))
    )


def _gathered(command: Callable[..., int], options: Mapping[str, str]) -> Callable[..., int]:
    @wraps(command)
    def gathered(**values: Any) -> int:
        if file_of(values["bundles"] if "bundles" in values else (values["model"],)) is None:
            refuse_given("to a bundle, which knows it", options)
        recipe = preprocessing_of(*(values.pop(name, None) for name in _PREPARED))
        samples, inputs, external = values.pop("inputs_file"), values.pop("inputs"), values.pop("external", "auto")
        return command(**values, of_file=FileArguments(samples, inputs, recipe, external))

    return gathered


@contextmanager
def models(
    root: Path, names: tuple[str, ...], of_file: FileArguments, *, keep: bool, progress: Callable[[str], None]
) -> Iterator[list[Bundle]]:
    """Open bundles; of an ONNX file one is made.

    Args:
        root: folder of bundles.
        names: of bundles, or of one file.
        of_file: what was told of that.
        keep: make it below ``root``, rewritten, as `deploycli import` does, and use it again for the same file; else it
            is of the file as it is, and vanishes.
        progress: is told what runs.

    Raises:
        UsageError, ExportError, IntegrityError, EnvironmentUnsuitable: see `open_bundles`, and
            `deploycli.exporters.imported.import_model`.
    """
    file = file_of(names)
    if file is None:
        yield open_bundles(root, names)
        return
    from deploycli.exporters.imported import ImportOptions, import_model, imported_already
    from deploycli.exporters.typed_file import file_bundle

    if keep:
        options = ImportOptions(file, root, inputs=of_file.inputs, samples=of_file.samples)
        yield [imported_already(options) or import_model(options, progress=progress)]
        return
    with file_bundle(of_file.options(file, file), progress=lambda label, _done, _total: progress(label)) as bundle:
        yield [bundle]


SEEDS = click.IntRange(0, 2**32 - 1)
"""What both NumPy and PyTorch take for a seed."""


MOST = 2**31 - 1
"""What every library below takes for a count."""

MOST_BATCH, MOST_SIDE, MOST_STAGES = 2**20, 2**16, 2**8
"""Beyond these nobody means it, and the machine would run out of memory, samples and pixels."""


class Count(click.ParamType):  # type: ignore[type-arg]  # only new versions of click take one
    """A whole number within bounds.

    Args:
        least: the smallest.
        most: the largest.
    """

    name = "integer"

    def __init__(self, least: int = 1, most: int = MOST) -> None:
        self.least = least
        self.most = most

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Read the number."""
        if (number := whole(str(value), self.least, self.most)) is None:
            self.fail(f"{_shown(value)} is no whole number from {self.least} to {self.most}", param, ctx)
        return number


class Number(click.ParamType):  # type: ignore[type-arg]
    """A finite number within bounds.

    Args:
        least: the smallest.
        most: the largest.
        above: the smallest itself is outside.
    """

    name = "float"

    def __init__(self, least: float, most: float, *, above: bool = False) -> None:
        self.least = least
        self.most = most
        self.above = above

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """Read the number."""
        try:
            number = float(value)
        except ValueError:
            number = math.nan
        if not self.least <= number <= self.most or (self.above and number == self.least):
            start = f"above {self.least:g} and up to" if self.above else f"from {self.least:g} to"
            self.fail(f"{_shown(value)} is no number {start} {self.most:g}", param, ctx)
        return number


def whole(text: str, least: int = 1, most: int = MOST) -> int | None:
    """Read a whole number within bounds; None where it is none."""
    found = re.fullmatch(r"[+-]?[0-9]{1,20}", text.strip())  # int() takes other alphabets too, and refuses long ones
    number = None if found is None else int(found[0])
    return number if number is not None and least <= number <= most else None


def _shown(value: Any) -> str:
    text = str(value)
    return repr(text if len(text) <= 40 else f"{text[:40]}...")


def image_size(text: str) -> tuple[int, int]:
    """Read ``224`` or ``256x192`` (height x width), pixels."""
    sides = [whole(side, most=MOST_SIDE) for side in text.lower().split("x")]
    height, width = sides[0], sides[-1]
    if len(sides) > 2 or height is None or width is None:
        raise click.BadParameter(
            f"{_shown(text)} is no image size; write 224, or 256x192 for height x width, up to {MOST_SIDE}"
        )
    return height, width


def stage_numbers(text: str) -> tuple[int, ...]:
    """Read ``2,3,4``, or ``all``, which is none."""
    if text == "all":
        return ()
    stages = [stage for part in text.split(",") if (stage := whole(part, most=MOST_STAGES)) is not None]
    if len(stages) != text.count(",") + 1:
        raise click.BadParameter(f"{_shown(text)}: write stages as 2,3,4, or all; the first is 1")
    return tuple(stages)


def batch_size(text: str) -> int:
    """Read a batch size, or ``dynamic``, which is 0: click takes None for "not given"."""
    if text == "dynamic":
        return 0
    if (number := whole(text, most=MOST_BATCH)) is None:
        raise click.BadParameter(f"{_shown(text)} is no batch; write dynamic, or a number from 1 to {MOST_BATCH}")
    return number


def batch_sizes(text: str) -> tuple[int, ...]:
    """Read ``1,3,8``."""
    sizes = [size for part in text.split(",") if (size := whole(part, most=MOST_BATCH)) is not None]
    if len(sizes) != text.count(",") + 1:
        raise click.BadParameter(f"{_shown(text)}: write batch sizes as 1,3,8, up to {MOST_BATCH}")
    return tuple(sizes)


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
        value = json.loads(text, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise click.BadParameter(f"{_shown(text)} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise click.BadParameter(f"{text!r} is no JSON object; write '{{\"num_classes\": 10}}'")
    return value


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is none of its numbers")


INPUT_TYPES = ("float32", "float16", "float64", "bool", "uint8", "int8", "int32", "int64")
"""Element types of inputs, the default first."""

_INPUT = "write name:2x3x224x224, the batch first, or name:2x16:int64:0..30521 with a type and a range"


def tensor_spec(text: str) -> TensorSpec:
    """Read ``images:2x3x224x224`` or ``ids:2x16:int64:0..30521``.

    That is a name, a shape whose first axis is the batch, an element type, and for integers the lowest and the highest
    value that they take.
    """
    from deploycli.models.spec import TensorSpec  # what reads JSON takes a while to import

    rest, _, last = text.rpartition(":")
    values = None
    if found := re.fullmatch(r"(-?[0-9]{1,20})\.\.(-?[0-9]{1,20})", last):
        values = int(found[1]), int(found[2])
        rest, _, last = rest.rpartition(":")
        if last not in INPUT_TYPES:
            raise click.BadParameter(f"{_shown(text)} has a range and no type before it; {_INPUT}")
    dtype = INPUT_TYPES[0]
    if rest and re.fullmatch(r"[A-Za-z_]\w*", last):
        if last not in INPUT_TYPES:
            raise click.BadParameter(f"{_shown(last)} is no element type; write one of {', '.join(INPUT_TYPES)}")
        dtype = last
        rest, _, last = rest.rpartition(":")
    name, dims = _named_dims(f"{rest}:{last}", f"no input; {_INPUT}", shown=text)
    try:
        return TensorSpec(name, dims[1:], dtype, values)
    except DeployError as error:
        raise click.BadParameter(f"{_shown(text)}: {error.found}; expected {error.expected}") from None


def input_shape(text: str) -> tuple[str, tuple[int, ...]]:
    """Read ``images:1x3x224x224``: a name, and a whole shape, which may be empty of elements."""
    return _named_dims(text, "no shape of an input; write name:1x3x224x224", least=0)


def _named_dims(text: str, otherwise: str, *, least: int = 1, shown: str = "") -> tuple[str, tuple[int, ...]]:
    name, _, shape = text.rpartition(":")
    written = shape.lower().split("x")
    dims = [dim for part in written if (dim := whole(part, least)) is not None]
    if not name or len(dims) < len(written):
        raise click.BadParameter(f"{_shown(shown or text)} is {otherwise}")
    return name, tuple(dims)


def file_of(names: Sequence[str]) -> Path | None:
    """Return the ONNX file that a command was given in place of bundles, or None.

    Raises:
        UsageError: several files, or a file beside bundles.
    """
    files = [Path(name) for name in names if Path(name).suffix == ".onnx" or Path(name).is_file()]
    if not files:
        return None
    if len(names) > 1:
        raise UsageError(
            f"{files[0]} was given with {len(names) - 1} more", expected="bundles, or one ONNX file",
            hint="one command for each file; deploycli import makes bundles of them",
        )  # fmt: skip
    return files[0]


def given(name: str) -> bool:
    """Say whether a parameter of the running command stands on the command line."""
    return click.get_current_context().get_parameter_source(name) is ParameterSource.COMMANDLINE


def refuse_given(what: str, shown: Mapping[str, str]) -> None:
    """Refuse options that mean nothing here.

    Args:
        what: to what, such as ``to a bundle``.
        shown: name of a parameter -> the option.

    Raises:
        UsageError: one was given.
    """
    for name, option in shown.items():
        if given(name):
            raise click.UsageError(f"{option} means nothing {what}")


def target_of(file: Path, target: Path) -> Path:
    """Return the file to write for one that was read.

    Raises:
        UsageError: none was named.
    """
    if not given("root"):
        raise click.UsageError(f"Missing option '-o' / '--output': name the file to write for {file}.")
    return target


file_input_option = click.option(
    "--input", "inputs", multiple=True, type=tensor_spec, metavar="NAME:SHAPE[:TYPE[:LOW..HIGH]]",
    help="Sizes of an input that an ONNX file leaves open, batch first, and the range of indices: "
    "ids:1x128:int64:0..30521. Repeatable.",
)  # fmt: skip


def open_bundles(root: Path, names: tuple[str, ...]) -> list[Bundle]:
    """Open the named bundles, or all below ``root``; a name is a folder, or a bundle's name below ``root``.

    Raises:
        UsageError: there is none.
        IntegrityError: a file is missing or has changed.
    """
    from deploycli.exporters.bundle.bundle import Bundle, find_bundles

    return [Bundle.open(path) for path in ([bundle_path(root, name) for name in names] or find_bundles(root))]


def bundle_path(root: Path, name: str) -> Path:
    """Return the folder that a name on the command line means."""
    below = root / name
    return below if below.is_dir() or not Path(name).exists() else Path(name)


# --- Options of the commands that change the precision of a bundle


_FILE = click.Path(path_type=Path, dir_okay=False)

samples_option = click.option(
    "--samples", type=Count(), default=512, show_default=True, metavar="N",
    help="At most N samples, evenly over the classes.",
)  # fmt: skip

scheme_option = click.option(
    "--scheme", type=click.Choice(["auto", "gemm", "attention", "full"]), default="auto", show_default=True,
    help="8 bits where an engine then moves fewest bytes; in all products with weights; in those of the attention too; "
    "on residual branches too.",
)  # fmt: skip


def calibration_options(function: F) -> F:
    """Add where ranges come from, beside the data themselves."""
    for option in reversed(
        (
            samples_option,
            click.option(
                "--cache", type=_FILE, metavar="FILE",
                help="Ranges of an earlier calibration: model.int8.calibration.json or model.fp8.calibration.json of a "
                "bundle.",
            ),
            click.option(
                "--allow-random-calibration", is_flag=True,
                help="Calibrate on random numbers. The artifact is marked: it must not be released.",
            ),
            click.option("--seed", type=SEEDS, default=0, show_default=True, help="Seed of the random numbers."),
        )
    ):  # fmt: skip
        function = option(function)
    return function


def typing_options(function: F) -> F:
    """Add what decides which operators stay FP32."""
    for option in reversed(
        (
            click.option(
                "--keep-fp32", multiple=True, metavar="REGEX",
                help="Keep operators whose name (PyTorch module and operator) matches in FP32, such as 'layers.3.*fc2' "
                "or, of attention, Softmax. Repeatable.",
            ),
            click.option(
                "--keep-fp32-file", type=_FILE, metavar="FILE", help="The same, one expression a line; # comments."
            ),
            click.option(
                "--allow-fp16", multiple=True, metavar="RULE",
                help="Switch off a rule that keeps operators FP32: layer-norm, softmax, reduction, integer, range. "
                "Repeatable.",
            ),
            click.option(
                "--io-types", type=click.Choice(["fp32", "fp16"]), default="fp32", show_default=True,
                help="Type of the graph's inputs and outputs.",
            ),
        )
    ):  # fmt: skip
        function = option(function)
    return function


def expressions(given: Iterable[str], file: Path | None) -> tuple[str, ...]:
    """Return the expressions of the command line, and those of a file.

    Raises:
        UsageError: the file cannot be read.
    """
    if file is None:
        return tuple(given)
    try:
        lines = text_of(file).splitlines()
    except (OSError, ValueError) as error:
        raise UsageError(
            f"{file} cannot be read: {error}", expected="a text file with one expression a line"
        ) from error
    return (*given, *(line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")))


def names(given: Sequence[str]) -> frozenset[str]:
    """Split ``a,b`` and repeated options into names."""
    return frozenset(name.strip() for text in given for name in text.split(",") if name.strip())
