"""Describe the models that come from elsewhere: what goes in, what comes out, how their images are prepared."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from msgspec import Meta

from deploycli.models.build import build
from deploycli.models.codec import load
from deploycli.models.errors import DeployError, UsageError, first_line
from deploycli.models.external import CLASSES, backbone_arguments, maps_of, transformers_folder
from deploycli.models.features import no_features, output_name
from deploycli.models.hub import parse
from deploycli.models.outputs import answers_numbers, output_names
from deploycli.models.spec import INTERPOLATIONS, Hides, ModelSpec, Preprocessing, Scale, TensorSpec, is_mask
from deploycli.models.variants import INPUT_NAME, HubFile, Variant

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import nn

    from deploycli.models.sources import Source


def describe(
    source: Source,
    kwargs: Mapping[str, Any],
    *,
    inputs: Sequence[TensorSpec] = (),
    img_size: tuple[int, int] | None = None,
    features: Sequence[int] | None = None,
) -> Variant:
    """Make a model once and describe it: what goes in, what comes out, how its images are prepared.

    Args:
        source: where it comes from.
        kwargs: keyword arguments of what makes it.
        inputs: its inputs, in the order of its forward; by default one image of the size that the model names.
        img_size: image height and width in place of that size, pixels.
        features: give the feature maps of these stages in place of logits, the first is 1; empty for all that the
            library gives, None for logits.

    Raises:
        UsageError: it cannot be made, does not run on such inputs, or returns something other than tensors.
        EnvironmentUnsuitable: its package is not installed.
    """
    target = _pinned(source)
    if features is not None:
        if source.family != "timm":
            raise no_features(f"{source.family}:{target}", "swin, crossformer or crossformer_pp of `deploycli list`")
        kwargs = backbone_arguments(target, kwargs, features)
    config = {"target": target, "kwargs": dict(kwargs)}
    spec = ModelSpec(source.name, source.family, config, tuple(inputs))
    module = build(spec)
    if not inputs:
        channels, height, width = _input_shape(module, kwargs)
        height, width = img_size or (height, width)
        spec = replace(spec, inputs=(TensorSpec(INPUT_NAME, (channels, height, width)),))
    try:
        outputs = output_names(module, spec.inputs)
    except DeployError:
        raise
    except Exception as error:  # a stranger's code raises what it likes
        shapes = ", ".join(f"{i.name}:{'x'.join(map(str, (2, *i.shape)))}:{i.dtype}" for i in spec.inputs)
        raise UsageError(
            f"{target} does not run on {shapes}: {type(error).__name__}: {first_line(error)}",
            hint="--input NAME:2x3x224x224 (or NAME:2x16:int64:0..9, with a type and a range), once for each input "
            "in the order of forward; or --img-size",
        ) from error
    spec = replace(spec, inputs=tuple(_hiding(module, spec.inputs, place) for place in range(len(spec.inputs))))
    taken = {i.name for i in spec.inputs}
    outputs = tuple(f"{name}_output" if name in taken else name for name in outputs)
    if features is not None:
        numbers, strides = zip(*maps_of(module), strict=True)
        outputs, spec = tuple(map(output_name, numbers)), replace(spec, strides=strides)
    return Variant(
        replace(spec, outputs=outputs),
        _preprocessing(module, source.family, target, spec.inputs[0]),
        pretrained=_published(module),
        summary=f"{target} of {source.family}",
    )


def with_classes(source: Source, kwargs: Mapping[str, Any], num_classes: int | None) -> dict[str, Any]:
    """Return the arguments with the number of classes among them, as the library calls it; None changes nothing.

    Raises:
        UsageError: a factory, whose arguments have no known names; or the arguments hold another number.
    """
    if num_classes is None:
        return dict(kwargs)
    option = CLASSES.get(source.family)
    if option is None:
        raise UsageError(
            f"--num-classes means nothing to {source.target}, a function of your own",
            hint=f"""--model-kwargs '{{"num_classes": {num_classes}}}', if that is what it calls it""",
        )
    if (given := kwargs.get(option, num_classes)) != num_classes:
        raise UsageError(
            f"--num-classes {num_classes}, and --model-kwargs with {option} {given}", expected="one of them"
        )
    return {**kwargs, option: num_classes}


def _hiding(module: nn.Module, inputs: Sequence[TensorSpec], place: int) -> TensorSpec:
    """Return an input with what hides all of a sample, where it is a mask, and whether the model bears that."""
    spec = inputs[place]
    if not is_mask(spec):
        return spec
    low, high = spec.values or (0, 1)
    tries: dict[Hides, float | None] = (
        {"infinite": float("-inf"), "finite": None}
        if spec.dtype.startswith("float")
        else {"finite": None, "high": low, "low": high}
    )
    for hides, value in tries.items():
        if answers_numbers(module, inputs, place, value):
            return replace(spec, hides=hides)
    return spec


def own_checkpoint(target: str) -> Path | None:
    """Return the weights that lie beside a transformers configuration, if there are any.

    Raises:
        UsageError: they are in several files.
    """
    folder = transformers_folder(target, "model.safetensors")
    if list(folder.glob("model-*.safetensors")) or list(folder.glob("pytorch_model-*.bin")):
        raise UsageError(f"{target} has its weights in several files", expected="one model.safetensors")
    paths = (folder / name for name in ("model.safetensors", "pytorch_model.bin"))
    return next((path for path in paths if path.is_file()), None)


def _pinned(source: Source) -> str:
    """Return the target with the commit that its branch is at now, so that it means the same model for ever."""
    if source.family != "hf":
        return source.target
    folder = transformers_folder(source.target)
    if folder == Path(source.target):
        return str(folder.resolve())
    return f"{source.target.partition('@')[0]}@{folder.name}"


def _published(module: nn.Module) -> HubFile | None:
    """Return the weights that timm publishes for one of its models."""
    repo = _read(getattr(module, "pretrained_cfg", None), "hf_hub_id")
    return parse(repo) if isinstance(repo, str) and not repo.endswith("/") else None


def _input_shape(module: nn.Module, kwargs: Mapping[str, Any]) -> tuple[int, int, int]:
    """Return the image shape [C, H, W] that a model of a library says it takes; 3x224x224 where it does not say.

    What it was made with, by timm's words for it, is what holds.
    """
    config = getattr(module, "config", None)
    told = _read(getattr(module, "pretrained_cfg", None), "input_size")
    channels, *sides = told if isinstance(told, list | tuple) and len(told) == 3 else (3, 224, 224)
    channels = _read(config, "num_channels") or kwargs.get("in_chans") or channels
    height, width = _sides(kwargs.get("img_size")) or _sides(_read(config, "image_size")) or sides
    return channels, height, width


def _sides(size: object) -> tuple[int, int] | None:
    height, width = size if isinstance(size, list | tuple) and len(size) == 2 else (size, size)
    return (height, width) if isinstance(height, int) and isinstance(width, int) else None


def _preprocessing(module: nn.Module, family: str, target: str, image: TensorSpec) -> Preprocessing | None:
    """Return how the library prepares images for the model; None where it does not say: nothing is made up."""
    if len(image.shape) != 3 or image.shape[0] != 3:
        return None
    size = (image.shape[1], image.shape[2])
    if family == "hf":
        return _of_transformers(target, size)
    if family == "torchvision":
        return _of_torchvision(target, size)
    told = getattr(module, "pretrained_cfg", None) or {}
    if told.get("mean") is None or told.get("std") is None:
        return None
    default = Preprocessing(size)
    return replace(
        default,
        crop_pct=told.get("crop_pct") or 1.0,
        interpolation=told["interpolation"] if told.get("interpolation") in INTERPOLATIONS else default.interpolation,
        mean=tuple(told["mean"]),
        std=tuple(told["std"]),
    )


def _of_transformers(target: str, size: tuple[int, int]) -> Preprocessing | None:
    path = transformers_folder(target) / "preprocessor_config.json"
    if not path.is_file():
        return None
    said = load(path, _Processor, what="a processor's configuration", partial=True)
    if said.image_mean is None or said.image_std is None:
        return None
    # Where transformers squeezes a picture into a square, this recipe crops it: the closest that it can say.
    return Preprocessing(
        size,
        crop_pct=said.crop_pct or 1.0,
        interpolation="bilinear" if said.resample == 2 else "bicubic",  # Pillow's numbers
        mean=said.image_mean,
        std=said.image_std,
    )


def _of_torchvision(target: str, size: tuple[int, int]) -> Preprocessing | None:
    """Return the recipe of the weights that torchvision publishes for the model."""
    weights = importlib.import_module("torchvision.models").get_model_weights(target)
    recipe = next(iter(weights)).transforms()
    if not all(hasattr(recipe, name) for name in ("crop_size", "resize_size", "mean", "std", "interpolation")):
        return None  # of detectors: they resize for themselves
    interpolation = recipe.interpolation.value
    return Preprocessing(
        size,
        crop_pct=recipe.crop_size[0] / recipe.resize_size[0],
        interpolation=interpolation if interpolation in INTERPOLATIONS else "bilinear",
        mean=tuple(recipe.mean),
        std=tuple(recipe.std),
    )


@dataclass(frozen=True)
class _Processor:
    """What is read of transformers' preprocessor_config.json."""

    crop_pct: Annotated[float, Meta(ge=0, le=100)] | None = None
    resample: int | None = None
    image_mean: tuple[float, float, float] | None = None
    image_std: tuple[Scale, Scale, Scale] | None = None


def _read(holder: object, key: str) -> Any:
    return holder.get(key) if isinstance(holder, Mapping) else getattr(holder, key, None)
