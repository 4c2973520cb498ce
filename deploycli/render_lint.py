"""What people read of the TensorRT lint."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from rich.text import Text

from deploycli.render import stdout

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import Console

    from exporters.tensorrt.lint import Finding, LintReport

_SHOWN = 20
"""Findings of one level that are shown without --verbose."""


def show_lint(reports: Sequence[LintReport], *, verbose: bool) -> None:
    """Print the findings of each file, errors first, and what they come to."""
    console = stdout()
    for report in reports:
        console.print(Text(report.model, "bold"), f"for TensorRT {report.tensorrt}", soft_wrap=True)
        _show(console, report.errors, "error", "bold red", verbose=verbose)
        _show(console, report.warnings, "warning", "yellow", verbose=verbose)
        _show_attention(console, report, verbose=verbose)
        verdict = Text("passed", "bold green") if report.passed else Text("FAILED", "bold red")
        counts = f"{len(report.errors)} errors, {len(report.warnings)} warnings, {len(report.rules)} rules"
        console.print(verdict, counts)


def _show(console: Console, findings: Sequence[Finding], level: str, style: str, *, verbose: bool) -> None:
    shown = findings if verbose else findings[:_SHOWN]
    for finding in shown:
        line = Text.assemble((f"  {level} {finding.rule} ", style), f"{finding.node}: {finding.message}")
        console.print(line, soft_wrap=True)
        if finding.hint:
            console.print(f"    try: {finding.hint}", soft_wrap=True)
    if len(shown) < len(findings):
        by_rule = Counter(finding.rule for finding in findings[len(shown) :])
        rest = ", ".join(f"{count} of rule {rule}" for rule, count in sorted(by_rule.items()))
        console.print(f"  and {len(findings) - len(shown)} more {level}s ({rest}); -v shows them")


def _show_attention(console: Console, report: LintReport, *, verbose: bool) -> None:
    if not report.attention:
        return
    fusable = sum(block.fusable for block in report.attention)
    console.print(f"  {fusable} of {len(report.attention)} attention blocks have a form that TensorRT can fuse")
    reasons = Counter(reason for block in report.attention for reason in block.reasons[:1])
    for reason, count in reasons.most_common():
        console.print(f"    {count}: {reason}", soft_wrap=True)
    for block in report.attention if verbose else ():
        state = "fusable" if block.fusable else "; ".join(block.reasons)
        console.print(f"    {block.node} ({block.precision}, head size {block.head_dim}): {state}", soft_wrap=True)
