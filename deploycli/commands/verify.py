"""deploycli verify."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

import click

from deploycli.console import Progress, interval_text, print_json, stacked, stdout, styled, table_of
from deploycli.models.errors import EnvironmentUnsuitable
from deploycli.options import (
    SEEDS,
    Count,
    batch_sizes,
    checkpoint_option,
    file_of,
    json_option,
    labels_source,
    open_bundles,
    output_option,
    refuse_given,
    run_options,
    tolerance,
    trust_option,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.text import Text

    from deploycli.exporters.compare_files import FileComparison
    from deploycli.exporters.verification.accuracy import Evaluation
    from deploycli.exporters.verification.compare import Comparison
    from deploycli.exporters.verification.report import Report, Stage
    from deploycli.options import FileArguments
    from deploycli.terminal import Rows


@click.command("verify")
@click.argument("bundles", nargs=-1, metavar="[BUNDLE|A.onnx]...")
@output_option
@click.option("--batches", type=batch_sizes, default="1,3,8", show_default=True, metavar="N,N,...", help="Batch sweep.")
@click.option(
    "--images",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Compare on these pictures too, prepared as the manifest says; or on a .npy or .npz file of prepared inputs, "
    "or on what package.module:factory returns.",
)
@click.option(
    "--labels",
    type=labels_source,
    metavar="folders|FILE.csv",
    help="Count top-1 and top-5 on the pictures: their classes are their folders, as in ImageFolder, or lines "
    "path,class of a CSV file.",
)
@click.option("--limit", type=Count(), metavar="N", help="At most N pictures, evenly over the classes.")
@click.option(
    "--reference",
    type=click.Choice(["auto", "eager", "golden"]),
    default="auto",
    show_default=True,
    help="What to compare with: the eager model, or what it answered at export (golden.npz), which needs no PyTorch; "
    "auto: eager where PyTorch and the weights are at hand.",
)
@checkpoint_option
@trust_option
@click.option(
    "--rtol",
    type=tolerance,
    multiple=True,
    metavar="[OUT:]VALUE",
    help="Largest relative error, in place of the budget: 1e-3, or logits:1e-3.",
)
@click.option(
    "--engines",
    type=click.Choice(["auto", "all", "none"]),
    default="auto",
    show_default=True,
    help="TensorRT engines: auto judges those that this machine can run and lists the others as NOT JUDGED; all: "
    "exit 7 where one cannot run.",
)
@click.option(
    "--allow-engine-host-code", is_flag=True, help="Run version compatible engines: they hold code for this CPU."
)
@click.option("--seed", type=SEEDS, default=0, show_default=True, help="Seed of the synthetic inputs.")
@click.option(
    "--against",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="B.onnx",
    help="Compare the file A.onnx with this one, which is right.",
)
@run_options
@json_option
def command(
    bundles: tuple[str, ...],
    root: Path,
    batches: tuple[int, ...],
    images: Path | None,
    labels: Path | Literal["folders"] | None,
    limit: int | None,
    reference: str,
    checkpoint: Path | None,
    trust_factory: bool,
    rtol: tuple[tuple[str, float], ...],
    seed: int,
    engines: Literal["auto", "all", "none"],
    allow_engine_host_code: bool,
    against: Path | None,
    as_json: bool,
    of_file: FileArguments,
) -> int:
    """Compare every file and engine of BUNDLE (or of every bundle) with the eager model, or A.onnx with B.onnx; exit 5
    where one is outside.

    Each artifact runs at every batch of the sweep, and at the largest one in another order, which must only reorder
    the outputs.

    The report is kept in the bundle, as reports/verify.json: `deploycli package` asks for it.

    \b
    Examples:
      deploycli verify
      deploycli verify swin_t --images photos/ --batches 1,16
      deploycli verify swin_t --images imagenet/val --labels folders
      deploycli verify --reference golden --json
      deploycli verify model.fp16.onnx --against model.onnx
      deploycli verify text.int8.onnx --against text.onnx --inputs samples.npz
    """
    file = file_of(bundles)
    if file is not None or against is not None:
        if file is None or against is None:
            raise click.UsageError("two files are compared: deploycli verify A.onnx --against B.onnx")
        refuse_given("between two files", _OF_BUNDLES)
        return _verify_file(file, against, of_file, dict(rtol), seed, as_json=as_json)
    from deploycli.exporters.verification.report import keep
    from deploycli.exporters.verify import VerifyOptions, verify

    options = VerifyOptions(
        batches=batches,
        reference=reference,
        images=images,
        labels=labels,
        limit=limit,
        rtol=dict(rtol),
        checkpoint=checkpoint,
        trust_factory=trust_factory,
        seed=seed,
        engines=engines,
        allow_engine_host_code=allow_engine_host_code,
    )
    opened = open_bundles(root, bundles)
    reports = []
    with Progress() as progress:
        for bundle in opened:
            report = verify(bundle, options, progress=progress.count)
            reports.append(report)
            try:
                keep(bundle, report)
            except EnvironmentUnsuitable as error:  # a bundle on a read-only disk is verified all the same
                progress.warn(f"the report could not be kept: {error.found}")
    if as_json:
        print_json([report.to_json() for report in reports])
    else:
        show_reports(reports)
    return 0 if all(report.passed for report in reports) else 5


_OF_BUNDLES = {
    name: f"--{name.replace('_', '-')}"
    for name in ("batches", "images", "labels", "limit", "reference", "checkpoint", "trust_factory", "engines")
}


def _verify_file(
    candidate: Path, reference: Path, of_file: FileArguments, rtol: dict[str, float], seed: int, *, as_json: bool
) -> int:
    from deploycli.exporters.compare_files import FeedOptions, compare_files

    with Progress() as progress:
        feeds = FeedOptions(of_file.samples, of_file.inputs, seed)
        found = compare_files(candidate, reference, feeds, rtol=rtol, progress=progress)
    if as_json:
        print_json([found.to_json()])
    else:
        show_file_comparison(found)
    return 0 if found.passed else 5


def show_file_comparison(found: FileComparison) -> None:
    """Print how two files compare."""
    console = stdout()
    console.print(styled(found.candidate, "bold"), f"against {found.reference} ({found.runtime})", soft_wrap=True)
    console.print(f"  on {'; '.join(dict.fromkeys(found.runs))}", soft_wrap=True)
    table = table_of("output", "rel. error", "budget", "cosine", "top-1", "")
    for comparison in found.comparisons:
        table.add_row(*_figures(comparison))
    console.print(table)
    for failure in found.failures:
        console.print(styled(f"FAILED {failure}", "bold red"), soft_wrap=True)
    if found.passed:
        outputs = f"{len(found.comparisons)} output{'s' * (len(found.comparisons) > 1)}"
        console.print(styled("passed", "bold green"), f"{outputs} on {len(found.runs)} runs, {found.precision} budget")


_WIDE = 100
"""Columns from which on the longest rows stand in one line."""


def show_reports(reports: Sequence[Report]) -> None:
    """Print the verdict on every bundle."""
    console = stdout()
    for report in reports:
        console.print(styled(report.bundle, "bold"), f"({report.weights}; reference: {_reference(report)})")
        table = table_of("artifact", "check", "output", "rel. error", "budget", "cosine", "top-1", "")
        for stage in report.stages:
            _add_stage(table, stage, narrow=console.width < _WIDE)
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


def _add_stage(table: Rows, stage: Stage, *, narrow: bool) -> None:
    """Add a row for each output; on a narrow terminal remarks stand in a line of their own, so that no name is cut."""
    place = stacked if narrow else " ".join
    check = stage.check if stage.check.startswith("batch") else f"{stage.samples} {stage.check}"
    for comparison in stage.comparisons:
        table.add_row(
            place([stage.artifact, *(["(simulated)"] if "simulated" in stage.runtime else [])]),
            place([check.removesuffix(" shuffled"), *(["shuffled"] if check.endswith(" shuffled") else [])]),
            *_figures(comparison),
        )


def _figures(comparison: Comparison) -> tuple[str | Text, ...]:
    """Return the cells of one output: name, error, budget, cosine, top-1, verdict."""
    error, cosine, top1 = comparison.max_rel_error, comparison.cosine, comparison.top1
    return (
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
            interval_text(found.top1_interval),
            "-" if found.top5 is None else f"{found.top5:.2%}",
            "-" if found.top5_interval is None else interval_text(found.top5_interval),
            "-" if lost is None else f"{100 * lost:.2f} points",
            "-" if allowed is None else f"{100 * allowed:.2f}",
            "" if lost is None or allowed is None else verdict,
        )
    return table


def _reference(report: Report) -> str:
    return report.reference_note or report.reference
