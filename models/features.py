"""A classifier as a backbone: the feature map of each stage in place of logits. Light: PyTorch is not imported."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from deploycli.models.errors import UsageError
from deploycli.models.spec import ModelSpec

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from deploycli.models.variants import Variant

_BACKBONES = {
    "swin": "swin_backbone",
    "crossformer": "crossformer_backbone",
    "crossformer_pp": "crossformer_backbone",
}
"""Family of the classifier -> family of its backbone."""

_INTERVAL = (8, 4, 2, 1)
"""Of CrossFormer's stages, in its authors' detectors; its classifier's are these at 224x224."""


def with_features(variant: Variant, stages: Sequence[int]) -> Variant:
    """Return the backbone of a registered classifier.

    Args:
        variant: the classifier.
        stages: whose feature maps are given, the first is 1; none for all.

    Raises:
        UsageError: it has no maps of several strides, or no such stage.
    """
    spec = variant.spec
    if spec.family not in _BACKBONES:
        raise no_features(variant.name, "a model of the families " + ", ".join(_BACKBONES))
    strides = _strides(spec.config)
    chosen = chosen_stages(variant.name, stages, range(1, len(strides) + 1))
    backbone = ModelSpec(
        spec.name,
        _BACKBONES[spec.family],
        _config(spec, chosen),
        spec.inputs,
        outputs=tuple(output_name(stage) for stage in chosen),
        strides=tuple(strides[stage - 1] for stage in chosen),
    )
    return replace(variant, spec=backbone)


def no_features(name: str, expected: str) -> UsageError:
    """Return the error of a model that is no backbone."""
    return UsageError(
        f"--features of {name}, which has no feature maps of several stages", expected=f"{expected}, or timm:NAME"
    )


def chosen_stages(name: str, stages: Sequence[int], known: Sequence[int]) -> tuple[int, ...]:
    """Return the stages in order; all that are known where none are given.

    Raises:
        UsageError: one of them is unknown.
    """
    if unknown := sorted(set(stages) - set(known)):
        raise UsageError(
            f"--features {unknown[0]}, and {name} has {len(known)} stages",
            expected=f"some of {', '.join(map(str, known))}",
        )
    return tuple(sorted(set(stages))) or tuple(known)


def output_name(stage: int) -> str:
    """Return what the feature map of a stage is called; the first is 1."""
    return f"stage{stage}"


def _config(spec: ModelSpec, stages: Sequence[int]) -> dict[str, Any]:
    config = {key: value for key, value in spec.config.items() if key != "num_classes"}
    if spec.family == "swin" and config.pop("ape", False):
        raise UsageError(f"--features of {spec.name} with absolute positions", expected="ape=False")
    if spec.family == "crossformer":
        count = len(config["depths"])
        config |= {"group_size": [config["group_size"]] * count, "interval": list(_INTERVAL[:count])}
    if spec.family == "crossformer_pp":
        config["cooling"] = True
    return {**config, "stages": list(stages)}


def _strides(config: Mapping[str, Any]) -> list[int]:
    """Return the pixels between two tokens in each stage: a patch in the first, and twice as many in each further."""
    patch = config["patch_size"]
    first = patch if isinstance(patch, int) else patch[0]
    return [first * 2**stage for stage in range(len(config["depths"]))]
