"""deploycli inspect."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from deploycli.console import (
    cost_cells,
    fact_table,
    print_json,
    show_artifact,
    show_steps,
    size_text,
    stdout,
    styled,
    table_of,
)
from deploycli.models.errors import UsageError
from deploycli.options import bundle_path, json_option, output_option

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from deploycli.exporters.bundle.bundle import Bundle, ModelFile, OnnxFile
    from deploycli.exporters.bundle.engine import Kernel, KernelTotals, Sidecar
    from deploycli.exporters.inspect import OnnxSummary
    from deploycli.models.spec import TensorInfo
    from deploycli.terminal import Output, Rows


_ONNX, _PLAN = ".onnx", ".plan"


@click.command("inspect")
@click.argument("path")
@output_option
@click.option("--against", metavar="PATH", help="A second engine, or a second ONNX file, side by side with the first.")
@click.option("-v", "--verbose", is_flag=True, help="Show every refusal of the passes; of an engine, every kernel.")
@json_option
def command(path: str, root: Path, against: str | None, verbose: bool, as_json: bool) -> int:
    """Show what is in PATH: a bundle (its folder or its name), an ONNX file, or an engine.

    Of a bundle every hash is checked first; a changed or missing file is exit 8. Each artifact is shown with what the
    last `deploycli verify` found of it: ok, failed, not verified, or stale where it was written again since. Of an
    engine (.plan), or of those of a bundle, the kernels are shown by PyTorch module: launches, products by type, fused
    attention, and the activations that they move for one image.

    \b
    Examples:
      deploycli inspect swin_t
      deploycli inspect artifacts/swin_t/model.onnx
      deploycli inspect artifacts/swin_t/engines/fp16-rtx1.7.1.116.plan
      deploycli inspect A.plan --against B.plan
      deploycli inspect swin_t --json
    """
    from dataclasses import asdict

    from deploycli.exporters.bundle.bundle import Bundle

    kinds = {Path(name).suffix for name in (path, against) if name is not None}
    if kinds == {_ONNX}:
        _files([Path(name) for name in (path, against) if name is not None], as_json)
        return 0
    if kinds == {_PLAN}:
        _engines([Path(name) for name in (path, against) if name is not None], verbose, as_json)
        return 0
    if against is not None:
        raise UsageError(
            f"{path} cannot be shown against {against}", expected=f"two engines ({_PLAN}) or two ONNX files ({_ONNX})"
        )
    bundle = Bundle.open(bundle_path(root, path))
    graphs, engines = list(bundle.onnx_files()), list(bundle.engines())
    for engine in engines:
        engine.check()
    if as_json:
        more = {
            "path": str(bundle.path),
            "verified": {file.name: asdict(file.verdict) for file in graphs},
            "engines": [engine.sidecar.to_json() for engine in engines],
        }
        print_json(bundle.manifest.to_json() | more)
    else:
        show_bundle(bundle, graphs, verbose=verbose)
        for engine in engines:
            click.echo()
            show_engine(engine.path, engine.sidecar, verbose=verbose, stale=bool(engine.stale))
    return 0


def _files(paths: list[Path], as_json: bool) -> None:
    from deploycli.exporters.inspect import summarize

    summaries = [summarize(path) for path in paths]
    if as_json:
        found = [summary.to_json() for summary in summaries]
        print_json(found if len(found) > 1 else found[0])
    elif len(summaries) > 1:
        show_onnx_against(summaries)
    else:
        show_onnx(summaries[0])


def _engines(plans: list[Path], verbose: bool, as_json: bool) -> None:
    from deploycli.exporters.bundle.engine import by_module, readable_depth, sidecar_of_plan

    engines = [(plan, sidecar_of_plan(plan)) for plan in plans]
    if as_json:
        depth = readable_depth(*(sidecar.first_kernels for _, sidecar in engines))
        found = [
            sidecar.to_json()
            | {"path": str(plan)}
            | {"modules": {name: totals.to_json() for name, totals in by_module(sidecar.first_kernels, depth).items()}}
            for plan, sidecar in engines
        ]
        print_json(found if len(found) > 1 else found[0])
    elif len(engines) > 1:
        show_against(engines)
    else:
        show_engine(*engines[0], verbose=verbose)


def show_bundle(bundle: Bundle, files: Sequence[OnnxFile], *, verbose: bool) -> None:
    """Print a bundle and its ONNX files, with whether they are verified."""
    console = stdout()
    manifest = bundle.manifest
    console.print(styled(str(bundle.path), "bold"), f"(deploycli {manifest.tool_version}, all hashes match)")
    facts = fact_table()
    facts.add_row("model", f"{manifest.spec.name} ({manifest.spec.family})")
    facts.add_row("weights", manifest.weights.describe())
    if report := manifest.weights.report:
        facts.add_row("", ", ".join(f"{count} {what.replace('_', ' ')}" for what, count in report.items()))
    for spec in manifest.spec.inputs:
        facts.add_row("input", f"{spec.name} {spec.dtype} [batch, {', '.join(map(str, spec.shape))}]")
    facts.add_row("output", ", ".join(manifest.spec.outputs))
    if manifest.spec.strides:
        strides = zip(manifest.spec.outputs, manifest.spec.strides, strict=True)
        facts.add_row("strides", ", ".join(f"{name} {stride} pixels" for name, stride in strides))
    if manifest.labels:
        some = ", ".join(manifest.labels[:3])
        facts.add_row("classes", f"{len(manifest.labels)}: {some}{', ...' if len(manifest.labels) > 3 else ''}")
    if (recipe := manifest.preprocessing) is not None:
        side = "x".join(map(str, recipe.size))
        facts.add_row("images", f"crop {side}, {recipe.crop_pct:.3g} of the shorter side, {recipe.interpolation}")
        graph = ", in the graph" if recipe.pixels is not None else ""
        facts.add_row("", f"mean {_triple(recipe.mean)}, std {_triple(recipe.std)}{graph}")
    facts.add_row("versions", ", ".join(f"{name} {number}" for name, number in manifest.versions.items()))
    console.print(facts)
    for file in files:
        console.print()
        show_artifact(console, bundle, file.artifact)
        _show_verdict(console, file)
        console.print(_op_table(file.artifact.ops_before, file.artifact.ops_after))
        show_steps(console, file.artifact.steps, refusals=verbose)
    console.print()
    records = table_of("file", "bytes", "sha256")
    for record in manifest.records():
        records.add_row(record.path, f"{record.size:,}", record.sha256)
    console.print(records)


def _show_verdict(console: Output, file: ModelFile) -> None:
    verdict = file.verdict
    if verdict.passed:
        last = file.verification
        console.print("  verified:", styled("ok", "green"), f"(reference: {last.reference}, {last.time})")
    else:
        style = "bold red" if verdict.status == "failed" else "yellow"
        console.print("  verified:", styled(verdict.status, style), f"({verdict.reason})", soft_wrap=True)


def show_onnx(summary: OnnxSummary) -> None:
    """Print an ONNX file."""
    console = stdout()
    console.print(
        styled(summary.path, "bold"), f"({size_text(summary.size)}, {summary.producer or 'unknown producer'})"
    )
    facts = fact_table()
    for what, tensors in (("input", summary.inputs), ("output", summary.outputs)):
        for tensor in tensors:
            facts.add_row(what, _tensor(tensor))
    facts.add_row("opset", f"{summary.opset}, IR version {summary.ir_version}")
    facts.add_row("parameters", f"{summary.parameters:,}")
    facts.add_row("nodes", f"{sum(summary.ops.values()):,}")
    if summary.cost is not None:
        moved, products, kept = cost_cells(summary.cost)
        facts.add_row("costs", f"{moved} MB moved, {products} GMACs, {kept} MB of constants")
    if summary.kernels is not None:
        facts.add_row("kernels", f"{summary.kernels}: predicted for TensorRT; measured by `build-trt`")
    console.print(facts)
    ops = table_of("operator", "nodes")
    for op, count in summary.ops.items():
        ops.add_row(op, str(count))
    console.print(ops)
    largest = table_of("largest constants", "bytes")
    for name, size in summary.largest.items():
        largest.add_row(name, f"{size:,}")
    console.print(largest)


def show_onnx_against(summaries: Sequence[OnnxSummary]) -> None:
    """Print two ONNX files side by side: operators, costs and sizes."""
    console = stdout()
    table = table_of("operator", *(summary.path for summary in summaries))
    for op in dict.fromkeys(op for summary in summaries for op in summary.ops):
        table.add_row(op, *(str(summary.ops.get(op, "-")) for summary in summaries))
    table.add_row("all nodes", *(f"{sum(summary.ops.values()):,}" for summary in summaries))
    table.add_row("opset", *(str(summary.opset) for summary in summaries))
    table.add_row("parameters", *(f"{summary.parameters:,}" for summary in summaries))
    table.add_row("file", *(size_text(summary.size) for summary in summaries))
    costs = [("?",) * 3 if summary.cost is None else cost_cells(summary.cost) for summary in summaries]
    for what, cells in zip(("MB moved", "GMACs", "MB of constants"), zip(*costs, strict=True), strict=True):
        table.add_row(what, *cells)
    table.add_row("kernels, predicted", *(str(summary.kernels or "?") for summary in summaries))
    console.print(table)


def _op_table(before: Mapping[str, int], after: Mapping[str, int]) -> Rows:
    table = table_of("operator", "traced", "written")
    for op in sorted({*before, *after}, key=lambda op: (-after.get(op, 0), -before.get(op, 0), op)):
        table.add_row(op, str(before.get(op, "")), str(after.get(op, "")))
    table.add_section()
    table.add_row("all", str(sum(before.values())), str(sum(after.values())))
    return table


def _tensor(tensor: TensorInfo[str]) -> str:
    return f"{tensor.name} {tensor.dtype} [{', '.join(tensor.shape)}]"


def _triple(values: Sequence[float]) -> str:
    return " ".join(f"{value:.3g}" for value in values)


def show_engine(plan: Path, sidecar: Sidecar, *, verbose: bool, stale: bool = False) -> None:
    """Print an engine: what it is, and its kernels by PyTorch module, or each of them.

    Args:
        plan: the file.
        sidecar: what is known of it.
        verbose: print every kernel.
        stale: it was built from another graph than its bundle holds now.
    """
    from deploycli.exporters.bundle.engine import KernelTotals
    from deploycli.exporters.target.settings import shapes_text

    console = stdout()
    console.print(styled(str(plan), "bold"), f"({size_text(sidecar.size)}, deploycli {sidecar.tool_version})")
    known = fact_table()
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
        known.add_row("kernels", work_text(sidecar.totals))
    console.print(known)
    for place, profile in enumerate(sidecar.settings.profiles):
        kernels = sidecar.kernels_of(place)
        if place and kernels:
            shapes = ", ".join(f"{name} {shapes_text(r.min, r.opt, r.max)}" for name, r in profile.items())
            console.print()
            console.print(styled(shapes, "bold"), work_text(KernelTotals.of(kernels)), soft_wrap=True)
        if kernels or (verbose and not place):
            console.print(_kernels(kernels) if verbose else _modules(kernels))


def show_against(engines: Sequence[tuple[Path, Sidecar]]) -> None:
    """Print the kernels of two engines by PyTorch module, side by side."""
    from deploycli.exporters.bundle.engine import KernelTotals, by_module, readable_depth

    first, second = (sidecar.first_kernels for _, sidecar in engines)
    names = "A", "B"
    console = stdout()
    for letter, (plan, sidecar) in zip(names, engines, strict=True):
        console.print(styled(f"{letter} {plan}", "bold"), work_text(sidecar.totals), soft_wrap=True)
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
    from deploycli.exporters.bundle.engine import by_module, readable_depth

    table = table_of("module", "launches", "products", "attention", "moved")
    for module, totals in by_module(kernels, readable_depth(kernels)).items():
        products = counts_text(totals.products) or "-"
        table.add_row(module or "-", _launches(totals), products, _attention(totals), _megabytes(totals))
    return table


def _kernels(kernels: Sequence[Kernel]) -> Rows:
    from deploycli.exporters.bundle.engine import KernelTotals

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


def work_text(totals: KernelTotals) -> str:
    """Say what kernels do."""
    moved = f"{size_text(totals.moved)} of activations for one image"
    at_least = f"at least {moved} ({totals.unknown} are not known)" if totals.unknown else moved
    return f"{totals.launches} launches move {at_least}"


def counts_text(per_type: Mapping[str, int]) -> str:
    """Return counts as ``12 fp16, 3 fp32``."""
    return ", ".join(f"{count} {precision}" for precision, count in per_type.items())
