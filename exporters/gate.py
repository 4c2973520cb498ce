"""Where a command ends that would write what TensorRT cannot read."""

from __future__ import annotations

from typing import TYPE_CHECKING

import onnx_ir as ir

from deploycli.exporters.graph.unique import listed
from deploycli.exporters.lint.rules import lint
from deploycli.exporters.target.product import RTX
from deploycli.exporters.target.verdict import shown
from deploycli.exporters.tensorrt import library
from deploycli.exporters.tensorrt.parser import judging
from deploycli.models.errors import ExportError

if TYPE_CHECKING:
    from deploycli.exporters.lint.report import LintReport

NO_LINT = "--no-lint writes it all the same"

_MOST_KINDS = 5
_MOST_NODES = 2


def require_readable(model: ir.Model, what: str) -> None:
    """Lint a graph that is about to be written, for the newest TensorRT that the rules know; where TensorRT for RTX is
    installed, its parser must take the graph, too.

    Args:
        model: the graph; every axis that has a name may be given an optimization profile.
        what: the graph, in words.

    Raises:
        ExportError: the lint finds errors, or the parser does.
    """
    shapes = [value.shape for value in model.graph.inputs if value.shape is not None]
    symbols = {dim.value for shape in shapes for dim in shape if isinstance(dim, ir.SymbolicDim) and dim.value}
    require_passed(lint(model, profiled=symbols, parser=judging if library.is_installed(RTX) else None), what, NO_LINT)


def require_passed(report: LintReport, what: str, hint: str) -> None:
    """Raise what a lint found: every kind of error once, with the first places where it is.

    Raises:
        ExportError: there are errors, or NVIDIA's parser refuses the graph.
    """
    if not report.errors:
        _require_taken(report, what, hint)
        return
    kinds: dict[tuple[str, str, str], list[str]] = {}
    for finding in report.errors:
        kinds.setdefault((finding.rule, finding.message, finding.hint), []).append(finding.node)
    lines = [
        f"rule {rule}: {listed(nodes, _MOST_NODES)}: {message}" + (f" ({remedy})" if remedy else "")
        for (rule, message, remedy), nodes in list(kinds.items())[:_MOST_KINDS]
    ]
    if len(kinds) > _MOST_KINDS:
        lines.append(f"and {len(kinds) - _MOST_KINDS} more kinds")
    if report.disagreement:
        lines.append(report.disagreement)
    count = len(report.errors)
    raise ExportError(
        "\n    ".join([f"TensorRT {report.tensorrt} cannot read {what}: {count} error{'s' * (count > 1)}", *lines]),
        expected="a graph in which `deploycli lint` finds no error",
        hint=hint,
    )


def _require_taken(report: LintReport, what: str, hint: str) -> None:
    if not report.refused or report.parser is None:
        return
    lines = shown(report.parser.refusals[:_MOST_KINDS], len(report.parser.refusals[_MOST_KINDS:]) + report.parser.more)
    raise ExportError(
        "\n    ".join([f"the parser of {report.parser.judge} refuses {what}:", *lines]),
        expected="a graph that it takes; `deploycli lint` finds no error in this one",
        hint=hint,
    )
