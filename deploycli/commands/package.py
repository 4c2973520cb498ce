"""deploycli package."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import click

from deploycli.console import print_json, size_text, stdout, styled
from deploycli.options import Count, batch_sizes, json_option, open_bundles, output_option

if TYPE_CHECKING:
    from collections.abc import Sequence

    from deploycli.exporters.bundle.bundle import Bundle
    from deploycli.exporters.serving.ort_rtx import PackagedFolder
    from deploycli.exporters.serving.release import Packaged
    from deploycli.exporters.serving.triton import PackagedVersion


POSITIVE = Count()


@click.command("package")
@click.argument("bundles", nargs=-1, metavar="[BUNDLE]...")
@output_option
@click.option(
    "--triton",
    type=click.Path(path_type=Path, file_okay=False),
    metavar="DIR",
    help="Triton model repository to write into.",
)
@click.option(
    "--ort-rtx",
    type=click.Path(path_type=Path, file_okay=False),
    metavar="DIR",
    help="Write a folder for ONNX Runtime with NVIDIA's TensorRT RTX provider instead, into DIR: for RTX GPUs, whose "
    "engines no server loads. Takes --precision, --engine, --name and --force.",
)
@click.option(
    "--flavour",
    type=click.Choice(["onnx", "tensorrt"]),
    default="onnx",
    show_default=True,
    help="What serves it: ONNX Runtime, or a TensorRT engine of the bundle.",
)
@click.option(
    "--precision",
    type=click.Choice(["fp32", "fp16", "bf16", "fp8", "int8"]),
    help="Which file.  [default: fp32 of ONNX for Triton; else the smallest that is verified]",
)
@click.option("--engine", metavar="FILE", help="Which engine, where there are several of one precision.")
@click.option("--name", metavar="NAME", help="Name of the model.  [default: the bundle's]")
@click.option("--version", type=POSITIVE, metavar="N", help="Number of the version.  [default: the next one]")
@click.option(
    "--max-batch",
    type=POSITIVE,
    metavar="N",
    help="Largest batch; a file with a fixed one is served with max_batch_size: 0.  [default: 32, or the largest that "
    "the engine takes]",
)
@click.option("--preferred-batch", type=batch_sizes, metavar="N,N,...", help="Batches that the server should form.")
@click.option(
    "--queue-delay",
    type=Count(0),
    metavar="US",
    help="How long a request may wait for others, microseconds.  [default: it does not]",
)
@click.option(
    "--instances",
    type=POSITIVE,
    default=1,
    show_default=True,
    metavar="N",
    help="Copies beside each other, on each GPU.",
)
@click.option(
    "--kind",
    type=click.Choice(["auto", "cpu", "gpu"]),
    help="Where it runs.  [default: auto of ONNX; gpu of TensorRT]",
)
@click.option("--onnx-tensorrt", is_flag=True, help="Let ONNX Runtime build a TensorRT engine when the server starts.")
@click.option(
    "--labels",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="Names of the classes: one a line, or JSON.  [default: those of the bundle]",
)
@click.option(
    "--force",
    is_flag=True,
    help="Package what is not for release, which the configuration then says, and replace any configuration.",
)
@json_option
def command(
    bundles: tuple[str, ...],
    root: Path,
    triton: Path | None,
    ort_rtx: Path | None,
    flavour: Literal["onnx", "tensorrt"],
    precision: str | None,
    engine: str | None,
    name: str | None,
    version: int | None,
    max_batch: int | None,
    preferred_batch: tuple[int, ...] | None,
    queue_delay: int | None,
    instances: int,
    kind: str | None,
    onnx_tensorrt: bool,
    labels: Path | None,
    force: bool,
    as_json: bool,
) -> int:
    """Write a version of BUNDLE (or of every bundle) into a Triton model repository, DIR/NAME/VERSION.

    Or, for RTX GPUs, a folder DIR/NAME with its ONNX file, options of ONNX Runtime's TensorRT RTX provider, and what
    opens it.

    A file that did not pass `deploycli verify` as it is now is refused, and so is one with random weights or calibrated
    on random numbers: exit 5 where verification found it outside its budget, else 2. Versions that are there are kept.

    \b
    Examples:
      deploycli package --triton models
      deploycli package swin_t --triton models --labels imagenet.txt --max-batch 16 --queue-delay 500
      deploycli package swin_t --triton models --precision fp16 --onnx-tensorrt
      deploycli package swin_t --triton models --flavour tensorrt --preferred-batch 8,16,32
      deploycli package swin_t --ort-rtx served --precision fp16
    """

    if triton is None and ort_rtx is not None:
        _refuse_options_of_triton()
        folders = _package_folders(_opened(root, bundles, name), ort_rtx, precision, engine, name, force=force)
        if as_json:
            print_json([folder.to_json() for folder in folders])
        else:
            show_folders(folders)
        return 0
    if triton is None or ort_rtx is not None:
        raise click.UsageError("--triton DIR or --ort-rtx DIR says where to write: one of them")
    from deploycli.exporters.serving.triton import prepare
    from deploycli.exporters.serving.triton_config import TritonOptions

    options = TritonOptions(
        flavour=flavour,
        precision=precision,
        engine=engine,
        name=name,
        version=version,
        max_batch=max_batch,
        preferred_batch=preferred_batch or (),
        queue_delay=queue_delay,
        instances=instances,
        kind=kind,
        onnx_tensorrt=onnx_tensorrt,
        labels=labels,
        force=force,
    )
    opened = _opened(root, bundles, name)
    deliveries = [prepare(bundle, triton, options) for bundle in opened]  # all of them, before anything is written
    packaged = [delivery.write() for delivery in deliveries]
    if as_json:
        print_json([version.to_json() for version in packaged])
    else:
        show_packaged(packaged, triton)
    return 0


def _package_folders(
    bundles: list[Bundle], root: Path, precision: str | None, engine: str | None, name: str | None, *, force: bool
) -> list[PackagedFolder]:
    """Write a folder for ONNX Runtime of each bundle; see `deploycli.exporters.serving.ort_rtx.prepare` for the
    errors."""
    from deploycli.exporters.serving.ort_rtx import OrtRtxOptions, prepare

    options = OrtRtxOptions(precision, engine, name, force)
    deliveries = [prepare(bundle, root, options) for bundle in bundles]  # all of them, before anything is written
    return [delivery.write() for delivery in deliveries]


_OF_TRITON = (
    *("flavour", "version", "max_batch", "preferred_batch", "queue_delay", "instances", "kind"),
    *("onnx_tensorrt", "labels"),
)


def _refuse_options_of_triton() -> None:
    """Refuse what a folder for ONNX Runtime has no place for.

    Raises:
        UsageError: one was given.
    """
    context = click.get_current_context()
    for name in _OF_TRITON:
        if context.get_parameter_source(name) is click.core.ParameterSource.COMMANDLINE:
            raise click.UsageError(f"--{name.replace('_', '-')} is of --triton, and has no meaning for --ort-rtx")


def _opened(root: Path, given: tuple[str, ...], name: str | None) -> list[Bundle]:
    """Open bundles, and refuse what would make versions of one model out of several.

    Raises:
        UsageError: two bundles of one name, or one name for several.
    """
    bundles = open_bundles(root, given)
    names = [name or bundle.path.resolve().name for bundle in bundles]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise click.UsageError(f"several bundles would be the model {twice[0]!r}; package them one by one with --name")
    return bundles


def show_packaged(packaged: Sequence[PackagedVersion], repository: Path) -> None:
    """Print the versions that were written, and how to serve them."""
    console = stdout()
    for version in packaged:
        batch = f"batches up to {version.max_batch_size}" if version.max_batch_size else "a fixed batch"
        console.print(
            styled(version.path, "bold"),
            f"{size_text(version.file.size)}, {version.flavour} {version.file.precision}, {batch}",
            soft_wrap=True,
        )
        _show_source(version)
        for note in version.notes:
            console.print(f"  {note}", soft_wrap=True)
        _show_forced(version)
    console.print(f"next: tritonserver --model-repository {shlex.quote(str(repository))}", soft_wrap=True)


def show_folders(folders: Sequence[PackagedFolder]) -> None:
    """Print the folders for ONNX Runtime that were written, and how to try them."""
    console = stdout()
    for folder in folders:
        console.print(
            styled(folder.path, "bold"),
            f"{size_text(folder.file.size)}, {folder.file.precision}, for ONNX Runtime with the TensorRT RTX provider",
            soft_wrap=True,
        )
        _show_source(folder)
        shapes = [folder.provider_options.get(f"nv_profile_{which}_shapes", "") for which in ("min", "opt", "max")]
        if shapes[0]:
            of = f", those of {folder.engine}" if folder.engine else ""
            console.print(f"  shapes {' / '.join(shapes)}{of}", soft_wrap=True)
        _show_forced(folder)
    for folder in folders:
        console.print(f"next: python {shlex.quote(folder.path + '/load.py')}", soft_wrap=True)


def _show_source(packaged: Packaged) -> None:
    line = f"  from {packaged.file.path}, verified: {packaged.file.verdict.status}"
    stdout().print(line, soft_wrap=True)


def _show_forced(packaged: Packaged) -> None:
    for why in packaged.forced:
        stdout().print(styled(f"  NOT FOR RELEASE: {why}", "bold red"), soft_wrap=True)
