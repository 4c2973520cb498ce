"""What people read of packaged models."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING

from deploycli.console import stdout, styled
from deploycli.render import size_text

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from exporters.triton_repository import Packaged


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
        console.print(f"  from {version.bundle}/{version.artifact}, verified: {version.verified}", soft_wrap=True)
        for note in version.notes:
            console.print(f"  {note}", soft_wrap=True)
        for why in version.forced:
            console.print(styled(f"  NOT FOR RELEASE: {why}", "bold red"), soft_wrap=True)
    console.print(f"next: tritonserver --model-repository {shlex.quote(str(repository))}", soft_wrap=True)
