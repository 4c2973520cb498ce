"""What people read of benchmarks."""

from __future__ import annotations

from typing import TYPE_CHECKING

from deploycli.console import Rows, stdout, styled, table_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from rich.text import Text

    from deploycli.exporters.bench.host import Host
    from deploycli.exporters.bench.measurement import Measurement
    from deploycli.exporters.bench.report import BenchReport


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
        for advice in report.advice:
            console.print(styled(advice, "yellow"), soft_wrap=True)
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
