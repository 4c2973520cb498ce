"""deploycli lint."""

from __future__ import annotations

from pathlib import Path

import click

from deploycli.options import bundle_path, gpu_option, json_option, output_option


@click.command("lint")
@click.argument("paths", nargs=-1, metavar="[FILE|BUNDLE]...")
@output_option
@click.option(
    "--tensorrt",
    "version",
    default="11.4",
    show_default=True,
    metavar="VERSION",
    help="Version to judge for, from 10.12.",
)
@click.option("--rules", metavar="N,N,...", help="Apply these rules only.  [default: all]")
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
      deploycli lint model.onnx --rules 4,6 --json
      deploycli lint model.onnx --parser rtx
    """
    from deploycli.exporters.bundle.bundle import Bundle, find_bundles
    from deploycli.exporters.lint import lint
    from deploycli.exporters.target.product import RTX
    from deploycli.exporters.target.targets import parse_targets
    from deploycli.exporters.tensorrt import library
    from deploycli.exporters.tensorrt.parser import judging
    from deploycli.models.errors import EnvironmentUnsuitable, ExportError
    from deploycli.render import print_json
    from deploycli.render_lint import show_lint

    targets = parse_targets(gpus)
    try:
        numbers = None if rules is None else {int(number) for number in rules.split(",")}
    except ValueError:
        raise click.BadParameter(f"{rules!r}: write numbers as 4,6", param_hint="--rules") from None
    files: list[Path] = []
    for path in paths or [str(found) for found in find_bundles(root)]:
        if path.endswith(".onnx"):
            files.append(Path(path))
        else:
            bundle = Bundle.open(bundle_path(root, path))
            files += [file.path for file in bundle.onnx_files()]
    asks = parser == "rtx" or (parser == "auto" and numbers is None and library.is_installed(RTX))
    if parser == "rtx":
        library.require_installed(RTX)
    judge = judging if asks else None
    reports = [
        lint(file, version=version, rules=numbers, plugins=plugins, targets=targets, parser=judge) for file in files
    ]
    if as_json:
        print_json([report.to_json() for report in reports])
    else:
        show_lint(reports, verbose=verbose)
    if not all(report.passed for report in reports):
        return ExportError.exit_code
    lacks_verdict = parser == "rtx" and any(report.parser is not None and report.parser.problem for report in reports)
    return EnvironmentUnsuitable.exit_code if lacks_verdict else 0
