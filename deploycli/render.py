"""What people read: results on stdout, progress on stderr. Nothing here computes."""

from __future__ import annotations

import json
import shlex
import time
from typing import TYPE_CHECKING, Any

from rich.progress import BarColumn, MofNCompleteColumn, SpinnerColumn, TextColumn
from rich.progress import Progress as Bars

from deploycli.console import Output, Rows, stderr, stdout, styled, table_of
from deploycli.console import facts as fact_table
from deploycli.ending import note_step
from deploycli.escaping import escaped
from deploycli.interruption import check
from deploycli.options import DEFAULT_ROOT

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from types import TracebackType

    from deploycli.exporters.bundle.bundle import Bundle, ModelFile, OnnxFile
    from deploycli.exporters.bundle.manifest import Artifact
    from deploycli.exporters.graph.steps import GraphCost, Step
    from deploycli.exporters.inspect import OnnxSummary
    from deploycli.exporters.verification.evaluate import Evaluation
    from deploycli.exporters.verification.report import Report, Stage
    from deploycli.models.spec import TensorInfo, Weights
    from deploycli.models.variants import Variant


_LOG_EVERY_S = 5.0
"""Seconds between two lines on the progress of one thing, where there is no terminal."""


class Progress:
    """A bar on a terminal; elsewhere some lines a step, so that a log shows where the time goes."""

    def __init__(self) -> None:
        self._console = stderr()
        label = TextColumn("{task.description}", markup=False)
        columns = (SpinnerColumn(), label, BarColumn(), MofNCompleteColumn())
        self._bars = Bars(*columns, console=self._console, transient=True) if self._console.is_terminal else None
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
            self._console.whole_line(f"{message} ({min(done + 1, total)}/{total})")
            self._printed = message, now

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


def print_json(data: Any) -> None:
    """Print JSON to stdout."""
    stdout().verbatim(json.dumps(data, indent=2).replace("\x7f", "\\u007f"))  # all else is ASCII


def show_variants(variants: Sequence[Variant]) -> None:
    """Print the table of models."""
    table = table_of("model", "summary", "image", "also called")
    for variant in variants:
        _, height, width = variant.spec.inputs[0].shape
        table.add_row(variant.name, variant.summary, f"{height}x{width}", ", ".join(variant.aliases[:1]))
    stdout().print(table)


def show_export(bundle: Bundle, *, verbose: bool) -> None:
    """Print what an export made, and what to do next."""
    console = stdout()
    manifest = bundle.manifest
    if manifest.weights.source != "random":  # of which progress warns
        told = manifest.weights.describe()
        line = told if told.startswith("weights") else f"weights: {told}"
        console.print(line, soft_wrap=True)
    for artifact in manifest.artifacts:
        show_artifact(console, bundle, artifact)
    if verbose:
        show_steps(console, manifest.artifacts[-1].steps)
    next_step(console, bundle)


def show_bundle(bundle: Bundle, files: Sequence[OnnxFile], *, verbose: bool) -> None:
    """Print a bundle and its ONNX files, with whether they are verified."""
    console = stdout()
    manifest = bundle.manifest
    console.print(styled(str(bundle.path), "bold"), f"(deploycli {manifest.tool_version}, all hashes match)")
    facts = fact_table()
    facts.add_row("model", f"{manifest.spec.name} ({manifest.spec.family})")
    facts.add_row("weights", manifest.weights.describe())
    if manifest.weights.report:
        facts.add_row("", ", ".join(f"{count} {what}" for what, count in manifest.weights.report.items()))
    for spec in manifest.spec.inputs:
        facts.add_row("input", f"{spec.name} {spec.dtype} [batch, {', '.join(map(str, spec.shape))}]")
    facts.add_row("output", ", ".join(manifest.spec.outputs))
    if (recipe := manifest.preprocessing) is not None:
        side = "x".join(map(str, recipe.size))
        facts.add_row("images", f"crop {side}, {recipe.crop_pct:.3g} of the shorter side, {recipe.interpolation}")
        facts.add_row("", f"mean {_triple(recipe.mean)}, std {_triple(recipe.std)}")
    facts.add_row("versions", ", ".join(f"{name} {number}" for name, number in manifest.versions.items()))
    console.print(facts)
    for file in files:
        console.print()
        show_artifact(console, bundle, file.artifact)
        _show_verdict(console, file)
        console.print(_op_table(file.artifact.ops_before, file.artifact.ops_after))
        show_steps(console, file.artifact.steps, refusals=verbose)
    console.print()
    records = table_of("file", "bytes", "sha256")
    for record in manifest.records():
        records.add_row(record.path, f"{record.size:,}", record.sha256)
    console.print(records)


