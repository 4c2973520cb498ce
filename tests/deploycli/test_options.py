"""Numbers on the command line: every option has bounds, and what is outside is exit 2."""

from __future__ import annotations

import math
from contextlib import suppress
from typing import TYPE_CHECKING

import click
import pytest
from click.types import FuncParamType
from hypothesis import given
from hypothesis import strategies as st

from deploycli.cli import COMMANDS, cli
from deploycli.exporters.target.settings import parse_size
from deploycli.models.errors import UsageError
from deploycli.options import MOST, Count, Number, whole
from tests.deploycli.commands import assert_refused

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.deploycli.conftest import Command

NO_NUMBERS = ("", " ", "nan", "inf", "-inf", "1e999", "-1", "9" * 20, "9" * 5000, "²", "٣", "0x10", "1_000", "1;2")


def options() -> Iterator[tuple[str, click.Parameter]]:
    context = click.Context(cli)
    for name in COMMANDS:
        command = cli.get_command(context, name)
        assert command is not None
        for parameter in command.params:
            yield name, parameter


NUMERIC = [
    pytest.param(command, parameter.opts[0], id=f"{command} {parameter.opts[0]}")
    for command, parameter in options()
    if isinstance(parameter.type, Count | Number)
]
READ = [
    pytest.param(parameter.type, id=f"{command} {parameter.opts[0]}")
    for command, parameter in options()
    if isinstance(parameter.type, FuncParamType)
]


def test_no_number_is_without_bounds() -> None:
    for command, parameter in options():
        kind = parameter.type
        where = f"{command} {parameter.opts[0]}"
        assert not isinstance(kind, click.FloatRange), where
        assert kind is not click.FLOAT, where
        if isinstance(kind, click.IntRange):
            assert None not in (kind.min, kind.max), where
        if isinstance(kind, Number):
            assert math.isfinite(kind.least), where
            assert math.isfinite(kind.most), where
    assert len(NUMERIC) >= 15


@pytest.mark.parametrize(("command", "option"), NUMERIC)
def test_a_number_outside_its_bounds(deploycli: Command, command: str, option: str) -> None:
    required = {"optimize": ["in.onnx"], "export": ["swin_t"], "package": ["--triton", "models"]}
    for text in ("-1", "99999999999999999999", "nan", "inf"):
        assert_refused(deploycli(command, *required.get(command, []), option, text), 2, option, "no ", "number")


@pytest.mark.parametrize("kind", READ)
def test_what_reads_an_option_refuses_or_returns(kind: click.ParamType) -> None:
    for text in (
        *NO_NUMBERS,
        "x:1x-1",
        "x:1x²",
        f"x:1x{'9' * 5000}",
        "1:2:x",
        "²:²:²",
        "x" * 5000,
        "\0",
        "0:fp16",
        "[" * 100_000,
        '{"a": NaN}',
    ):
        with suppress(click.BadParameter, UsageError):
            kind.convert(text, None, None)


@given(st.integers(-5, 2**40), st.integers(0, 3), st.integers(3, MOST))
def test_whole_numbers(number: int, least: int, most: int) -> None:
    assert whole(str(number), least, most) == (number if least <= number <= most else None)


@given(st.text())
def test_any_text_is_a_number_or_none(text: str) -> None:
    number = whole(text)
    assert number is None or 1 <= number <= MOST


def test_what_json_does_not_know(deploycli: Command) -> None:
    for text in ('{"a": NaN}', '{"a": -Infinity}', "[" * 100_000):
        assert_refused(deploycli("export", "timm:vit", "--model-kwargs", text), 2, "is not JSON")


@pytest.mark.parametrize("text", ["0", "9" * 400, "1e9", "-1G", "2000000G", "nan"])
def test_sizes_of_the_workspace(text: str) -> None:
    with pytest.raises(UsageError, match="is no size"):
        parse_size(text)
