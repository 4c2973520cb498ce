"""``deploycli cast``: an FP16 or BF16 artifact of a bundle."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import TYPE_CHECKING

from deploycli.exporters.derive import Derivation, Derived
from deploycli.exporters.precision.insert_casts import cast
from deploycli.exporters.precision.observed import magnitudes
from deploycli.exporters.precision.policy import REDUCED_TYPES, Policy
from deploycli.exporters.precision.rescale import rescale
from deploycli.models.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    import onnx_ir as ir

    from deploycli.exporters.bundle.bundle import Bundle
    from deploycli.exporters.graph.steps import Remark
    from deploycli.exporters.precision.options import CalibrationData, CastOptions

    Progress = Callable[[str, int, int], None]


def cast_bundle(
    bundle: Bundle,
    options: CastOptions,
    *,
    data: CalibrationData | None = None,
    lint: bool = True,
    progress: Progress = lambda _label, _done, _total: None,
) -> Derived:
    """Write the FP16 or BF16 artifact of a bundle.

    Args:
        bundle: an opened bundle.
        options: how.
        data: to find values near the end of FP16's range with, which are scaled or stay FP32; None skips that.
        lint: end where TensorRT could not read the result; otherwise it is written all the same.
        progress: called with a label, what is done and how much there is.

    Raises:
        UsageError: a pattern that is no regular expression, or a rule that cannot be switched off.
        ExportError: TensorRT could not read the graph, or ONNX Runtime cannot load it.
        NumericsError: an output is NaN, infinite or constant.
        EnvironmentUnsuitable: the bundle cannot be written.
    """
    policy = Policy(REDUCED_TYPES[options.type], options.allow, patterns(options.keep))
    samples = None if data is None else data.open(bundle)
    derivation = Derivation(bundle, options.type, lint=lint)
    if samples is not None:
        policy = replace(policy, magnitudes=magnitudes(derivation.source.path, samples, progress=progress))
    derivation.step(f"cast-{options.type}", lambda: typed(derivation.model, policy, options))
    return derivation.finish()


def typed(model: ir.Model, policy: Policy, options: CastOptions) -> list[Remark]:
    """Scale what overflows, and type the graph in place; return what was done, and what stays FP32."""
    policy, remarks = rescale(model, policy)
    return remarks + cast(model, policy, reduce_io=options.reduce_io)


def patterns(texts: Iterable[str]) -> tuple[re.Pattern[str], ...]:
    """Compile regular expressions.

    Raises:
        UsageError: one is none.
    """
    return tuple(_compiled(text) for text in texts)


def _compiled(text: str) -> re.Pattern[str]:
    try:
        return re.compile(text)
    except re.error as error:
        raise UsageError(
            f"{text!r} is no regular expression: {error}", hint=r"an expression such as 'layers\.3\..*fc2'"
        ) from error
