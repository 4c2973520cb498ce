"""What people read of engines, planned and built."""

from __future__ import annotations

from typing import TYPE_CHECKING

from deploycli.console import facts, stdout, styled, table_of
from deploycli.exporters.bundle.kernels import KernelTotals, by_module, readable_depth
from deploycli.exporters.target.settings import shapes_text
from deploycli.render import next_step, size_text
from deploycli.render_lint import show_fusable, show_lint

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from deploycli.console import Rows
    from deploycli.exporters.build import BuiltEngine, PlannedEngine
    from deploycli.exporters.bundle.engine import Sidecar
    from deploycli.exporters.bundle.kernels import Kernel


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
        sidecar, layers = engine.engine.sidecar, engine.layers
        console.print(
            styled(str(engine.engine.path), "bold"),
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
            console.print(f"  {_work(sidecar.totals)}", soft_wrap=True)
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
    for bundle in {built.engine.bundle.path: built.engine.bundle for built in engines}.values():
        next_step(console, bundle)


def show_engine(plan: Path, sidecar: Sidecar, *, verbose: bool, stale: bool = False) -> None:
    """Print an engine: what it is, and its kernels by PyTorch module, or each of them.

    Args:
        plan: the file.
        sidecar: what is known of it.
        verbose: print every kernel.
        stale: it was built from another graph than its bundle holds now.
    """
    console = stdout()
    console.print(styled(str(plan), "bold"), f"({size_text(sidecar.size)}, deploycli {sidecar.tool_version})")
    known = facts()
    known.add_row("compiler", f"{sidecar.product.title} {sidecar.tensorrt}, in {sidecar.seconds:.0f} s")
    known.add_row("for", sidecar.runs_on)
    other = ", another than the bundle holds now" if stale else ""
    known.add_row("from", f"{sidecar.onnx}, sha256 {sidecar.onnx_sha256}{other}")
    for tensor in sidecar.io:
        sizes = shapes_text(*(tensor.profile or (tensor.shape,)))
        known.add_row(tensor.mode, f"{tensor.name} {tensor.dtype} {sizes}")
    known.add_row("precision", f"{sidecar.precision}; {' and '.join(sidecar.assertions) or 'not proven'}")
    for place, profile in enumerate(sidecar.settings.more_profiles, start=1):
        hidden = "" if sidecar.kernels_of(place) else ", by other kernels than are shown"
        for name, r in profile.items():
            known.add_row("or", f"{name} {shapes_text(r.min, r.opt, r.max)}{hidden}")
    if sidecar.kernels:
        known.add_row("kernels", _work(sidecar.totals))
    console.print(known)
    for place, profile in enumerate(sidecar.settings.profiles):
        kernels = sidecar.kernels_of(place)
        if place and kernels:
            shapes = ", ".join(f"{name} {shapes_text(r.min, r.opt, r.max)}" for name, r in profile.items())
            console.print()
            console.print(styled(shapes, "bold"), _work(KernelTotals.of(kernels)), soft_wrap=True)
        if kernels or (verbose and not place):
            console.print(_kernels(kernels) if verbose else _modules(kernels))


def show_against(engines: Sequence[tuple[Path, Sidecar]]) -> None:
    """Print the kernels of two engines by PyTorch module, side by side."""
    first, second = (sidecar.first_kernels for _, sidecar in engines)
    names = "A", "B"
    console = stdout()
    for letter, (plan, sidecar) in zip(names, engines, strict=True):
        console.print(styled(f"{letter} {plan}", "bold"), _work(sidecar.totals), soft_wrap=True)
    columns = [f"{what} {letter}" for what in ("launches", "attention", "moved") for letter in names]
    table = table_of("module", *columns)
    depth = readable_depth(first, second)
    sides = by_module(first, depth), by_module(second, depth)
    none = KernelTotals.of(())
    for module in dict.fromkeys(name for side in sides for name in side):
        pair = [side.get(module, none) for side in sides]
        cells = [f(totals) for f in (_launches, _attention, _megabytes) for totals in pair]
        table.add_row(module or "-", *cells)
    pair = [KernelTotals.of(kernels) for kernels in (first, second)]
    table.add_row("all", *(f(totals) for f in (_launches, _attention, _megabytes) for totals in pair))
    console.print(table)


def _modules(kernels: Sequence[Kernel]) -> Rows:
    table = table_of("module", "launches", "products", "attention", "moved")
    for module, totals in by_module(kernels, readable_depth(kernels)).items():
        products = _counts(totals.products) or "-"
        table.add_row(module or "-", _launches(totals), products, _attention(totals), _megabytes(totals))
    return table


def _kernels(kernels: Sequence[Kernel]) -> Rows:
    table = table_of("kernel", "type", "reads", "writes", "moved", "ONNX nodes")
    for kernel in kernels:
        moved = _megabytes(KernelTotals.of((kernel,)))
        shapes = ", ".join(kernel.reads), ", ".join(kernel.writes)
        table.add_row(kernel.name, kernel.kind, *shapes, moved, ", ".join(kernel.nodes) or "-")
    return table


def _launches(totals: KernelTotals) -> str:
    return str(totals.launches)


def _attention(totals: KernelTotals) -> str:
    return str(totals.attention or "-")


def _megabytes(totals: KernelTotals) -> str:
    if totals.unknown == totals.launches:
        return "?" if totals.launches else "-"
    return f"{totals.moved / 1e6:.2f} MB" + ("+" if totals.unknown else "")


def _work(totals: KernelTotals) -> str:
    """Say what kernels do."""
    moved = f"{size_text(totals.moved)} of activations for one image"
    at_least = f"at least {moved} ({totals.unknown} are not known)" if totals.unknown else moved
    return f"{totals.launches} launches move {at_least}"


def _counts(per_type: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {precision}" for precision, count in per_type.items())
