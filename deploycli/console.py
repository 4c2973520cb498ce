"""The one console: everything that people read goes through it, and through `deploycli.ending.say` what ends a command.

Names and texts come from files of strangers. They are escaped when they become part of what is printed: strings that
are printed as they are, cells of tables, text with a style. No markup is read, which brackets in a name would be.
"""

from __future__ import annotations

import json
import shlex
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deploycli.ending import note_step
from deploycli.escaping import escaped
from deploycli.interruption import check
from deploycli.options import DEFAULT_ROOT

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from types import TracebackType

    from rich.progress import Progress as Bars
    from rich.text import Text

    from deploycli.exporters.bundle.bundle import Bundle
    from deploycli.exporters.bundle.manifest import Artifact
    from deploycli.exporters.graph.steps import GraphCost, Step
    from deploycli.exporters.tune import Tuning
    from deploycli.models.spec import Weights
    from deploycli.terminal import Output, Rows


def stdout() -> Output:
    """Return a console that breaks no lines in a file or a pipe."""
    from deploycli.terminal import Output

    console = Output()
    return console if console.is_terminal else Output(width=200)


def stderr() -> Output:
    """Return a console on this very stream, also while something redirects stderr."""
    from deploycli.terminal import Output

    return Output(file=sys.stderr)


def styled(text: str, style: str = "") -> Text:
    """Return text with a style, escaped."""
    from rich.text import Text

    return Text(escaped(text), style)


def assembled(*parts: str | tuple[str, str]) -> Text:
    """Return text in pieces, some of them with a style, escaped."""
    from rich.text import Text

    return Text.assemble(*(escaped(p) if isinstance(p, str) else (escaped(p[0]), p[1]) for p in parts))


def stacked(lines: Iterable[str]) -> Text:
    """Return lines for one cell, each escaped."""
    from rich.text import Text

    return Text("\n").join(map(styled, lines))


def table_of(*columns: str) -> Rows:
    """Return an empty table with these headings."""
    from deploycli.terminal import Rows

    table = Rows(box=None, pad_edge=False, header_style="dim")
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


def fact_table() -> Rows:
    """Return an empty table of facts: what, and which."""
    from deploycli.terminal import Rows

    table = Rows.grid(padding=(0, 2))
    table.add_column(style="dim")
    table.add_column(overflow="fold")
    assert isinstance(table, Rows), "grid makes one of its own class"
    return table


_LOG_EVERY_S = 5.0
"""Seconds between two lines on the progress of one thing, where there is no terminal."""


class Progress:
    """A bar on a terminal; elsewhere some lines a step, so that a log shows where the time goes."""

    def __init__(self) -> None:
        self._console = stderr()
        self._bars = _bars(self._console) if self._console.is_terminal else None
        self._bar = None if self._bars is None else self._bars.add_task("", total=None)
        self._printed = ("", 0.0)  # what was last said off a terminal, and when

    def __call__(self, message: str) -> None:
        """Show what runs now.

        Raises:
            Interrupted: what ran before was to be interrupted, and was not.
        """
        check()
        note_step(message)
        if self._bars is not None and self._bar is not None:
            self._bars.update(self._bar, description=escaped(message), completed=0, total=None)
        else:
            self._console.whole_line(message)

    def count(self, message: str, done: int, total: int) -> None:
        """Show what runs now, and how far it is; off a terminal once in a while.

        Raises:
            Interrupted: see `__call__`.
        """
        check()
        note_step(message)
        if self._bars is not None and self._bar is not None:
            self._bars.update(self._bar, description=escaped(message), completed=min(done + 1, total), total=total)
            return
        said, when = self._printed
        now = time.monotonic()
        if message != said or now - when >= _LOG_EVERY_S or done + 1 >= total:
            self._console.whole_line(f"{message} ({min(done + 1, total)}/{total})" if total > 1 else message)
            self._printed = message, now

    def warn_of_gone(self, bundle: Bundle) -> None:
        """Say what was made from another model.onnx, and went with it."""
        if bundle.gone:
            self.warn(f"{bundle.path} held another model.onnx; gone with it: {', '.join(bundle.gone)}")

    def warn_of(self, weights: Weights, *, chosen: bool = False) -> None:
        """Say what of the weights a user should know, whatever is printed to stdout.

        Args:
            weights: where they came from.
            chosen: the user said which of the file's sets of weights.
        """
        if weights.source == "random":
            self.warn(f"weights: {weights.describe()}. Pass --checkpoint or --pretrained for real ones.")
        if weights.others and not chosen:
            others = ", ".join(map(repr, weights.others))
            read = "EMA weights were read, as timm does" if weights.averaged else f"{weights.entry!r} was read"
            self.warn(f"weights: {read}; the file also holds {others}: --weights-entry chooses.")
        if resampled := weights.report.get("resampled"):
            noun = "position embedding was" if resampled == 1 else f"{resampled} position embeddings were"
            self.warn(f"weights: the {noun} resampled (bicubic) for this image size.")

        if left_out := weights.report.get("left_out"):
            fresh = weights.report.get("fresh", 0)
            new = f"; {fresh} of the maps' own norms, which it does not hold, are new: gain 1, bias 0" if fresh else ""
            self.warn(f"weights: {left_out} tensors of the file are of no map, as a head's, and were left out{new}.")

    def warn(self, message: str) -> None:
        """Say what a user should know, whatever is printed to stdout."""
        self._console.print(styled(message, "yellow"), soft_wrap=True)

    def __enter__(self) -> Progress:
        if self._bars is not None:
            self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bars is not None:
            self._bars.stop()


