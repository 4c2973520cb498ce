"""Entry point: everything that ends a command ends here, with its documented exit code."""

from __future__ import annotations

import gc
import os
import sys
from typing import NoReturn

from deploycli.interruption import Interrupted, check, interruptible

COMPLETION = "_DEPLOYCLI_COMPLETE"


def main() -> NoReturn:
    """Run the command line and exit; where the process is the program, and no other's that calls it, in a child."""
    if __name__ == "__main__" or getattr(sys.modules["__main__"], "main", None) is main:
        from deploycli.guard import guarded

        guarded(_main)
    _main()


def _main() -> NoReturn:
    from deploycli.ending import finish_output, say, say_traceback, tolerate_encodings

    sys.excepthook = say_traceback
    tolerate_encodings()
    try:
        with interruptible():
            code = _run()
    except Interrupted as interruption:
        say("interrupted: nothing was written")
        code = interruption.exit_code
    if (fault := finish_output()) is not None:
        say(f"error: {fault}")
        code = code or fault.exit_code
    gc.freeze()  # what is left goes with the process; after an export, looking through it takes a second
    sys.exit(code)


def _run() -> int:
    import click

    from deploycli.cli import cli
    from deploycli.ending import explain, reader_left, say, say_usage

    stream = sys.stdout
    try:
        code = cli.main(prog_name="deploycli", standalone_mode=False)
    except Interrupted:
        raise
    except BaseException as error:
        check()  # the error may be what became of an interruption
        if isinstance(error, SystemExit) and COMPLETION in os.environ:
            raise  # how click ends when a shell asks it
        if isinstance(error, SystemExit) and sys.stdout is not stream and reader_left():
            return 0  # how click ends, another stream in place, when nobody reads all of a help
        if isinstance(error, click.ClickException):
            say_usage(error)
            return error.exit_code
        told = explain(error)
        if told is None:
            raise
        say(f"error: {told}")
        return told.exit_code
    return code if isinstance(code, int) else 0


if __name__ == "__main__":
    main()
