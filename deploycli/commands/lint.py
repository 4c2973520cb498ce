"""deploycli lint."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

import click

from deploycli.console import assembled, print_json, stdout, styled
from deploycli.models.errors import EnvironmentUnsuitable, ExportError
from deploycli.options import bundle_path, gpu_option, json_option, output_option, tensorrt_option

if TYPE_CHECKING:
    from collections.abc import Sequence

    from deploycli.exporters.lint import Finding, LintReport
    from deploycli.terminal import Output


@click.command("lint")
@click.argument("paths", nargs=-1, metavar="[FILE|BUNDLE]...")
@output_option
@tensorrt_option("Version to judge for, from 10.12.")
@click.option("--rules", metavar="RULE,...", help="Apply these rules only, by name or by number.  [default: all]")
@click.option(
    "--plugin", "plugins", multiple=True, metavar="OP", help="An operator that a plugin provides. Repeatable."
)
@gpu_option("Judge for this GPU too: what it cannot compute in")
@click.option(
    "--parser",
    type=click.Choice(["auto", "rtx", "none"]),
    default="auto",
    show_default=True,
    help="Let the parser of TensorRT for RTX judge, too. auto: where it is installed, unless --rules chooses; "
    "rtx: exit 7 where it is not, or gives no verdict.",
)
@click.option("-v", "--verbose", is_flag=True, help="Show every warning, and every attention block.")
@json_option
def command(
    paths: tuple[str, ...],
    root: Path,
    version: str,
    rules: str | None,
    plugins: tuple[str, ...],
    gpus: tuple[str, ...],
    parser: str,
    verbose: bool,
    as_json: bool,
) -> int:
    """Judge ONNX files, or those of bundles (of every bundle), as TensorRT will, without TensorRT; exit 3 on errors.

    Errors are what the parser refuses or would type otherwise than meant; warnings are what makes a slower or less
    exact engine. Where TensorRT for RTX is installed, its own parser reads each file as well, in a process of its own:
    what it refuses is exit 3, too, and where it and the rules disagree, that is said.

    The last lines count the attention blocks of which one kernel is made.

    \b
    Examples:
      deploycli lint swin_t
      deploycli lint model.onnx --tensorrt 10.13 -v
      deploycli lint model.onnx --rules strong-typing,quantization --json
      deploycli lint model.onnx --parser rtx
    """
    from deploycli.exporters.bundle.bundle import Bundle, find_bundles
    from deploycli.exporters.lint import lint
    from deploycli.exporters.target.product import RTX
    from deploycli.exporters.target.targets import parse_targets
    from deploycli.exporters.tensorrt import library
    from deploycli.exporters.tensorrt.parser import judging

    targets = parse_targets(gpus)
    chosen = None if rules is None else {int(rule) if rule.isdecimal() else rule for rule in rules.split(",")}
    files: list[Path] = []
    for path in paths or [str(found) for found in find_bundles(root)]:
        if path.endswith(".onnx"):
            files.append(Path(path))
        else:
            bundle = Bundle.open(bundle_path(root, path))
            files += [file.path for file in bundle.onnx_files()]
    asks = parser == "rtx" or (parser == "auto" and chosen is None and library.is_installed(RTX))
    if parser == "rtx":
        library.require_installed(RTX)
    judge = judging if asks else None
    reports = [
        lint(file, version=version, rules=chosen, plugins=plugins, targets=targets, parser=judge) for file in files
    ]
    if as_json:
        print_json([report.to_json() for report in reports])
    else:
        show_lint(reports, verbose=verbose)
    if not all(report.passed for report in reports):
        return ExportError.exit_code
    lacks_verdict = parser == "rtx" and any(report.parser is not None and report.parser.problem for report in reports)
    return EnvironmentUnsuitable.exit_code if lacks_verdict else 0


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
    from deploycli.exporters.target.verdict import shown

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
    alike: dict[tuple[str, str, str], list[Finding]] = {}
    for i, finding in enumerate(findings):
        where = str(i) if verbose else ""  # every node by itself
        alike.setdefault((finding.rule, finding.message, where), []).append(finding)
    groups = list(alike.values())
    shown = groups if verbose else groups[:_SHOWN]
    for first, *rest in shown:
        others = f" and {len(rest)} more" if rest else ""
        line = assembled((f"  {level} {first.rule} ({first.number}) ", style), f"{first.node}{others}: {first.message}")
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
