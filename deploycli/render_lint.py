"""What people read of the TensorRT lint."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from deploycli.console import Output, assembled, stdout, styled
from deploycli.exporters.lint.verdict import shown

if TYPE_CHECKING:
    from collections.abc import Sequence

    from deploycli.exporters.lint import Finding, LintReport

_SHOWN = 20
"""Different findings of one level that are shown without --verbose."""


def show_lint(reports: Sequence[LintReport], *, verbose: bool) -> None:
    """Print the findings of each file, errors first, and what they come to."""
    console = stdout()
    for report in reports:
        console.print(styled(report.model, "bold"), f"for TensorRT {report.tensorrt}", soft_wrap=True)
        _show(console, report.errors, "error", "bold red", verbose=verbose)
        _show(console, report.warnings, "warning", "yellow", verbose=verbose)
        _show_parser(console, report)
        show_fusable(console, report)
        if verbose:
            _show_blocks(console, report)
        verdict = styled("passed", "bold green") if report.passed else styled("FAILED", "bold red")
        counts = f"{len(report.errors)} errors, {len(report.warnings)} warnings, {len(report.rules)} rules"
        console.print(verdict, counts + ("; refused by the parser" if report.refused else ""))


def _show_parser(console: Output, report: LintReport) -> None:
    """Print what NVIDIA's parser says, where it was asked, and how that differs from what the rules say."""
    if report.parser is None:
        return
    found, judge = report.parser, f"the parser of {report.parser.judge}"
    if found.problem:
        console.print(assembled(("  no verdict ", "yellow"), f"of {judge}: {found.problem}"), soft_wrap=True)
    elif found.is_taken:
        console.print(f"  {judge} takes it")
    for line in shown(found.refusals, found.more):
        console.print(assembled(("  refused ", "bold red"), f"by {judge}: {line}"), soft_wrap=True)
    if found.lacking:
        lacking = f"{judge} lacks {', '.join(found.lacking)}: neither that nor what follows was judged"
        console.print(f"  {lacking}", soft_wrap=True)
    if report.disagreement:
        console.print(assembled(("  they disagree: ", "bold yellow"), report.disagreement), soft_wrap=True)


def _show(console: Output, findings: Sequence[Finding], level: str, style: str, *, verbose: bool) -> None:
    """Print what was found, once for all nodes of which the same is to be said."""
    alike: dict[tuple[int, str, str], list[Finding]] = {}
    for i, finding in enumerate(findings):
        where = str(i) if verbose else ""  # every node by itself
        alike.setdefault((finding.rule, finding.message, where), []).append(finding)
    groups = list(alike.values())
    shown = groups if verbose else groups[:_SHOWN]
    for first, *rest in shown:
        others = f" and {len(rest)} more" if rest else ""
        line = assembled((f"  {level} {first.rule} ", style), f"{first.node}{others}: {first.message}")
        console.print(line, soft_wrap=True)
        if first.hint:
            console.print(f"    try: {first.hint}", soft_wrap=True)
    if len(shown) < len(groups):
        left = [finding for group in groups[len(shown) :] for finding in group]
        counts = ", ".join(f"{count} of rule {rule}" for rule, count in sorted(Counter(f.rule for f in left).items()))
        console.print(f"  and {len(left)} more {level}s ({counts}); -v shows them")


def show_fusable(console: Output, report: LintReport) -> None:
    """Print how many attention blocks the compiler makes one kernel of, and why not of the others."""
    if not report.attention:
        return
    fusable = sum(block.fusable for block in report.attention)
    console.print(f"  {fusable} of {len(report.attention)} attention blocks have a form that TensorRT can fuse")
    reasons = Counter(reason for block in report.attention for reason in block.reasons[:1])
    for reason, count in reasons.most_common():
        console.print(f"    {count}: {reason}", soft_wrap=True)


def _show_blocks(console: Output, report: LintReport) -> None:
    for block in report.attention:
        state = "fusable" if block.fusable else "; ".join(block.reasons)
        console.print(f"    {block.node} ({block.precision}, head size {block.head_dim}): {state}", soft_wrap=True)
