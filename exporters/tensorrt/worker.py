"""What builds one engine: in a child of `deploycli.exporters.tensorrt.child`, or alone, to see it fail again:
``python -m deploycli.exporters.tensorrt.worker .../job.json``.

TensorRT may crash, hang or be killed for memory; it then takes this process with it and no other. Its messages go to
``builder.log``; in the child, whatever else is printed goes there as well.
"""

from __future__ import annotations

import faulthandler
import os
import signal
import sys
import traceback
from pathlib import Path
from typing import TYPE_CHECKING

from deploycli.exporters.tensorrt import library
from deploycli.exporters.tensorrt.job import LOG, Job
from deploycli.models.errors import BuildError, DeployError, first_line

if TYPE_CHECKING:
    from collections.abc import Callable

    from deploycli.exporters.tensorrt.job import BuildResult, Progress

_DROPPED = ("POLYGRAPHY_AUTOINSTALL_DEPS", "POLYGRAPHY_ASK_BEFORE_INSTALL", "POLYGRAPHY_USE_TENSORRT_RTX")
"""A build installs no packages, and Polygraphy configures TensorRT alone."""


def work(job: Job, *, progress: Callable[[Progress], None]) -> BuildResult | DeployError:
    """Run one job; return its result, or what failed where that can be explained."""
    for name in _DROPPED:
        os.environ.pop(name, None)
    faulthandler.enable(all_threads=False)
    try:
        library.use(job.product)
        # They import TensorRT, or take long to import.
        from deploycli.exporters.tensorrt.builder import build
        from deploycli.exporters.tensorrt.callbacks import Log

        with job.file(LOG).open("a", encoding="utf-8", errors="backslashreplace") as stream:
            return build(job, progress, Log(stream, verbose=job.verbose))
    except DeployError as error:
        return error
    except MemoryError:
        traceback.print_exc()
        return BuildError("the builder ran out of memory", hint="a machine with more memory")
    except Exception as error:
        traceback.print_exc()
        return BuildError(f"the builder failed: {type(error).__name__}: {first_line(error)}")


def main(path: str) -> int:
    """Run one job while somebody is looking; return the exit code."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Python's own handler would wait until TensorRT returns
    try:
        found = work(Job.load(Path(path)), progress=lambda now: print(f"{now.phase}: {now.step} of {now.total}"))
    except DeployError as error:
        found = error
    if isinstance(found, DeployError):
        print(f"error: {found}", file=sys.stderr)
        return found.exit_code
    return 0


if __name__ == "__main__":
    code = main(*sys.argv[1:])
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # all is written: a crash of some library's while the interpreter ends would tell nothing
