"""Options of the commands that change the precision of a bundle."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from deploycli.models.errors import UsageError
from deploycli.models.files import text_of
from deploycli.options import SEEDS, Count

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

F = TypeVar("F", bound="Callable[..., Any]")

_FILE = click.Path(path_type=Path, dir_okay=False)

samples_option = click.option(
    "--samples", type=Count(), default=512, show_default=True, metavar="N",
    help="At most N samples, evenly over the classes.",
)  # fmt: skip

scheme_option = click.option(
    "--scheme", type=click.Choice(["gemm", "attention", "full"]), default="gemm", show_default=True,
    help="INT8 in products with weights; in those of the attention too; on residual branches too.",
)  # fmt: skip


def calibration_options(function: F) -> F:
    """Add where ranges come from, beside the data themselves."""
    for option in reversed(
        (
            samples_option,
            click.option(
                "--cache", type=_FILE, metavar="FILE",
                help="Ranges of an earlier calibration: model.int8.calibration.json of a bundle.",
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
