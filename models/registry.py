"""The registered models: names, aliases, and the data that each one carries. Light: PyTorch is not imported."""

from __future__ import annotations

import difflib
import fnmatch
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from deploycli.models.errors import UsageError
from deploycli.models.spec import ModelSpec, Preprocessing, TensorSpec

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

INPUT_NAME = "images"
OUTPUT_NAME = "logits"


@dataclass(frozen=True)
class HubFile:
    """One file on the Hugging Face hub.

    Attributes:
        repo: ``owner/name``.
        revision: the commit that is pinned. Where none is known it is ``main``, which is resolved to its commit when
            the file is fetched; that commit, and the hash of the file, are what the manifest records.
        filename: path within the repository; only safetensors files are fetched.
    """

    repo: str
    revision: str = "main"
    filename: str = "model.safetensors"


@dataclass(frozen=True)
class Variant:
    """One registered model.

    Attributes:
        spec: what determines its graph.
        preprocessing: how its images are prepared; None where it takes none.
        aliases: other names that resolve to it: the authors' long name, and timm's.
        pretrained: its published weights, or None.
        summary: one line for people.
    """

    spec: ModelSpec
    preprocessing: Preprocessing | None
    aliases: tuple[str, ...] = ()
    pretrained: HubFile | None = None
    summary: str = ""

    @property
    def name(self) -> str:
        """The short name."""
        return self.spec.name


@dataclass(frozen=True)
class Design:
    """What a registered function returns: the family, its constructor's arguments, and the image recipe."""

    family: str
    config: Mapping[str, Any]
    preprocessing: Preprocessing


_VARIANTS: dict[str, Variant] = {}
_SHORT_NAMES: dict[str, str] = {}  # every name, short or alias -> short name


def register(
    *aliases: str, pretrained: HubFile | None = None
) -> Callable[[Callable[[], Design]], Callable[[], Design]]:
    """Register the decorated function's design under the function's name and its aliases.

    The first line of its docstring becomes the summary. The hub repository's own name is an alias, too.
    """

    def add(make: Callable[[], Design]) -> Callable[[], Design]:
        name, design = make.__name__, make()
        names = (*aliases, pretrained.repo.partition("/")[2]) if pretrained else aliases
        taken = [known for known in (name, *names) if known in _SHORT_NAMES]
        if taken:
            raise ValueError(f"{name}: already registered: {', '.join(taken)}")
        _VARIANTS[name] = Variant(
            spec=_spec(name, design.family, design.config),
            preprocessing=design.preprocessing,
            aliases=names,
            pretrained=pretrained,
            summary=(make.__doc__ or "").partition("\n")[0],
        )
        _SHORT_NAMES.update(dict.fromkeys((name, *names), name))
        return make

    return add


def resolve(name: str) -> Variant:
    """Return the variant called ``name``, be it a short name or an alias.

    Raises:
        UsageError: no model has that name; the nearest ones are suggested.
    """
    _load()
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
    _load()
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
    return replace(variant, spec=_spec(variant.name, variant.spec.family, config), preprocessing=preprocessing)


def _spec(name: str, family: str, config: Mapping[str, Any]) -> ModelSpec:
    height, width = config["img_size"]
    images = TensorSpec(INPUT_NAME, (config["in_chans"], height, width))
    return ModelSpec(name, family, config, inputs=(images,), outputs=(OUTPUT_NAME,))


def _load() -> None:
    """Register everything; here and not at the top because the variants import this module."""
    from deploycli.models import variants, vit_variants, crossformer_variants  # noqa: F401, I001 - importing registers, in order
