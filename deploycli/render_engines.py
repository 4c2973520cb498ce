"""What people read of engines, planned and built."""

from __future__ import annotations

from typing import TYPE_CHECKING

from deploycli.console import stdout, styled
from deploycli.render import next_step, size_text
from deploycli.render_lint import show_fusable, show_lint
from exporters.tensorrt.kernels import KernelTotals

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from exporters.tensorrt.engines import BuiltEngine, PlannedEngine


ATTENTION_RULE = 16
"""The lint's rule on the form of attention."""


def show_planned(engines: Sequence[PlannedEngine]) -> None:
    """Print what would be built, and what the lint says of it."""
    console = stdout()
    for engine in engines:
        show_lint([engine.report], verbose=False)
        console.print(styled("would build", "bold"), engine.describe(), soft_wrap=True)


def show_built(engines: Sequence[BuiltEngine]) -> None:
    """Print engines, what their layers compute in, and what to do next."""
    console = stdout()
    for engine in engines:
        sidecar, layers = engine.sidecar, engine.layers
        console.print(
            styled(str(engine.plan), "bold"),
            f"{size_text(sidecar.size)}, {sidecar.precision}, {sidecar.product.title} {sidecar.tensorrt}, "
            f"{sidecar.runs_on}",
            soft_wrap=True,
        )
        if engine.kept:
            console.print(
                "  is there already, by this compiler from this graph and with these settings: nothing was done"
            )
            continue
        if layers.detailed:
            console.print(
                f"  {len(layers.judged)} products: {_counts(layers.products_per_type)}; "
                f"{layers.fused_attention} kernels of fused attention; "
                f"{len(layers.computing)} layers compute: {_counts(layers.per_type)}",
                soft_wrap=True,
            )
            totals = KernelTotals.of(sidecar.kernels)
            console.print(f"  {totals.launches} launches move {_moved(totals)} for one image", soft_wrap=True)
        if sidecar.precision != "fp32":
            show_fusable(console, engine.planned.report)
            if slow := [f for f in engine.planned.report.warnings if f.rule == ATTENTION_RULE]:
                console.print(styled(f"    try: {slow[0].hint}", "yellow"), soft_wrap=True)
        if sidecar.assertions:
            console.print(f"  {' and '.join(sidecar.assertions)} holds; built in {sidecar.seconds:.0f} s")
        else:
            console.print(styled("  not opened, for it holds host code: what it computes in is not proven", "yellow"))
        if sidecar.unreleasable:
            console.print(styled(f"  NOT FOR RELEASE: {sidecar.unreleasable}", "bold red"))
    for bundle in {engine.plan.parent.parent: engine.planned.bundle for engine in engines}.values():
        next_step(console, bundle)


def _counts(per_type: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {precision}" for precision, count in per_type.items())


def _moved(totals: KernelTotals) -> str:
    """Return the activations that kernels move, in words."""
    known = f"{size_text(totals.moved)} of activations"
    return f"at least {known} ({totals.unknown} launches are not known)" if totals.unknown else known
