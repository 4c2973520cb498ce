"""What a user asks of `quantize` and `cast`: how, on which data, within which budget."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import onnx_ir as ir

from exporters.precision.methods import Method
from exporters.precision.policy import REDUCED_TYPES
from exporters.precision.roles import Stage
from exporters.samples import open_samples, random_samples
from models.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable
    from pathlib import Path

    from exporters.bundle import Bundle
    from exporters.samples import Samples

DEFAULT_SAMPLES = 512
"""Samples of a calibration; NVIDIA's Model Optimizer advises 500 or more for a ViT."""

SENSITIVE = frozenset(Stage)
DEFAULT_HIGH_PRECISION = frozenset({Stage.PATCH_EMBED, Stage.HEAD})


@dataclass(frozen=True)
class Typing:
    """How a graph is typed.

    Attributes:
        type: ``fp16`` or ``bf16``.
        allow: rules of the policy that are switched off.
        keep: regular expressions: operators whose names they find stay FP32.
        reduce_io: graph inputs and outputs have the reduced type too.
    """

    type: str = "fp16"
    allow: frozenset[str] = frozenset()
    keep: tuple[str, ...] = ()
    reduce_io: bool = False


@dataclass(frozen=True)
class Quantization:
    """How a graph is quantised.

    Attributes:
        scheme: one of `exporters.precision.placement.SCHEMES`.
        exclude: regular expressions: operators whose names they find stay in high precision.
        high_precision: stages of the network that stay in high precision.
        method: how a range follows from the data.
        float_weights: keep weights in FP32 with Q and DQ; otherwise store INT8 and DQ.
        around: what is not INT8 is of this type; None for FP32.
    """

    scheme: str = "gemm"
    exclude: tuple[str, ...] = ()
    high_precision: frozenset[Stage] = DEFAULT_HIGH_PRECISION
    method: Method = field(default_factory=lambda: Method.of("mse"))
    float_weights: bool = False
    around: Typing | None = field(default_factory=Typing)

    @property
    def scale_type(self) -> ir.DataType:
        """The type of what scales meet."""
        return ir.DataType.FLOAT if self.around is None else REDUCED_TYPES[self.around.type]


@dataclass(frozen=True)
class CalibrationData:
    """What ranges are measured on.

    Attributes:
        source: what `exporters.samples.open_samples` takes, or None.
        limit: at most so many samples.
        cache: ranges of an earlier calibration; with a source, they must have been measured on it.
        random: random numbers in place of data: the artifact is marked as not for release.
        seed: of the random numbers.
    """

    source: str | Path | Iterable[Any] | None = None
    limit: int | None = DEFAULT_SAMPLES
    cache: Path | None = None
    random: bool = False
    seed: int = 0

    def open(self, bundle: Bundle) -> Samples | None:
        """Return the samples, prepared for a bundle's model, or None where only a cache was given.

        Raises:
            UsageError: neither data nor cache, or data and random numbers, or data that cannot be used.
        """
        if self.random and (self.source is not None or self.cache is not None):
            raise UsageError("random calibration was asked for beside data", expected="one of the two")
        manifest = bundle.manifest
        if self.source is not None:
            return open_samples(self.source, manifest.spec.inputs, manifest.preprocessing, limit=self.limit)
        if self.random:
            return random_samples(manifest.spec.inputs, self.limit or DEFAULT_SAMPLES, self.seed)
        if self.cache is None:
            raise UsageError(
                "there is no data to calibrate with",
                expected="pictures such as the model will see, or the cache of an earlier calibration",
                hint="--calibrate DIR; or --allow-random-calibration, for an artifact that must not be released",
            )
        return None


@dataclass(frozen=True)
class AccuracyBudget:
    """What top-1 may be lost, and on which data that is measured.

    Attributes:
        max_drop: largest loss, as a share.
        source: labelled data; None for the calibration's.
        labels: of pictures, see `exporters.samples.open_samples`.
        limit: at most so many samples.
    """

    max_drop: float
    source: str | Path | Iterable[Any] | None = None
    labels: Path | Literal["folders"] | None = None
    limit: int | None = None

    def open(self, bundle: Bundle, calibration: CalibrationData) -> Samples:
        """Return the labelled samples, prepared for a bundle's model.

        Raises:
            UsageError: there are none.
        """
        source = calibration.source if self.source is None else self.source
        if source is None:
            raise UsageError("an accuracy budget needs labelled data", expected="--images DATA and --labels")
        manifest = bundle.manifest
        return open_samples(source, manifest.spec.inputs, manifest.preprocessing, limit=self.limit, labels=self.labels)


def stages(names: Collection[str]) -> frozenset[Stage]:
    """Read names of stages; ``sensitive`` is all of them, ``none`` none.

    Raises:
        UsageError: an unknown name.
    """
    if set(names) == {"none"}:
        return frozenset()
    known = {stage.value: frozenset({stage}) for stage in Stage} | {"sensitive": SENSITIVE}
    if unknown := sorted(set(names) - set(known)):
        raise UsageError(f"there is no stage {unknown[0]!r}", expected=", ".join([*known, "none"]))
    return frozenset[Stage]().union(*(known[name] for name in names))
