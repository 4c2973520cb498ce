"""The command group. A command's module is imported when the command is called: help answers at once."""

from __future__ import annotations

import importlib
from importlib.metadata import PackageNotFoundError, version

import click

# name -> one line of help; the module deploycli.commands.<name> (build_trt for build-trt) holds `command`; of import,
# which is a word of Python's, it is import_onnx.
COMMANDS = {
    "bench": "Time a bundle: eager, compiled, ONNX Runtime, engines.",
    "build-trt": "Build TensorRT engines, prove their precision.",
    "cast": "Write the strongly typed FP16 or BF16 graph of a bundle.",
    "export": "Trace a model, rewrite its graph, write a checked bundle.",
    "import": "Make a bundle of any ONNX file.",
    "inspect": "Show what is in a bundle or an ONNX file.",
    "lint": "Judge ONNX files as TensorRT will, without TensorRT.",
    "list": "List the models that have a name.",
    "optimize": "Rewrite the graph of any ONNX file, and check the answers.",
    "package": "Write a Triton model repository from verified bundles.",
    "predict": "Run a bundle or an ONNX file on pictures: the best classes.",
    "quantize": "Write the INT8 or FP8 graph of a bundle, calibrated on data.",
    "verify": "Compare every artifact of a bundle with the eager model.",
}


def _module(name: str) -> str:
    return "import_onnx" if name == "import" else name.replace("-", "_")


class LazyGroup(click.Group):
    """A group that imports a command's module only when the command is called."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the names of the commands."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import a command."""
        if cmd_name not in COMMANDS:
            return None
        command: click.Command = importlib.import_module(f"deploycli.commands.{_module(cmd_name)}").command
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the list of commands without importing them."""
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


def _print_version(ctx: click.Context, _param: click.Parameter, value: bool) -> None:
    if not value or ctx.resilient_parsing:
        return
    try:
        click.echo(f"deploycli {version('deploycli')}")
    except PackageNotFoundError:
        click.echo("deploycli, run from a source tree that is not installed")
    ctx.exit()


@click.group(
    cls=LazyGroup,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="Exit codes: 0 done, 1 bug, 2 usage, 3 export, 4 engine build, 5 numbers outside the budget, "
    "6 precision or speed, 7 environment, 8 integrity, 130 interrupted.",
)
@click.option(
    "--version", is_flag=True, is_eager=True, expose_value=False, callback=_print_version, help="Show the version."
)
def cli() -> None:
    """Vision transformers from PyTorch to TensorRT, proven against the eager model at every step.

    \b
    Example:
      deploycli export swin_t --fmt onnx
      deploycli verify
    """