def _bars(console: Output) -> Bars:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn

    label = TextColumn("{task.description}", markup=False)
    return Progress(SpinnerColumn(), label, BarColumn(), MofNCompleteColumn(), console=console, transient=True)


def print_json(data: Any) -> None:
    """Print JSON to stdout."""
    stdout().verbatim(json.dumps(data, indent=2).replace("\x7f", "\\u007f"))  # all else is ASCII


def next_step(console: Output, bundle: Bundle) -> None:
    """Print what to do with a new artifact."""
    console.print(f"next: deploycli verify {_argument(bundle)}")


def show_artifact(console: Output, bundle: Bundle, artifact: Artifact) -> None:
    """Print one file of a bundle."""
    size = artifact.file.size + sum(record.size for record in artifact.external)
    batch = "dynamic" if artifact.batch is None else str(artifact.batch)
    before, after = sum(artifact.ops_before.values()), sum(artifact.ops_after.values())
    console.print(
        styled(str(bundle.path / artifact.file.path), "bold"),
        f"{size_text(size)}, {artifact.precision}, opset {artifact.opset}, batch {batch}",
        soft_wrap=True,
    )
    refusals = sum(len(step.refusals) for step in artifact.steps)
    show_remarks(console, artifact.steps)
    if artifact.source:
        console.print(f"  from {artifact.source}: {before} nodes before, {after} after")
    else:
        there = "in the file" if artifact.steps and artifact.steps[0].name == "import" else "traced"
        console.print(f"  {before} nodes {there}, {after} written; {refusals} refusal{'s' * (refusals != 1)}")
    if artifact.unreleasable:
        console.print(styled(f"  NOT FOR RELEASE: {artifact.unreleasable}", "bold red"))


def show_remarks(console: Output, steps: Sequence[Step]) -> None:
    """Print what kept passes from acting on the graph as a whole."""
    for remark in dict.fromkeys(step.remark for step in steps if step.remark):
        console.print(styled(f"remark: {remark}", "yellow"), soft_wrap=True)


def show_steps(console: Output, steps: Sequence[Step], *, refusals: bool = True) -> None:
    """Print what was done, what the graph costs after it, and what was refused."""
    table = table_of("step", "nodes", "moved MB", "GMACs", "constants MB", "seconds", "refusals")
    for step in steps:
        table.add_row(
            step.name, str(step.nodes), *cost_cells(step.cost), f"{step.seconds:.2f}", str(len(step.refusals) or "")
        )
    console.print(table)
    for step in steps if refusals else ():
        for refusal in step.refusals:
            did = "changed" if refusal.reason.startswith("rescaled:") else "left"
            console.print(f"  {step.name} {did} {refusal.node}: {refusal.reason}", soft_wrap=True)


def show_tuning(console: Output, tuning: Tuning) -> None:
    """Print which forms of a graph were compiled, and what the compiler made of each."""
    table = table_of("form", "launches", "moved MB", "attention", "")
    for one in tuning.tried:
        known = one.launches is not None
        moved = f"{(one.moved or 0) / 1e6:.1f}" if known else ""
        said = ", ".join(filter(None, ("kept" * (one.form == tuning.best), one.remark)))
        table.add_row(one.form, str(one.launches or ""), moved, str(one.attention) if known else "", said)
    console.print(table)
    if tuning.left:
        console.print(f"no time for {', '.join(tuning.left)}: --tune-seconds", soft_wrap=True)
    gpus = ", ".join(f"{major}.{minor}" for major, minor in tuning.targets)
    console.print(f"counted for FP16, batch {tuning.batch}, GPU {gpus}, TensorRT for RTX {tuning.compiler}; not timed")


def cost_cells(cost: GraphCost | None) -> tuple[str, str, str]:
    """Return bytes moved and multiply-adds, both for an image, and the bytes of the constants."""
    if cost is None:
        return "", "", ""
    moved = "not known" if cost.movement_bytes is None else f"{cost.movement_bytes / 1e6:.1f}"
    products = "not known" if cost.multiply_adds is None else f"{cost.multiply_adds / 1e9:.2f}"
    return moved, products, f"{cost.constant_bytes / 1e6:.1f}"


def interval_text(shares: tuple[float, float]) -> str:
    """Return an interval of shares for people."""
    return f"{shares[0]:.2%} to {shares[1]:.2%}"


def size_text(size: int) -> str:
    """Return a number of bytes in words."""
    return f"{size / 1e6:.1f} MB" if size < 1e9 else f"{size / 1e9:.2f} GB"


def quoted(path: Path) -> str:
    """Return a path as a shell reads it."""
    return shlex.quote(str(path))


def _argument(bundle: Bundle) -> str:
    return quoted(Path(bundle.path.name) if bundle.path.parent == DEFAULT_ROOT else bundle.path)
