"""Entry point: everything that ends a command ends here, with its documented exit code."""

from __future__ import annotations

import gc
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import NoReturn

from deploycli.interruption import Interrupted, check, interruptible

SHADOWED = 7


def main() -> NoReturn:
    """Run the command line and exit."""
    _refuse_shadowed_packages()
    try:
        with interruptible():
            code = _run()
    except Interrupted as interruption:
        print("interrupted: nothing was written", file=sys.stderr)
        code = interruption.exit_code
    gc.freeze()  # what is left goes with the process; after an export, looking through it takes a second
    sys.exit(code)


def _run() -> int:
    import click

    from deploycli.cli import cli
    from models.errors import DeployError

    try:
        code = cli.main(prog_name="deploycli", standalone_mode=False)
    except Exception as error:
        check()  # the error may be what became of an interruption
        if isinstance(error, click.ClickException):
            error.show()
        elif isinstance(error, DeployError):
            click.echo(f"error: {error}", err=True)
        else:
            raise
        return error.exit_code
    return code if isinstance(code, int) else 0


def _refuse_shadowed_packages() -> None:
    """Stop where a folder of the user's, such as ./models, would be imported in place of a package of ours."""
    home = Path(__file__).resolve().parents[1]
    for package in ("models", "exporters"):
        spec = find_spec(package)
        found = None if spec is None or spec.origin is None else Path(spec.origin).resolve().parent
        if found == home / package:
            continue
        where = found or (next(iter(spec.submodule_search_locations or ()), "nowhere") if spec else "nowhere")
        print(
            f"error: the package {package!r} is imported from {where}\n"
            f"  expected: {home / package}, which belongs to deploycli\n"
            f"  try: the command `deploycli` instead of `python -m deploycli`, from another folder, "
            "or without PYTHONPATH",
            file=sys.stderr,
        )
        sys.exit(SHADOWED)


if __name__ == "__main__":
    main()
