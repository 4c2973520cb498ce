"""The data that describes a model: what determines its graph, and how its images are prepared.

Everything here is frozen, converts to JSON and back, and imports nothing heavy.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Annotated, Any, Generic, Literal, TypeVar

from msgspec import Meta

from deploycli.models.codec import Positive, SomeSha256
from deploycli.models.errors import InvalidValue, UsageError

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

LARGEST_SAMPLE = 2**31
"""Elements of one sample of an input: TensorRT, too, counts those of a tensor in 31 bits."""

ElementType = Annotated[str, Meta(pattern=r"^(bool|bfloat16|float(16|32|64)|u?int(8|16|32|64))\Z")]
"""NumPy's name of an element type."""


WeightsSource = Annotated[str, Meta(pattern=r"^(random|checkpoint|pretrained|factory|onnx)\Z")]

Hides = Literal["", "finite", "infinite", "high", "low"]


@dataclass(frozen=True)
class TensorSpec:
    """One graph input.

    Attributes:
        name: its name.
        shape: its shape without the batch axis.
        dtype: its element type.
        values: the lowest and the highest integer that it takes, such as the rows of an embedding; None: see
            `deploycli.exporters.bundle.golden`.
        hides: how a mask hides all of a sample and the model still answers with numbers: ``finite``, by its lowest
            values, or ``infinite``, by -inf; ``high`` or ``low`` where the model answers NaN to its highest or its
            lowest values alone, so that none of its rows may be hidden; empty where it is no mask.
    """

    name: str
    shape: tuple[Positive, ...]
    dtype: ElementType = "float32"
    values: tuple[int, int] | None = None
    hides: Hides = ""

    def __post_init__(self) -> None:
        """Refuse what no memory holds, and values that are no integers of the type."""
        if self.values is not None:
            kind, bits = re.fullmatch(r"(u?int|.*?)(\d*)", self.dtype).groups()  # type: ignore[union-attr]
            low, high = self.values
            least = {"int": -(2 ** (int(bits or 0) - 1)), "uint": 0}.get(kind)
            if least is None or not least <= low <= high < least + 2 ** int(bits):
                raise InvalidValue(
                    f"the input {self.name} has values from {low} to {high}",
                    expected=f"integers of the type {self.dtype}" if least is not None else "values of integers only",
                )
        if math.prod(self.shape) > LARGEST_SAMPLE:
            raise InvalidValue(
                f"a sample of the input {self.name} has {'x'.join(map(str, self.shape))} elements",
                expected=f"at most {LARGEST_SAMPLE}",
            )


Size = TypeVar("Size", bound="int | str | None", covariant=True)


@dataclass(frozen=True)
class TensorInfo(Generic[Size]):
    """An input or an output of a model file.

    Attributes:
        name: its name.
        dtype: NumPy's name of the element type.
        shape: sizes, the batch axis included; what stands for one that is not fixed is said where it was read.
    """

    name: str
    dtype: str
    shape: tuple[Size, ...]


def numpy_name(element_type: str) -> str:
    """Return NumPy's name of an element type, which ONNX and TensorRT call ``FLOAT``, and ONNX Runtime ``float``.

    TensorRT also has ``HALF`` and ``BF16``. What NumPy does not have keeps its name, in small letters.
    """
    name = element_type.lower()
    return {"float": "float32", "double": "float64", "half": "float16", "bf16": "bfloat16"}.get(name, name)


Layout = Literal["nchw", "nhwc"]


@dataclass(frozen=True)
class PixelInput:
    """The graph takes decoded pictures, and its first operators do the rest: to floating point, to [B, C, H, W],
    normalised.

    Attributes:
        layout: ``nhwc``, as decoders give them, [B, H, W, 3], or ``nchw``.
        mean: per-channel mean after scaling to [0, 1], RGB.
        std: per-channel standard deviation, RGB.
    """

    layout: Layout
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


