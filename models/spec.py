"""The data that describes a model: what determines its graph, and how its images are prepared.

Everything here is frozen, converts to JSON and back, and imports nothing heavy.
"""

from __future__ import annotations

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
        source: ``random``, ``checkpoint`` or ``pretrained``.
        seed: the seed of random weights, else None.
        path: the checkpoint file as the user gave it, or ``repository@revision/file``; empty for random weights.
        sha256: hash of the checkpoint file; empty for random weights.
        report: counts of loaded, renamed, recomputed and resampled keys.
    """

    source: str
    seed: int | None = None
    path: str = ""
    sha256: str = ""
    report: Mapping[str, int] = field(default_factory=dict)

    def describe(self) -> str:
        """Return one readable line."""
        if self.source == "random":
            return f"random, seed {self.seed}"
        return f"{self.source} {self.path} (sha256 {self.sha256[:12]})"