def _show_verdict(console: Output, file: ModelFile) -> None:
    verdict = file.verdict
    if verdict.passed:
        last = file.verification
        console.print("  verified:", styled("ok", "green"), f"(reference: {last.reference}, {last.time})")
    else:
        style = "bold red" if verdict.status == "failed" else "yellow"
        console.print("  verified:", styled(verdict.status, style), f"({verdict.reason})", soft_wrap=True)


def show_onnx(summary: OnnxSummary) -> None:
    """Print an ONNX file."""
    console = stdout()
    console.print(
        styled(summary.path, "bold"), f"({size_text(summary.size)}, {summary.producer or 'unknown producer'})"
    )
    facts = fact_table()
    for what, tensors in (("input", summary.inputs), ("output", summary.outputs)):
        for tensor in tensors:
            facts.add_row(what, _tensor(tensor))
    facts.add_row("opset", f"{summary.opset}, IR version {summary.ir_version}")
    facts.add_row("parameters", f"{summary.parameters:,}")
    facts.add_row("nodes", f"{sum(summary.ops.values()):,}")
    if summary.cost is not None:
        moved, products, kept = _cost_cells(summary.cost)
        facts.add_row("costs", f"{moved} MB moved, {products} GMACs, {kept} MB of constants")
    console.print(facts)
    ops = table_of("operator", "nodes")
    for op, count in summary.ops.items():
        ops.add_row(op, str(count))
    console.print(ops)
    largest = table_of("largest constants", "bytes")
    for name, size in summary.largest.items():
        largest.add_row(name, f"{size:,}")
    console.print(largest)


def show_onnx_against(summaries: Sequence[OnnxSummary]) -> None:
    """Print two ONNX files side by side: operators, costs and sizes."""
    console = stdout()
    table = table_of("operator", *(summary.path for summary in summaries))
    for op in dict.fromkeys(op for summary in summaries for op in summary.ops):
        table.add_row(op, *(str(summary.ops.get(op, "-")) for summary in summaries))
    table.add_row("all nodes", *(f"{sum(summary.ops.values()):,}" for summary in summaries))
    table.add_row("opset", *(str(summary.opset) for summary in summaries))
    table.add_row("parameters", *(f"{summary.parameters:,}" for summary in summaries))
    table.add_row("file", *(size_text(summary.size) for summary in summaries))
    costs = [("?",) * 3 if summary.cost is None else _cost_cells(summary.cost) for summary in summaries]
    for what, cells in zip(("MB moved", "GMACs", "MB of constants"), zip(*costs, strict=True), strict=True):
        table.add_row(what, *cells)
    console.print(table)


def show_reports(reports: Sequence[Report]) -> None:
    """Print the verdict on every bundle."""
    console = stdout()
    for report in reports:
        console.print(styled(report.bundle, "bold"), f"({report.weights}; reference: {_reference(report)})")
        table = table_of("artifact", "check", "output", "rel. error", "budget", "cosine", "top-1", "")
        for stage in report.stages:
            _add_stage(table, stage)
        console.print(table)
        if report.evaluations:
            console.print(_accuracy_table(report.evaluations))
        if report.skipped:
            named = ", ".join(report.skipped[:3]) + (", ..." if len(report.skipped) > 3 else "")
            console.print(
                styled(f"{len(report.skipped)} skipped, could not be read: {named}", "yellow"), soft_wrap=True
            )
        for note in report.notes:
            console.print(styled(note, "yellow"), soft_wrap=True)
        for left_out in report.not_judged:
            console.print(styled(f"NOT JUDGED {left_out.artifact}: {left_out.reason}", "bold yellow"), soft_wrap=True)
            console.print(f"  {report.origin(left_out.engine)}", soft_wrap=True)
        for why in report.unreleasable:
            console.print(styled(f"NOT FOR RELEASE {why}", "bold red"), soft_wrap=True)
        for failure in report.failures:
            console.print(styled(f"FAILED {failure}", "bold red"), soft_wrap=True)
        if report.passed:
            count = len(report.not_judged)
            left = f"; {count} engine{'s' * (count > 1)} not run here, and so not judged" if count else ""
            console.print(styled("passed", "bold green"), f"{len(report.stages)} checks{left}")


