"""Run a function in a process of its own, in which ``import tensorrt`` gives a chosen version's bindings."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.exporters.lint.rtx import WHY
from tests.tensorrt_api.bindings import ROOT, Unavailable, environment, prepare

if TYPE_CHECKING:
    from collections.abc import Callable


RTX = "rtx"
"""In place of a version: TensorRT for RTX as it is installed, a real library. The function makes it be ``tensorrt``."""


def require(version: str) -> None:
    """Skip the test where the bindings cannot be had; fail it if ``$DEPLOYCLI_REQUIRE_TRT_BINDINGS`` is set."""
    if version == RTX:
        pytest.importorskip("tensorrt_rtx", reason=WHY)
        return
    try:
        prepare(version)
    except Unavailable as error:
        if os.environ.get("DEPLOYCLI_REQUIRE_TRT_BINDINGS"):
            raise
        pytest.skip(f"no bindings of TensorRT {version}: {error}")


def call(version: str, function: Callable[..., Any], *arguments: Any, timeout: float = 120) -> Any:
    """Call a function of a module that can be imported, where this version is installed and warnings are errors.

    Args:
        version: one of `bindings.VERSIONS`, or `RTX`; the test is skipped if it cannot be had.
        function: at the top of its module; it imports ``tensorrt`` itself.
        *arguments: what JSON can hold; paths become strings.
        timeout: seconds.

    Returns:
        What the function returned, as JSON holds it.

    Raises:
        AssertionError: the function raised; the message is its traceback.
    """
    require(version)
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder, "result.json")
        target = f"{function.__module__}:{function.__qualname__}"
        command = [sys.executable, "-m", "tests.tensorrt_api.child", target, json.dumps(arguments, default=str)]
        run = subprocess.run(
            [*command, str(result)],
            env={**os.environ, "PYTHONPATH": str(ROOT)} if version == RTX else environment(version),
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )
        if run.returncode or not result.exists():
            raise AssertionError(f"{target} with TensorRT {version}, exit {run.returncode}:\n{run.stdout}{run.stderr}")
        return json.loads(result.read_text("utf-8"))


def main(target: str, arguments: str, result: str) -> None:
    """The other side of `call`."""
    module, _, name = target.partition(":")
    function = getattr(importlib.import_module(module), name)
    warnings.simplefilter("error")
    Path(result).write_text(json.dumps(function(*json.loads(arguments))), "utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
