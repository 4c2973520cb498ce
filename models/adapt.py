"""What a model needs around it, as part of the traced graph: pixels in front, probabilities or the best classes behind.

They are hooks of the module, so that its parameters and the paths of its modules stay what they are.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from deploycli.models.errors import UsageError
from deploycli.models.factory import contained
from deploycli.models.outputs import example, flatten
from deploycli.models.spec import Ending, Layout, PixelInput, Preprocessing, TensorSpec

if TYPE_CHECKING:
    from torch import nn

    from deploycli.models.spec import ModelSpec

LARGEST_K = 3840
"""TensorRT's TopK takes no more: https://docs.nvidia.com/deeplearning/tensorrt/operators/docs/TopK.html"""


def adapt(module: nn.Module, spec: ModelSpec) -> nn.Module:
    """Let a module take and give what its spec says; return it."""
    if (pixels := spec.pixels) is not None:
        module.register_forward_pre_hook(lambda model, inputs: (_prepared(model, inputs[0], pixels),))
    if (ending := spec.ending) is not None:
        module.register_forward_hook(lambda _model, _inputs, outputs: _ended(outputs, ending))
    return module


def from_pixels(spec: ModelSpec, known: Preprocessing | None, layout: Layout) -> tuple[ModelSpec, Preprocessing]:
    """Return the spec of a model that takes decoded pictures, and how they are prepared then.

    Args:
        spec: of a model that takes one picture, [3, H, W].
        known: how it is prepared.
        layout: of the decoded pictures.

    Raises:
        UsageError: it takes something else, or nothing is known of its normalisation.
    """
    if len(spec.inputs) != 1 or len(spec.inputs[0].shape) != 3 or spec.inputs[0].shape[0] != 3:
        shown = "; ".join(f"{one.name} {list(one.shape)}" for one in spec.inputs)
        raise UsageError(f"--uint8-input, and the inputs are {shown}", expected="one picture, [3, height, width]")
    if known is None:
        raise UsageError(
            "--uint8-input, and how this model wants its pictures is not known",
            expected="--mean R,G,B and --std R,G,B, of values from 0 to 1",
            hint="--mean 0.485,0.456,0.406 --std 0.229,0.224,0.225, where it is ImageNet's",
        )
    (image,) = spec.inputs
    _, height, width = image.shape
    shape = (height, width, 3) if layout == "nhwc" else (3, height, width)
    pixels = PixelInput(layout, known.mean, known.std)
    return (
        replace(spec, inputs=(TensorSpec(image.name, shape, "uint8"),), pixels=pixels),
        replace(known, pixels=layout),
    )


def _prepared(model: nn.Module, pictures: torch.Tensor, pixels: PixelInput) -> torch.Tensor:
    """Return what the model was trained on: [B, H, W, 3] or [B, 3, H, W], uint8 -> [B, 3, H, W], normalised."""
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    images = pictures.to(dtype)
    if pixels.layout == "nhwc":
        images = images.permute(0, 3, 1, 2)  # [B, H, W, 3] -> [B, 3, H, W]
    scale = [1 / (255 * std) for std in pixels.std]
    shift = [-mean / std for mean, std in zip(pixels.mean, pixels.std, strict=True)]
    gain, offset = (torch.tensor(v, dtype=dtype, device=images.device).reshape(3, 1, 1) for v in (scale, shift))
    return images * gain + offset


def ended(module: nn.Module, spec: ModelSpec, wanted: str) -> ModelSpec:
    """Let a model with its weights end in softmax or topk:N; return its spec.

    Args:
        module: as `build` made it for the spec.
        spec: without an ending.
        wanted: ``softmax`` or ``topk:N``.

    Raises:
        UsageError: it has no output [B, classes], or fewer classes than N.
    """
    kind, _, number = wanted.partition(":")
    with torch.inference_mode(), contained():
        outputs = dict(zip(spec.outputs, flatten(module(*example(spec.inputs, 2))).values(), strict=True))
    logits = next((name for name, value in outputs.items() if value.ndim == 2 and value.shape[1] > 1), None)
    if logits is None:
        shown = ", ".join(f"{name} {list(value.shape)[1:]}" for name, value in outputs.items())
        raise UsageError(f"--output {wanted}, and the model's outputs are {shown}", expected="one [batch, classes]")
    classes = outputs[logits].shape[1]
    k = int(number) if kind == "topk" else 0
    if k > min(classes, LARGEST_K):
        most = min(classes, LARGEST_K)
        raise UsageError(f"--output {wanted}, and the model has {classes} classes", expected=f"at most {most}")
    ending = Ending("topk" if kind == "topk" else "softmax", logits, classes, k)
    names = [new for name in spec.outputs for new in (ending.outputs if name == logits else (name,))]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise UsageError(f"--output {wanted}, and the model has an output {twice[0]!r} already")
    result = replace(spec, outputs=tuple(names), ending=ending)
    adapt(module, replace(result, pixels=None))  # which it has
    return result


def _ended(outputs: object, ending: Ending) -> dict[str, Any]:
    """Return the outputs with the logits, the first that are [B, classes], in another form."""
    made: dict[str, Any] = {}
    waiting = True
    for name, value in flatten(outputs).items():
        if not (waiting and value.ndim == 2 and value.shape[1] == ending.classes):
            made[name] = value
            continue
        waiting = False
        shares = value.softmax(dim=-1)  # [B, classes]
        if ending.kind == "softmax":
            made[ending.outputs[0]] = shares
        else:  # [B, classes] -> [B, k]
            made[ending.outputs[0]], made[ending.outputs[1]] = torch.topk(shares, ending.k, dim=-1)
    return made
