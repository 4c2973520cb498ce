"""Entry point: everything that ends a command ends here, with its documented exit code."""

from __future__ import annotations

import signal
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import NoReturn

SHADOWED = 7
INTERRUPTED = 130
TERMINATED = 143


def main() -> NoReturn:
    """Run the command line and exit."""
    _refuse_shadowed_packages()
    import click

    from deploycli.cli import cli
    from models.errors import DeployError

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(TERMINATED))  # unwinds, so that nothing half-written stays
    try:
        code = cli.main(prog_name="deploycli", standalone_mode=False)
    except DeployError as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(error.exit_code)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (click.Abort, KeyboardInterrupt):
        click.echo("interrupted: nothing was written", err=True)
        sys.exit(INTERRUPTED)
    except BrokenPipeError:  # the reader of our output, such as head, has enough
        sys.stderr.close()
        sys.exit(0)
    sys.exit(code if isinstance(code, int) else 0)


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
