"""deploycli export."""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from deploycli.console import (
    Progress,
    next_step,
    print_json,
    show_artifact,
    show_steps,
    show_tuning,
    stdout,
)
from deploycli.options import (
    DEFAULT_ROOT,
    MOST_SIDE,
    SEEDS,
    Count,
    attention_option,
    batch_size,
    external_option,
    image_size,
    json_object,
    json_option,
    lint_option,
    preprocessing_of,
    preprocessing_options,
    stage_numbers,
    tensor_spec,
    tune_options,
    tuning_of,
)

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

    from deploycli.exporters.bundle.bundle import Bundle
    from deploycli.exporters.tune import Tuning
    from deploycli.models.spec import Layout, TensorSpec


def _complete_model(_ctx: click.Context, _param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    from click.shell_completion import CompletionItem

    from deploycli.models.registry import variants

    return [CompletionItem(v.name, help=v.summary) for v in variants() if v.name.startswith(incomplete)]


@click.command("export")
@click.argument("model", shell_complete=_complete_model)
@click.option("--fmt", type=click.Choice(["onnx"]), default="onnx", show_default=True, help="Format to write.")
@click.option(
    "-o",
    "--output",
    "outputs",
    multiple=True,
    metavar="DIR|softmax|topk:N",
    help="Folder of bundles  [default: artifacts]; or what the graph ends in, in place of logits: softmax, or topk:N, "
    "which gives the best N as scores and classes. Once for each.",
)
@click.option(
    "--name",
    metavar="NAME",
    help="Name of the bundle.  [default: the model's short name; of a factory, module.function]",
)
@click.option(
    "--checkpoint",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="Weights: the authors' .pth, timm's names, .safetensors, or Google's .npz.",
)
@click.option("--pretrained", is_flag=True, help="Fetch the published weights from the Hugging Face hub.")
@click.option("--pretrained-from", metavar="REPO[@REVISION]", help="Fetch weights from this hub repository instead.")
@click.option(
    "--seed", type=SEEDS, default=0, show_default=True, help="Seed of the random weights, where none are given."
)
@click.option(
    "--img-size",
    "img_sizes",
    type=image_size,
    multiple=True,
    metavar="SIZE",
    help="Image size: 224, or 256x192 (height x width). A bundle holds one.",
)
@click.option("--window-size", type=Count(most=MOST_SIDE), help="Attention window, tokens.")
@click.option(
    "--num-classes",
    type=Count(),
    help="Classes of the head, also of timm:, torchvision: and hf: models; read from a checkpoint.",
)
@click.option(
    "--weights-entry",
    metavar="NAME",
    help="Which of the checkpoint's sets of weights, where it has several.  [default: EMA weights, as timm]",
)
@click.option(
    "--model-kwargs", type=json_object, metavar="JSON", help="Keyword arguments of what makes a model from elsewhere."
)
@click.option(
    "--input",
    "inputs",
    type=tensor_spec,
    multiple=True,
    metavar="NAME:SHAPE[:TYPE[:LOW..HIGH]]",
    help="Input of a model from elsewhere, batch first: images:2x3x224x224, keep:2x16:bool, or ids:2x16:int64:0..30521 "
    "where the values are indices. Once for each, in forward's order.",
)
@click.option(
    "--batch",
    type=batch_size,
    default="dynamic",
    show_default=True,
    metavar="N|dynamic",
    help="Batch axis; a dynamic one is asserted to have survived.",
)
@click.option("--opset", type=Count(most=99), default=20, show_default=True, help="ONNX operator set, 18 to 23.")
@preprocessing_options
@click.option(
    "--uint8-input",
    "pixels",
    type=click.Choice(["nhwc", "nchw"]),
    help="Let the graph take decoded pictures, [B, H, W, 3] or [B, 3, H, W], and scale and normalise them itself.",
)
@click.option(
    "--features",
    type=stage_numbers,
    is_flag=False,
    flag_value="all",
    metavar="[STAGES]",
    help="Give the feature maps of the stages, stage1 to stage4, [B, C, H, W], in place of logits: all, or some, "
    "2,3,4. Of swin, crossformer and timm: models; Swin then takes images of any size.",
)
@click.option(
    "--labels",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="Names of the classes: one a line, or JSON.  [default: what the model's library calls them]",
)
@attention_option
@click.option("--no-rewrite", is_flag=True, help="Keep the plain traced graph.")
@external_option
@click.option(
    "--replace", is_flag=True, help="Replace a bundle of this name that is of another model; without this it is exit 2."
)
@lint_option
@tune_options
@click.option("-v", "--verbose", is_flag=True, help="Show every step, and what the passes refused.")
@json_option
def command(
    model: str,
    fmt: str,
    outputs: tuple[str, ...],
    name: str | None,
    checkpoint: Path | None,
    pretrained: bool,
    pretrained_from: str | None,
    seed: int,
    img_sizes: tuple[tuple[int, int], ...],
    window_size: int | None,
    num_classes: int | None,
    weights_entry: str | None,
    model_kwargs: dict[str, Any] | None,
    inputs: tuple[TensorSpec, ...],
    batch: int,
    opset: int,
    mean: tuple[float, float, float] | None,
    std: tuple[float, float, float] | None,
    crop: float | None,
    resize: int | None,
    interpolation: str | None,
    pixels: Layout | None,
    features: tuple[int, ...] | None,
    labels: Path | None,
    attention: str,
    no_rewrite: bool,
    external: str,
    replace: bool,
    no_lint: bool,
    tune: bool,
    tune_seconds: int,
    tune_gpu: str,
    verbose: bool,
    as_json: bool,
) -> int:
    """Trace MODEL, rewrite its graph, check it in ONNX Runtime, and write a bundle.

    Over a bundle of the same model: if its model.onnx comes out as it was, other precisions, engines and reports stay.

    MODEL is a name that `deploycli list` shows (swin_t, or the authors' swin_tiny_patch4_window7_224), or one from
    elsewhere: timm:NAME, torchvision:NAME, hf:FOLDER_OR_ID, package.module:factory, path/to/file.py:factory.

    \b
    Examples:
      deploycli export swin_t --fmt onnx
      deploycli export swin_b --checkpoint swin_base_patch4_window7_224.pth
      deploycli export swin_t --img-size 256 --window-size 8 --batch 16 --name swin_t_256
      deploycli export timm:swin_tiny_patch4_window7_224 --checkpoint last.pth --weights-entry state_dict
      deploycli export my_package.models:detector --input images:2x3x512x512
      deploycli export swin_t --features 2,3,4 --img-size 800x1333 --batch 1
      deploycli export timm:vit_small_patch16_224 --uint8-input nhwc --output topk:5 --labels names.txt
    """
    from deploycli.exporters.export import ExportOptions, export
    from deploycli.models.hub import parse

    root, ending = _outputs(outputs)
    options = ExportOptions(
        model=model,
        root=root,
        name=name,
        checkpoint=checkpoint,
        pretrained=parse(pretrained_from) if pretrained_from else pretrained,
        seed=seed,
        img_size=_only(img_sizes),
        window_size=window_size,
        num_classes=num_classes,
        weights_entry=weights_entry,
        model_kwargs=model_kwargs or {},
        inputs=inputs,
        opset=opset,
        batch=batch or None,
        rewrite=not no_rewrite,
        attention=attention,  # type: ignore[arg-type]  # click checked the choice
        external=external,  # type: ignore[arg-type]  # click checked the choice
        replace=replace,
        lint=not no_lint,
        preprocessing=preprocessing_of(mean, std, crop, resize, interpolation),
        pixels=pixels,
        ending=ending,
        features=features,
        labels=labels,
        tune=tuning_of(tune, tune_seconds, tune_gpu),
    )
    with Progress() as progress:
        told = partial(progress.warn_of, chosen=weights_entry is not None)
        tunings: list[Tuning] = []
        bundle = export(options, progress=progress, told=told, tuned=tunings.append, warn=progress.warn)
        progress.warn_of_gone(bundle)
    if as_json:
        print_json(bundle.manifest.to_json() | {"path": str(bundle.path), "gone": list(bundle.gone)})
    else:
        for tuning in tunings:
            show_tuning(stdout(), tuning)
        show_export(bundle, verbose=verbose)
    return 0


def _only(sizes: tuple[tuple[int, int], ...]) -> tuple[int, int] | None:
    """Return the image size, where one is given."""
    if len(sizes) > 1:
        given = " and ".join(f"{height}x{width}" for height, width in sizes)
        raise click.UsageError(f"--img-size {given}: a bundle holds one size; export each under a --name of its own")
    return sizes[0] if sizes else None


def _outputs(given: tuple[str, ...]) -> tuple[Path, str]:
    """Return the folder of bundles, and what the graph ends in."""
    endings = [text for text in given if re.fullmatch(r"softmax|topk:[0-9]{1,6}", text)]
    folders = [text for text in given if text not in endings]
    if len(endings) > 1 or len(folders) > 1:
        raise click.UsageError(f"--output {' and '.join(endings if len(endings) > 1 else folders)}: give one of a kind")
    if any(text.startswith("topk") for text in folders):
        raise click.UsageError(f"--output {folders[0]}: write topk:5 for the best five classes")
    if endings and endings[0].startswith("topk") and int(endings[0][5:]) < 1:
        raise click.UsageError(f"--output {endings[0]}: the best one or more")
    folder = Path(folders[0]) if folders else DEFAULT_ROOT
    if folder.is_file():
        raise click.UsageError(f"--output: {str(folder)!r} is a file; name a folder of bundles")
    return folder, endings[0] if endings else ""


def show_export(bundle: Bundle, *, verbose: bool) -> None:
    """Print what an export made, and what to do next."""
    console = stdout()
    manifest = bundle.manifest
    if manifest.weights.source != "random":  # of which progress warns
        told = manifest.weights.describe()
        line = told if told.startswith("weights") else f"weights: {told}"
        console.print(line, soft_wrap=True)
    for artifact in manifest.artifacts:
        show_artifact(console, bundle, artifact)
    if verbose:
        show_steps(console, manifest.artifacts[-1].steps)
    next_step(console, bundle)
