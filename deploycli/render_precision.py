"""What people read of casts and quantisations."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from deploycli.console import Output, stdout, styled, table_of
from deploycli.exporters.precision.insert_casts import NOTES
from deploycli.render import next_step, show_artifact, show_steps

if TYPE_CHECKING:
    from deploycli.exporters.derive import Derived
    from deploycli.exporters.precision.budget import Search
    from deploycli.exporters.quantize import Quantized
    from deploycli.exporters.verification.evaluate import Accuracy


def show_derived(derived: Derived, *, verbose: bool) -> None:
    """Print a new artifact of a bundle, what stays in higher precision, and how it compares."""
    console = stdout()
    _show(console, derived, verbose=verbose)
    next_step(console, derived.bundle)


def show_quantized(quantized: Quantized, *, verbose: bool) -> None:
    """Print an INT8 artifact, and what an accuracy budget led to."""
    console = stdout()
    _show(console, quantized, verbose=verbose)
    artifact = quantized.artifact
    console.print(f"  {len(artifact.quantized)} products and attentions in INT8")
    if (calibration := artifact.calibration) is not None:
        skipped = f", {len(calibration.skipped)} skipped" if calibration.skipped else ""
        console.print(
            f"  calibrated by {calibration.method} on {calibration.data}{skipped} (sha256 {calibration.sha256[:12]})",
            soft_wrap=True,
        )
    for note in quantized.notes:
        console.print(f"  {note}", soft_wrap=True)
    if quantized.search is not None:
        _show_search(console, quantized.search)
    next_step(console, quantized.bundle)


def _show(console: Output, derived: Derived, *, verbose: bool) -> None:
    artifact = derived.artifact
    show_artifact(console, derived.bundle, artifact)
    reasons = Counter(refusal.reason.partition(":")[0] for step in artifact.steps for refusal in step.refusals)
    left = [f"{count} {rule}" for rule, count in reasons.items() if rule not in NOTES]
    if left:
        console.print(f"  left as it was: {', '.join(left)}")
    for rule, what in NOTES.items():
        if reasons[rule]:
            console.print(f"  {reasons[rule]} {what}")
    for comparison in derived.comparisons:
        figures = f"cosine {comparison.cosine:.6f}, relative error {comparison.max_rel_error:.2g}"
        samples = comparison.reference_shape[0] if comparison.reference_shape else 0
        console.print(f"  {comparison.name}: {figures} to eager on {samples} golden samples ({derived.runtime})")
        if comparison.reasons:
            console.print(styled(f"  outside the budget: {'; '.join(comparison.reasons)}", "yellow"), soft_wrap=True)
    if verbose:
        show_steps(console, artifact.steps)


def _show_search(console: Output, search: Search) -> None:
    rows = table_of("graph", "labelled", "top-1", "95 % interval", "top-1 lost")
    for name, accuracy in (
        ("fp32", search.fp32),
        ("all in INT8", search.quantized),
        (f"{len(search.kept)} in INT8, {len(search.reverted)} reverted", search.result),
    ):
        rows.add_row(name, str(accuracy.samples), f"{accuracy.top1:.2%}", _interval(accuracy), _lost(search, accuracy))
    console.print(rows)
    for group in search.reverted:
        console.print(f"  reverted {group}: alone in INT8 it moves the logits by {search.harm[group] ** 0.5:.2%}")


def _interval(accuracy: Accuracy) -> str:
    low, high = accuracy.top1_interval
    return f"{low:.2%} to {high:.2%}"


def _lost(search: Search, accuracy: Accuracy) -> str:
    return "-" if accuracy is search.fp32 else f"{100 * (search.fp32.top1 - accuracy.top1):.2f} points"