@dataclass(frozen=True)
class Ending:
    """The graph ends in what a user reads of logits, [B, classes].

    Attributes:
        kind: ``softmax``, which gives probabilities [B, classes]; or ``topk``, which gives the largest of them, best
            first, as ``scores`` [B, k] and ``classes`` [B, k].
        output: which of the model's outputs are the logits.
        classes: how many there are.
        k: of ``topk``; else 0.
    """

    kind: Literal["softmax", "topk"]
    output: str
    classes: Positive
    k: Annotated[int, Meta(ge=0)] = 0

    @property
    def outputs(self) -> tuple[str, ...]:
        """What stands in the place of the logits."""
        return TOP_OUTPUTS if self.kind == "topk" else ("probabilities",)


TOP_OUTPUTS = ("scores", "classes")


@dataclass(frozen=True)
class ModelSpec:
    """What determines the graph, weights aside.

    Attributes:
        name: the registered short name, such as ``swin_t``.
        family: the module under ``models`` that builds it, such as ``swin``.
        config: keyword arguments of the family's constructor; JSON values only.
        inputs: graph inputs in order.
        outputs: names of the graph outputs in order.
        pixels: what the graph does with decoded pictures; None where it takes prepared ones.
        ending: what it makes of logits; None where it gives them.
        strides: pixels between two columns of each output, where these are feature maps [B, C, H, W]; else none.
    """

    name: str
    family: str
    config: Mapping[str, Any]
    inputs: Annotated[tuple[TensorSpec, ...], Meta(min_length=1)]
    outputs: Annotated[tuple[str, ...], Meta(min_length=1)] = ("logits",)
    pixels: PixelInput | None = None
    ending: Ending | None = None
    strides: tuple[Positive, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Return the spec as JSON values."""
        return asdict(self)


INTERPOLATIONS = ("bicubic", "bilinear", "box", "hamming", "lanczos", "nearest")
"""Pillow's resampling filters."""

Interpolation = Annotated[str, Meta(pattern=rf"^({'|'.join(INTERPOLATIONS)})\Z")]
Side = Annotated[int, Meta(ge=1, le=2**16)]
Scale = Annotated[float, Meta(gt=0)]


@dataclass(frozen=True)
class Preprocessing:
    """How a picture becomes a model input: resize the shorter side, crop the centre, scale to [0, 1], normalise.

    Attributes:
        size: height and width of the crop, pixels.
        crop_pct: the crop's share of the resized shorter side; the side is ``floor(size / crop_pct)`` as in timm.
        interpolation: a Pillow resampling filter, one of `INTERPOLATIONS`.
        mean: per-channel mean after scaling to [0, 1], RGB.
        std: per-channel standard deviation, RGB.
        pixels: the graph itself scales and normalises: a picture stays uint8 after the crop, in this layout.
    """

    size: tuple[Side, Side]
    crop_pct: Annotated[float, Meta(gt=0, le=100)] = 0.9
    interpolation: Interpolation = "bicubic"
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[Scale, Scale, Scale] = IMAGENET_STD
    pixels: Layout | None = None

    def to_json(self) -> dict[str, Any]:
        """Return the recipe as JSON values."""
        return asdict(self)


@dataclass(frozen=True)
class PreprocessingChange:
    """What a user says of how pictures become inputs; None leaves a thing as it is known.

    Attributes:
        crop_pct: see `Preprocessing`.
        resize: pixels of the shorter side before the crop, in place of ``crop_pct``.
        interpolation: see `Preprocessing`.
        mean: see `Preprocessing`.
        std: see `Preprocessing`.
    """

    crop_pct: float | None = None
    resize: int | None = None
    interpolation: str | None = None
    mean: tuple[float, float, float] | None = None
    std: tuple[float, float, float] | None = None

    def applied(self, known: Preprocessing | None, inputs: Sequence[TensorSpec]) -> Preprocessing | None:
        """Return the recipe that is recorded.

        Args:
            known: what the model's library says; None where it says nothing. Then mean and std are both needed; without
                more the shorter side is resized to the crop's, bicubic.
            inputs: of the model.

        Raises:
            UsageError: it is no recipe for these inputs, or half of one.
        """
        if self == PreprocessingChange():
            return known
        if len(inputs) != 1 or len(inputs[0].shape) != 3 or inputs[0].shape[0] != 3:
            shown = "; ".join(f"{spec.name} [batch, {', '.join(map(str, spec.shape))}]" for spec in inputs)
            raise UsageError(
                f"--mean, --std, --crop, --resize and --interpolation are of pictures; the inputs are {shown}",
                expected="one input, [batch, 3, height, width]",
            )
        if self.crop_pct is not None and self.resize is not None:
            raise UsageError("both --crop and --resize were given", expected="one of the two")
        mean, std = (getattr(self, name) or getattr(known, name, None) for name in ("mean", "std"))
        if mean is None or std is None:
            raise UsageError(
                "how this model wants its pictures is not known, and half of it was given",
                expected="--mean R,G,B and --std R,G,B, of values from 0 to 1",
                hint="--mean 0.485,0.456,0.406 --std 0.229,0.224,0.225, where it is ImageNet's",
            )
        _, height, width = inputs[0].shape
        recipe = known or Preprocessing((height, width), crop_pct=1.0)
        crop = height / self.resize if self.resize is not None else self.crop_pct
        return replace(
            recipe,
            crop_pct=recipe.crop_pct if crop is None else crop,
            interpolation=self.interpolation or recipe.interpolation,
            mean=mean,
            std=std,
        )


@dataclass(frozen=True)
class Weights:
    """Where the weights came from, for the manifest.

    Attributes:
        source: ``random``, ``checkpoint``, ``pretrained``, ``factory`` for those that a user's own function brings, or
            ``onnx`` for those of an ONNX file that was imported.
        seed: the seed of random weights, and the one that a factory was called under; else None.
        path: the checkpoint or the ONNX file as the user gave it, or ``repository@revision/file``; else empty.
        sha256: hash of that file; of a factory's state dict, be it random or not; else empty.
        report: counts of loaded, renamed, recomputed and resampled keys.
        classes: how many classes the checkpoint's head has, where that is known.
        entry: which of the file's sets of weights was read; empty where it is the whole file.
        others: the file's other sets of weights.
        prefix: what stood before every name in the file and was stripped.
        drawn: how many of a factory's tensors differ from seed to seed.
    """

    source: WeightsSource
    seed: int | None = None
    path: str = ""
    sha256: SomeSha256 = ""
    report: Mapping[str, int] = field(default_factory=dict)
    classes: int | None = None
    entry: str = ""
    others: tuple[str, ...] = ()
    prefix: str = ""
    drawn: int = 0

    @property
    def from_file(self) -> bool:
        """Whether a file holds them, which the eager model needs again."""
        return self.source in ("checkpoint", "pretrained")

    @property
    def kind(self) -> str:
        """What they are, in words."""
        kinds = {"random": "random weights", "factory": "weights of the factory", "onnx": "an imported ONNX file"}
        return kinds.get(self.source, "weights from a file")

    @property
    def averaged(self) -> bool:
        """Whether the entry's name says that it is an exponential moving average of the weights in training."""
        return "ema" in re.split(r"[^a-z]", self.entry.lower())

    def describe(self) -> str:
        """Return one readable line; names from the file are quoted, and escaped."""
        if self.source == "random":
            return f"random, seed {self.seed}"
        if self.source == "factory":
            tensors = f"{self.drawn} tensor{'' if self.drawn == 1 else 's'}"
            drawn = f", {tensors} drawn under seed {self.seed}" if self.drawn else ""
            return f"{self.kind} (sha256 {self.sha256[:12]}){drawn}"
        facts = [f"{self.source} {self.path} (sha256 {self.sha256[:12]})"]
        if self.entry:
            facts.append(f"entry {self.entry!r}{', the EMA' if self.averaged else ''}")
        if self.prefix:
            facts.append(f"prefix {self.prefix!r} stripped")
        if self.classes is not None:
            facts.append(f"{self.classes} class{'' if self.classes == 1 else 'es'}")
        return ", ".join(facts)


# --- Which inputs of a model are masks

_NAMES = re.compile(r"mask|keep|pad|valid|visible|hide", re.IGNORECASE)


def is_mask(spec: TensorSpec) -> bool:
    """Say whether an input is one that hides parts of another: it is boolean, or named so."""
    return spec.dtype == "bool" or bool(_NAMES.search(spec.name))
