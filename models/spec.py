"""The data that describes a model: what determines its graph, and how its images are prepared.

Everything here is frozen, converts to JSON and back, and imports nothing heavy.
"""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class TensorSpec:
    """One graph input: its name, its shape without the batch axis, and its element type."""

    name: str
    shape: tuple[int, ...]
    dtype: str = "float32"


@dataclass(frozen=True)
class ModelSpec:
    """What determines the graph, weights aside.

    Attributes:
        name: the registered short name, such as ``swin_t``.
        family: the module under ``models`` that builds it, such as ``swin``.
        config: keyword arguments of the family's constructor; JSON values only.
        inputs: graph inputs in order.
        outputs: names of the graph outputs in order.
    """

    name: str
    family: str
    config: Mapping[str, Any]
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[str, ...] = ("logits",)

    def to_json(self) -> dict[str, Any]:
        """Return the spec as JSON values."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> ModelSpec:
        """Rebuild a spec from :meth:`to_json`."""
        inputs = tuple(TensorSpec(i["name"], tuple(i["shape"]), i["dtype"]) for i in data["inputs"])
        return cls(data["name"], data["family"], dict(data["config"]), inputs, tuple(data["outputs"]))


@dataclass(frozen=True)
class Preprocessing:
    """How a picture becomes a model input: resize the shorter side, crop the centre, scale to [0, 1], normalise.

    Attributes:
        size: height and width of the crop, pixels.
        crop_pct: the crop's share of the resized shorter side; the side is ``floor(size / crop_pct)`` as in timm.
        interpolation: a Pillow resampling filter, ``bicubic`` or ``bilinear``.
        mean: per-channel mean after scaling to [0, 1], RGB.
        std: per-channel standard deviation, RGB.
    """

    size: tuple[int, int]
    crop_pct: float = 0.9
    interpolation: str = "bicubic"
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD

    def to_json(self) -> dict[str, Any]:
        """Return the recipe as JSON values."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Preprocessing:
        """Rebuild a recipe from :meth:`to_json`."""
        height, width = data["size"]
        return cls((height, width), data["crop_pct"], data["interpolation"], _rgb(data["mean"]), _rgb(data["std"]))


def _rgb(values: Any) -> tuple[float, float, float]:
    red, green, blue = values
    return (red, green, blue)


@dataclass(frozen=True)
class Weights:
    """Where the weights came from, for the manifest.

    Attributes:
        source: ``random``, ``checkpoint``, ``pretrained``, or ``factory`` for those that a user's own function brings.
        seed: the seed of random weights, and the one that a factory was called under; else None.
        path: the checkpoint file as the user gave it, or ``repository@revision/file``; else empty.
        sha256: hash of the checkpoint file; of a factory's state dict, be it random or not; else empty.
        report: counts of loaded, renamed, recomputed and resampled keys.
        classes: how many classes the checkpoint's head has, where that is known.
        entry: which of the file's sets of weights was read; empty where it is the whole file.
        others: the file's other sets of weights.
        prefix: what stood before every name in the file and was stripped.
        drawn: how many of a factory's tensors, of how many, were drawn under the seed; None where none was.
    """

    source: str
    seed: int | None = None
    path: str = ""
    sha256: str = ""
    report: Mapping[str, int] = field(default_factory=dict)
    classes: int | None = None
    entry: str = ""
    others: tuple[str, ...] = ()
    prefix: str = ""
    drawn: tuple[int, int] | None = None

    @property
    def from_file(self) -> bool:
        """Whether a file holds them, which the eager model needs again."""
        return self.source in ("checkpoint", "pretrained")

    @property
    def averaged(self) -> bool:
        """Whether the entry's name says that it is an exponential moving average of the weights in training."""
        return "ema" in re.split(r"[^a-z]", self.entry.lower())

    def describe(self) -> str:
        """Return one readable line; names from the file are quoted, and escaped."""
        if self.source == "random":
            return f"random, seed {self.seed}"
        if self.source == "factory":
            drawn = f"; {self.drawn[0]} of {self.drawn[1]} tensors drawn under seed {self.seed}" if self.drawn else ""
            return f"of the factory (sha256 {self.sha256[:12]}){drawn}"
        facts = [f"{self.source} {self.path} (sha256 {self.sha256[:12]})"]
        if self.entry:
            facts.append(f"entry {self.entry!r}{', the EMA' if self.averaged else ''}")
        if self.prefix:
            facts.append(f"prefix {self.prefix!r} stripped")
        if self.classes is not None:
            facts.append(f"{self.classes} class{'' if self.classes == 1 else 'es'}")
        return ", ".join(facts)
