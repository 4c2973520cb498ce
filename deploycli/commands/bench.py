"""deploycli bench."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import click

from deploycli.console import Progress, print_json, stdout, styled, table_of
from deploycli.options import (
    SEEDS,
    Count,
    Number,
    batch_sizes,
    checkpoint_option,
    file_of,
    json_option,
    models,
    output_option,
    run_options,
    trust_option,
)

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from rich.text import Text

    from deploycli.exporters.bench.measurement import Measurement
    from deploycli.exporters.bench.report import BenchReport, Host
    from deploycli.exporters.bench.requirement import Requirement
    from deploycli.options import FileArguments
    from deploycli.terminal import Rows


def _names(text: str) -> tuple[str, ...]:
    """Read ``eager,ort-cpu``."""
    names = tuple(dict.fromkeys(name.strip() for name in text.split(",")))
    if not all(names):
        raise click.BadParameter(f"{text!r}: write names as eager,ort-cpu")
    return names


def _requirement(text: str) -> Requirement:
    """Read ``1.05:fp16``."""
    from deploycli.exporters.bench.requirement import Requirement

    try:
        return Requirement.parse(text)
    except ValueError as error:
        message = f"{text!r} is no speedup ({error}); write RATIO[:PRECISION[:BASELINE]], such as 1.05:fp16"
        raise click.BadParameter(message) from None


@click.command("bench")
@click.argument("bundles", nargs=-1, metavar="[BUNDLE|IN.onnx]...")
@output_option
@click.option(
    "--batches", type=batch_sizes, metavar="N,N,...", help="Batch sizes; by default 1,8, or the one that was exported."
)
@click.option(
    "--only",
    type=_names,
    metavar="NAME,...",
    help="Time only these: eager, compile, ort-cpu, ort-cuda, trt and rtx (the bundle's engines, by product). One that "
    "cannot run is an error then.",
)
@click.option("--rounds", type=Count(), metavar="N", help="Time everything N times at each batch size.")
@click.option(
    "--seconds",
    type=Number(0, 86400, above=True),
    metavar="S",
    help="Time everything for S seconds at each batch size, warm-up apart; this is the default, with 10.",
)
@click.option("--warmup", type=Count(), default=10, show_default=True, metavar="N", help="Untimed runs before.")
@click.option(
    "--warmup-seconds",
    type=Number(0, 3600),
    default=1.0,
    show_default=True,
    metavar="S",
    help="Warm up no longer than this.",
)
@click.option(
    "--threads",
    type=Count(1, 1024),
    metavar="N",
    help="Threads of an operator on the CPU, in every runtime; by default each runtime's own choice.",
)
@click.option("--no-cuda-graph", is_flag=True, help="Launch every kernel, where a CUDA graph could be replayed.")
@click.option("--baseline", default="", metavar="NAME", help="What the speedups are relative to; by default eager.")
@click.option(
    "--require-speedup",
    "requirements",
    type=_requirement,
    multiple=True,
    metavar="RATIO[:PRECISION[:BASELINE]]",
    help="Exit 6 unless one file of this precision is so many times faster than the FP32 file on the same device (or "
    "than BASELINE, such as eager) at every batch size.",
)
@checkpoint_option
@trust_option
@click.option("--seed", type=SEEDS, default=0, show_default=True, help="Seed of the order within each round.")
@run_options
@json_option
def command(
    bundles: tuple[str, ...],
    root: Path,
    batches: tuple[int, ...] | None,
    only: tuple[str, ...] | None,
    rounds: int | None,
    seconds: float | None,
    warmup: int,
    warmup_seconds: float,
    threads: int | None,
    no_cuda_graph: bool,
    baseline: str,
    requirements: tuple[Requirement, ...],
    checkpoint: Path | None,
    trust_factory: bool,
    seed: int,
    as_json: bool,
    of_file: FileArguments,
) -> int:
    """Time BUNDLE (or every bundle) in all that this host can run: eager, torch.compile, ONNX Runtime, engines; or
    IN.onnx in ONNX Runtime.

    They take turns, in another order each round, and what drifts hits all alike. Outputs are proven right first. What
    this host cannot run is listed with the reason. Inputs and outputs are where the model runs: no transfer is timed.

    \b
    Examples:
      deploycli bench swin_t
      deploycli bench --batches 1,32 --only eager,compile,ort-cuda
      deploycli bench swin_t --require-speedup 1.05:fp16 --require-speedup 1.5:fp16:eager --json
    """
    if rounds is not None and seconds is not None:
        raise click.UsageError("--rounds and --seconds exclude each other")
    from deploycli.exporters.bench.candidate import BenchOptions
    from deploycli.exporters.bench.report import failure_of
    from deploycli.exporters.bench.run import bench_all

    options = BenchOptions(
        batches=batches or (),
        only=only or (),
        rounds=rounds,
        seconds=10.0 if seconds is None else seconds,
        warmup_runs=warmup,
        warmup_seconds=warmup_seconds,
        threads=threads,
        cuda_graph=not no_cuda_graph,
        checkpoint=checkpoint,
        trust_factory=trust_factory,
        baseline=baseline,
        seed=seed,
    )
    with Progress() as progress, models(root, bundles, of_file, keep=False, progress=progress) as opened:
        reports = bench_all(opened, options, requirements=requirements, progress=progress.count)
    if (file := file_of(bundles)) is not None:
        reports = [replace(report, bundle=str(file)) for report in reports]
    if as_json:
        print_json([report.to_json() for report in reports])
    else:
        show_benches(reports)
    if (failure := failure_of(reports)) is not None:
        raise failure  # on stderr, after the figures
    return 0


def show_benches(reports: Sequence[BenchReport]) -> None:
    """Print the figures of every bundle, what they include, and what could not be measured."""
    console = stdout()
    for report in reports:
        console.print(styled(report.bundle, "bold"), f"({report.weights})", soft_wrap=True)
        console.print(_host(report.host), soft_wrap=True)
        if report.host.busy:
            console.print(styled(report.host.busy, "yellow"), soft_wrap=True)
        if report.rows:
            console.print(_table(report))
        for line in (*_conditions(report), *_absences(report)):
            console.print(line, soft_wrap=True)
        for why in report.unreleasable:
            console.print(styled(f"NOT FOR RELEASE {why}", "bold red"), soft_wrap=True)
        for verdict in report.verdicts:
            style, word = ("bold green", "met") if verdict.met else ("bold red", "NOT MET")
            console.print(styled(f"{word} {verdict.requirement}", style), verdict.reason, soft_wrap=True)


def _host(host: Host) -> str:
    gpus = (
        f"{gpu['name']}, driver {gpu['driver_version']}, {gpu['clocks.sm']} of {gpu['clocks.max.sm']}"
        for gpu in host.gpus
    )
    versions = (f"{name} {number}" for name, number in host.versions.items())
    cores = "1 core" if host.cores == 1 else f"{host.cores} cores"
    return "; ".join((f"{host.cpu}, {cores}", *gpus, ", ".join(versions)))


def _table(report: BenchReport) -> Rows:
    baselines = {row.baseline for row in report.rows if row.baseline}
    heading = f"over {baselines.pop()}" if len(baselines) == 1 else "speedup"
    table = table_of(
        "batch",
        "candidate",
        "precision",
        "device",
        "p50 ms",
        "p90 ms",
        "p99 ms",
        "images/s",
        heading,
        "95 % interval",
        "rounds",
        "ready s",
    )
    for row in report.rows:
        found, times = row.measurement, row.speedup
        table.add_row(
            str(found.batch),
            found.candidate.name,
            f"({found.candidate.precision})" if found.candidate.emulated else found.candidate.precision,
            found.candidate.device,
            f"{1e3 * found.median:.2f}",
            _percentile(found, 0.9),
            _percentile(found, 0.99),
            f"{found.images_per_second:.1f}",
            "-" if times is None else f"{times.ratio:.2f}",
            "-" if times is None else f"{times.low:.2f} to {times.high:.2f}",
            str(found.rounds),
            f"{found.prepare_seconds:.1f}",
        )
    return table


def _percentile(found: Measurement, share: float) -> str:
    """Of ten runs the 99th percentile is the slowest: it is left out where nothing can be beyond it."""
    return f"{1e3 * found.percentile(share):.2f}" if found.rounds * (1 - share) >= 1 - 1e-9 else "-"


def _conditions(report: BenchReport) -> Iterator[str]:
    """What is in the figures of each candidate, those with the same text together."""
    said: dict[str, dict[str, None]] = {}
    for row in report.rows:
        if text := row.measurement.conditions():
            said.setdefault(text, {})[row.measurement.candidate.label] = None
    for text, labels in said.items():
        yield f"{', '.join(labels)}: {text}"


def _absences(report: BenchReport) -> Iterator[Text]:
    said: dict[tuple[str, bool], dict[str, None]] = {}
    for absence in report.absences:
        where = "" if absence.batch is None else f" at batch {absence.batch}"
        said.setdefault((absence.reason, absence.wrong), {})[absence.candidate.label + where] = None
    for (reason, wrong), labels in said.items():
        if wrong:
            yield styled(f"NOT TIMED, its outputs are wrong: {', '.join(labels)}: {reason}", "bold red")
        else:
            yield styled(f"not timed: {', '.join(labels)}: {reason}", "dim")