def _add_stage(table: Rows, stage: Stage) -> None:
    for comparison in stage.comparisons:
        error, cosine, top1 = comparison.max_rel_error, comparison.cosine, comparison.top1
        table.add_row(
            f"{stage.artifact} (simulated)" if "simulated" in stage.runtime else stage.artifact,
            stage.check if stage.check.startswith("batch") else f"{stage.samples} {stage.check}",
            comparison.name,
            "-" if error is None else f"{error:.1e}",
            f"{comparison.budget.max_rel_error:.0e}",
            "-" if cosine is None else f"{cosine:.6f}",
            "-" if top1 is None else f"{top1.agreed}/{top1.decided} ({top1.samples})",
            styled("ok", "green") if comparison.passed else styled("FAILED", "bold red"),
        )


def _accuracy_table(evaluations: Sequence[Evaluation]) -> Rows:
    table = table_of(
        "model", "labelled", "top-1", "95 % interval", "top-5", "95 % interval", "top-1 lost", "budget", ""
    )
    for evaluation in evaluations:
        found, lost, allowed = evaluation.accuracy, evaluation.top1_lost, evaluation.max_top1_drop
        verdict = styled("FAILED", "bold red") if evaluation.reasons else styled("ok", "green")
        table.add_row(
            evaluation.artifact or "eager",
            str(found.samples),
            f"{found.top1:.2%}",
            _interval(found.top1_interval),
            "-" if found.top5 is None else f"{found.top5:.2%}",
            "-" if found.top5_interval is None else _interval(found.top5_interval),
            "-" if lost is None else f"{100 * lost:.2f} points",
            "-" if allowed is None else f"{100 * allowed:.2f}",
            "" if lost is None or allowed is None else verdict,
        )
    return table


def _interval(shares: tuple[float, float]) -> str:
    return f"{shares[0]:.2%} to {shares[1]:.2%}"


def _reference(report: Report) -> str:
    return report.reference_note or report.reference


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
        console.print(f"  {before} nodes traced, {after} written; {refusals} refusal{'s' * (refusals != 1)}")
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
            step.name, str(step.nodes), *_cost_cells(step.cost), f"{step.seconds:.2f}", str(len(step.refusals) or "")
        )
    console.print(table)
    for step in steps if refusals else ():
        for refusal in step.refusals:
            console.print(f"  {step.name} left {refusal.node}: {refusal.reason}", soft_wrap=True)


def _cost_cells(cost: GraphCost | None) -> tuple[str, str, str]:
    """Return bytes moved and multiply-adds, both for an image, and the bytes of the constants."""
    if cost is None:
        return "", "", ""
    moved = "not known" if cost.movement_bytes is None else f"{cost.movement_bytes / 1e6:.1f}"
    products = "not known" if cost.multiply_adds is None else f"{cost.multiply_adds / 1e9:.2f}"
    return moved, products, f"{cost.constant_bytes / 1e6:.1f}"


def _op_table(before: Mapping[str, int], after: Mapping[str, int]) -> Rows:
    table = table_of("operator", "traced", "written")
    for op in sorted({*before, *after}, key=lambda op: (-after.get(op, 0), -before.get(op, 0), op)):
        table.add_row(op, str(before.get(op, "")), str(after.get(op, "")))
    table.add_section()
    table.add_row("all", str(sum(before.values())), str(sum(after.values())))
    return table


def _tensor(tensor: TensorInfo[str]) -> str:
    return f"{tensor.name} {tensor.dtype} [{', '.join(tensor.shape)}]"


def _triple(values: Sequence[float]) -> str:
    return " ".join(f"{value:.3g}" for value in values)


def size_text(size: int) -> str:
    """Return a number of bytes in words."""
    return f"{size / 1e6:.1f} MB" if size < 1e9 else f"{size / 1e9:.2f} GB"


def _argument(bundle: Bundle) -> str:
    path = bundle.path.name if bundle.path.parent == DEFAULT_ROOT else str(bundle.path)
    return shlex.quote(path)
