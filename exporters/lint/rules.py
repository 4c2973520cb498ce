"""The rules, in order, and the lint that applies them.

A rule is a function from a :class:`~deploycli.exporters.lint.subject.Subject` to problems; its documentation says what
must hold and who says so. To add one, write the function and its line here.
"""

from __future__ import annotations

import difflib
import os
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import onnx_ir as ir

from deploycli.exporters.bundle.files import temporary_folder
from deploycli.exporters.graph.onnx_file import quiet, read, write_outline
from deploycli.exporters.lint.economy import hard_to_fuse, redundant_pairs, stored_numbers, unused_and_repeated
from deploycli.exporters.lint.fused_attention import attention_blocks, attention_form, attention_operator
from deploycli.exporters.lint.operator_support import lacking_in_rtx, operator_support
from deploycli.exporters.lint.quantization import quantization, quantization_placement, quantized_share
from deploycli.exporters.lint.report import Finding, LintReport
from deploycli.exporters.lint.structure import (
    constant_operands,
    external_data,
    names_and_edges,
    no_dynamic_operators,
    opset_and_ir,
    static_shapes,
)
from deploycli.exporters.lint.subject import Subject, inlined
from deploycli.exporters.lint.types import (
    gemm,
    hardware,
    hardware_features,
    inference_only,
    strong_typing,
    supported_types,
)
from deploycli.exporters.lint.versions import parse_version
from deploycli.models.errors import UsageError
from deploycli.models.files import sha256_of

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator, Sequence

    from deploycli.exporters.lint.report import Problem
    from deploycli.exporters.target.targets import Capability
    from deploycli.exporters.target.verdict import Parser, Verdict

DEFAULT_VERSION = "11.4"


@dataclass(frozen=True)
class Rule:
    """One rule.

    Attributes:
        number: what it was called before rules had names; reports have both for one release.
        check: yields what breaks it, and has its name.
    """

    number: int
    check: Callable[[Subject], Iterator[Problem]]

    @property
    def name(self) -> str:
        """Its name in reports, such as ``strong-typing``."""
        return self.check.__name__.replace("_", "-")

    @property
    def summary(self) -> str:
        """What must hold, in one line."""
        return (self.check.__doc__ or "").partition("\n")[0].partition(": ")[2].rstrip(".")


RULES: tuple[Rule, ...] = (
    Rule(1, opset_and_ir),
    Rule(2, operator_support),
    Rule(3, supported_types),
    Rule(4, strong_typing),
    Rule(5, inference_only),
    Rule(6, quantization),
    Rule(7, attention_operator),
    Rule(8, gemm),
    Rule(9, constant_operands),
    Rule(10, static_shapes),
    Rule(11, no_dynamic_operators),
    Rule(12, names_and_edges),
    Rule(13, external_data),
    Rule(14, stored_numbers),
    Rule(15, quantization_placement),
    Rule(16, attention_form),
    Rule(17, redundant_pairs),
    Rule(18, unused_and_repeated),
    Rule(19, hard_to_fuse),
    Rule(20, hardware),
)

_JUDGED: dict[str, Verdict] = {}
"""Hash of an outline -> what NVIDIA's parser says of it, in a process of its own that takes 0.2 s to load it."""


def lint(
    model: str | os.PathLike[str] | ir.Model,
    *,
    version: str = DEFAULT_VERSION,
    rules: Collection[int | str] | None = None,
    plugins: Collection[str] = (),
    profiled: Collection[str] = (),
    targets: Sequence[Capability] = (),
    parser: Parser | None = None,
) -> LintReport:
    """Judge a graph as TensorRT's ONNX parser will, without TensorRT; or let that parser judge it as well.

    Args:
        model: an ONNX file, whose external data lie beside it, or a model in memory, which is not changed.
        version: TensorRT version, 10.12 to 11.x.
        rules: names, or numbers, of the rules to apply; all by default.
        plugins: operators that the engine will find as plugins.
        profiled: symbolic axes beside the batch for which there will be an optimization profile.
        targets: compute capabilities of the GPUs that the engine is for; none where that is not known.
        parser: NVIDIA's, which is asked, too, while the rules are applied. Of a model in memory it reads an outline,
            without the numbers of large weights.

    Returns:
        The same report for the same model, in the order of the rules and of the graph.

    Raises:
        UsageError: no ONNX file, no such version, or no such rule.
    """
    target = parse_version(version)
    chosen = _choose(rules)
    wrong_entries: dict[str, str] = {}
    with quiet(), nullcontext() if parser is None else _judging(model, parser) as verdict:
        if isinstance(model, ir.Model):
            name = model.graph.name or "graph"
        else:
            name = os.fspath(model)
            model, wrong_entries = read(Path(model))
        subject = Subject(
            inlined(model), target, plugins=plugins, profiled=profiled, wrong_entries=wrong_entries, targets=targets
        )
        findings = [
            Finding(rule.name, problem.level, problem.where, problem.message, problem.hint, problem.silent, rule.number)
            for rule in chosen
            for problem in rule.check(subject)
        ]
        names = tuple(rule.name for rule in chosen)
        attention = tuple(attention_blocks(subject)) if any(rule.check is attention_form for rule in chosen) else ()
        features = tuple(sorted(hardware_features(subject)))
        share = quantized_share(subject)
        found = None
        if verdict is not None:
            elsewhere = {node.op_type for node in subject.nodes if lacking_in_rtx(node)}
            found = verdict().excusing(elsewhere.union(plugins))
    return LintReport(name, version, names, tuple(dict.fromkeys(findings)), attention, features, share, found)


@contextmanager
def _judging(model: str | os.PathLike[str] | ir.Model, parser: Parser) -> Iterator[Callable[[], Verdict]]:
    """Let NVIDIA's parser begin; but a graph that it has judged already, weights apart, is not judged again."""
    if not isinstance(model, ir.Model):
        with parser(Path(model)) as verdict:
            yield verdict
        return
    with temporary_folder() as folder:
        outline = folder / "outline.onnx"
        write_outline(model, outline)
        digest = sha256_of(outline)
        if digest in _JUDGED:
            yield lambda: _JUDGED[digest]
            return
        with parser(outline) as verdict:

            def remembered() -> Verdict:
                found = verdict()
                if not found.problem:
                    _JUDGED[digest] = found
                return found

            yield remembered


def _choose(wanted: Collection[int | str] | None) -> list[Rule]:
    if wanted is None:
        return list(RULES)
    unknown = sorted({str(rule) for rule in wanted} - {str(key) for rule in RULES for key in (rule.name, rule.number)})
    if unknown or not wanted:
        found = f"no rule {', '.join(unknown)}" if unknown else "no rules to apply"
        names = [rule.name for rule in RULES]
        near = [match for rule in unknown for match in difflib.get_close_matches(rule, names, n=1, cutoff=0.5)]
        raise UsageError(found, expected=f"{', '.join(names)}; or 1 to {len(RULES)}", hint=" or ".join(near))
    return [rule for rule in RULES if rule.name in wanted or rule.number in wanted]
