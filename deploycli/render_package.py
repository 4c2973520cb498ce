"""What people read of packaged models."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING

from deploycli.console import stdout, styled
from deploycli.render import size_text

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from deploycli.exporters.serving.ort_rtx import PackagedFolder
    from deploycli.exporters.serving.triton_repository import Packaged


def show_packaged(packaged: Sequence[Packaged], repository: Path) -> None:
    """Print the versions that were written, and how to serve them."""
    console = stdout()
    for version in packaged:
        batch = f"batches up to {version.max_batch_size}" if version.max_batch_size else "a fixed batch"
        console.print(
            styled(version.path, "bold"),
            f"{size_text(version.size)}, {version.flavour} {version.precision}, {batch}",
            soft_wrap=True,
        )
        _show_source(version)
        for note in version.notes:
            console.print(f"  {note}", soft_wrap=True)
        _show_forced(version)
    console.print(f"next: tritonserver --model-repository {shlex.quote(str(repository))}", soft_wrap=True)


def show_folders(folders: Sequence[PackagedFolder]) -> None:
    """Print the folders for ONNX Runtime that were written, and how to try them."""
    console = stdout()
    for folder in folders:
        console.print(
            styled(folder.path, "bold"),
            f"{size_text(folder.size)}, {folder.precision}, for ONNX Runtime with the TensorRT RTX provider",
            soft_wrap=True,
        )
        _show_source(folder)
        shapes = [folder.provider_options.get(f"nv_profile_{which}_shapes", "") for which in ("min", "opt", "max")]
        if shapes[0]:
            of = f", those of {folder.engine}" if folder.engine else ""
            console.print(f"  shapes {' / '.join(shapes)}{of}", soft_wrap=True)
        _show_forced(folder)
    for folder in folders:
        console.print(f"next: python {shlex.quote(folder.path + '/load.py')}", soft_wrap=True)


def _show_source(packaged: Packaged | PackagedFolder) -> None:
    line = f"  from {packaged.bundle}/{packaged.artifact}, verified: {packaged.verified}"
    stdout().print(line, soft_wrap=True)


def _show_forced(packaged: Packaged | PackagedFolder) -> None:
    for why in packaged.forced:
        stdout().print(styled(f"  NOT FOR RELEASE: {why}", "bold red"), soft_wrap=True)
