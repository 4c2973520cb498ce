"""The registered models, by name and alias. Light: PyTorch is not imported."""

from __future__ import annotations

import difflib
import fnmatch
from dataclasses import replace
from typing import Any

from deploycli.models.errors import UsageError
from deploycli.models.variants import VARIANTS, Variant, spec

_VARIANTS: dict[str, Variant] = {}
_SHORT_NAMES: dict[str, str] = {}  # every name, short or alias -> short name


def register(variant: Variant) -> None:
    """Make a variant known under its name and its aliases.

    Raises:
        ValueError: one of them is taken.
    """
    names = (variant.name, *variant.aliases)
    if taken := [known for known in names if known in _SHORT_NAMES]:
        raise ValueError(f"{variant.name}: already registered: {', '.join(taken)}")
    _VARIANTS[variant.name] = variant
    _SHORT_NAMES.update(dict.fromkeys(names, variant.name))


for _variant in VARIANTS:
    register(_variant)


def resolve(name: str) -> Variant:
    """Return the variant called ``name``, be it a short name or an alias.

    Raises:
        UsageError: no model has that name; the nearest ones are suggested.
    """
    if name in _SHORT_NAMES:
        return _VARIANTS[_SHORT_NAMES[name]]
    near = difflib.get_close_matches(name.lower().replace("-", "_"), _SHORT_NAMES, n=3, cutoff=0.5)
    raise UsageError(
        f"unknown model {name!r}",
        expected="a registered model; `deploycli list` shows them",
        hint=" or ".join(near) or ", ".join(_VARIANTS),
    )


def variants(pattern: str | None = None) -> list[Variant]:
    """Return the variants in the order of registration, or those with a name that matches.

    Args:
        pattern: a glob such as ``swin_*_384``, or a part of a name; aliases count.
    """
    if pattern is None:
        return list(_VARIANTS.values())
    glob = pattern if any(c in pattern for c in "*?[") else f"*{pattern}*"
    return [v for v in _VARIANTS.values() if any(fnmatch.fnmatchcase(n, glob.lower()) for n in (v.name, *v.aliases))]


def configure(
    variant: Variant,
    *,
    img_size: int | tuple[int, int] | None = None,
    window_size: int | None = None,
    num_classes: int | None = None,
    **overrides: Any,
) -> Variant:
    """Return the variant with some of its arguments replaced; what is None stays.

    Args:
        variant: the variant to start from; it is not changed.
        img_size: image side, or height and width, pixels.
        window_size: side of the attention window, or of CrossFormer's group, tokens.
        num_classes: outputs of the head.
        overrides: other arguments of the family's constructor, such as ``ape=True``.

    Raises:
        UsageError: a value is not positive, or the family has no such argument. Whether an image size fits the windows
            is checked when the model is built.
    """
    sides = (img_size, img_size) if isinstance(img_size, int) else img_size
    changes = dict(overrides)
    window = "group_size" if "group_size" in variant.spec.config else "window_size"  # CrossFormer's word for it
    for key, value in (("img_size", sides), (window, window_size), ("num_classes", num_classes)):
        if value is None:
            continue
        if min(value if isinstance(value, tuple) else (value,)) < 1:
            raise UsageError(f"{key} is {value}", expected="a positive number")
        changes[key] = list(value) if isinstance(value, tuple) else value
    for key in changes:
        if key not in variant.spec.config:
            raise UsageError(
                f"{variant.name} has no argument {key!r}",
                expected=f"one of {', '.join(variant.spec.config)}",
                hint=next(iter(difflib.get_close_matches(key, variant.spec.config)), ""),
            )
    config = {**variant.spec.config, **changes}
    preprocessing = variant.preprocessing
    if sides is not None and preprocessing is not None:
        preprocessing = replace(preprocessing, size=sides)
    return replace(variant, spec=spec(variant.name, variant.spec.family, config), preprocessing=preprocessing)
