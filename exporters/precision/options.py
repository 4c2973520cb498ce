"""What a user asks of `quantize` and `cast`: how, on which data, within which budget."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import onnx_ir as ir

from deploycli.exporters.bundle.golden import load_golden
from deploycli.exporters.data.samples import open_samples, random_samples
from deploycli.exporters.precision.number_format import NumberFormat, format_of
from deploycli.exporters.precision.placement import AUTO, DEFAULT_HIGH_PRECISION
from deploycli.exporters.precision.policy import REDUCED_TYPES
from deploycli.exporters.precision.roles import Stage
from deploycli.exporters.verification.on_samples import class_output, dense
from deploycli.models.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping
    from pathlib import Path

    import numpy.typing as npt

    from deploycli.exporters.bundle.bundle import Bundle
    from deploycli.exporters.data.samples import Samples
    from deploycli.exporters.precision.methods import Method
    from deploycli.exporters.target.targets import Capability
    from deploycli.models.spec import ModelSpec

DEFAULT_SAMPLES = 512
"""Samples of a calibration; NVIDIA's Model Optimizer advises 500 or more for a ViT."""

SENSITIVE = frozenset(Stage)

PROXY_SAMPLES = 32
"""Labelled samples on which an accuracy budget ranks what it may revert."""


@dataclass(frozen=True)
class CastOptions:
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
class QuantizeOptions:
    """How a graph is quantised.

    Attributes:
        precision: ``int8`` or ``fp8``.
        targets: compute capabilities that the scheme `AUTO` chooses for; none for all that compute in the precision.
        scheme: one of `deploycli.exporters.precision.placement.SCHEMES`.
        exclude: regular expressions: operators whose names they find stay in high precision.
        high_precision: stages of the network that stay in high precision.
        method: how a range follows from the data; None takes that of a cache, or else what suits the format and the
            scheme.
        float_weights: keep weights in FP32 with Q and DQ; otherwise store 8 bits and DQ.
        around: what is not quantised is of this type; None for FP32.
    """

    precision: str = "int8"
    targets: tuple[Capability, ...] = ()
    scheme: str = AUTO
    exclude: tuple[str, ...] = ()
    high_precision: frozenset[Stage] = DEFAULT_HIGH_PRECISION
    method: Method | None = None
    float_weights: bool = False
    around: CastOptions | None = field(default_factory=CastOptions)

    @property
    def number_format(self) -> NumberFormat:
        """What is quantised to."""
        return format_of(self.precision)

    @property
    def scale_type(self) -> ir.DataType:
        """The type of what scales meet."""
        return ir.DataType.FLOAT if self.around is None else REDUCED_TYPES[self.around.type]


@dataclass(frozen=True)
class CalibrationData:
    """What ranges are measured on.

    Attributes:
        source: what `deploycli.exporters.data.samples.open_samples` takes, or None.
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
class Labelled:
    """Labelled data, and what of a model it judges.

    Attributes:
        samples: all of it.
        few: some of it, evenly spread over the classes.
        output: name of the logits, [B, classes].
        classes: how many.
        spec: of the model.
    """

    samples: Samples
    few: Samples
    output: str
    classes: int
    spec: ModelSpec

    def logits(self, outputs: Mapping[str, npt.NDArray[Any]]) -> npt.NDArray[Any]:
        """Return what names the class, [B, classes], of what the model answered."""
        return dense(self.spec, outputs)[self.output]


@dataclass(frozen=True)
class AccuracyBudget:
    """What top-1 may be lost, and on which data that is measured.

    Attributes:
        max_drop: largest loss, as a share.
        source: labelled data; None for the calibration's.
        labels: of pictures, see `deploycli.exporters.data.samples.open_samples`.
        limit: at most so many samples.
    """

    max_drop: float
    source: str | Path | Iterable[Any] | None = None
    labels: Path | Literal["folders"] | None = None
    limit: int | None = None

    def open(self, bundle: Bundle, calibration: CalibrationData) -> Labelled:
        """Return the labelled samples, prepared for a bundle's model.

        Raises:
            UsageError: there are none, or the model names no class.
        """
        needed = "an accuracy budget needs labelled data"
        source = calibration.source if self.source is None else self.source
        if source is None:
            raise UsageError(needed, expected="--images DATA, with --labels where it is pictures")
        logits = class_output(dense(bundle.manifest.spec, load_golden(bundle.golden)[1]))
        if logits is None:
            raise UsageError(
                "an accuracy budget needs a model that names classes",
                expected="an output [batch, classes]",
                hint="leave --max-drop away",
            )
        manifest = bundle.manifest

        def samples(limit: int | None) -> Samples:
            return open_samples(
                source, manifest.spec.inputs, manifest.preprocessing,
                limit=limit, labels=self.labels, classes=logits.classes,
            )  # fmt: skip

        everything = samples(self.limit)
        if next(iter(everything.batches(1))).labels is None:  # said at once, and not after the calibration
            raise UsageError(
                f"{needed}: {everything.description} has none", expected="labels", hint="--labels folders, or FILE.csv"
            )
        few = samples(min(PROXY_SAMPLES, self.limit or PROXY_SAMPLES))
        return Labelled(everything, few, logits.name, logits.classes, manifest.spec)


def stages(names: Collection[str]) -> frozenset[Stage]:
    """Read names of stages; ``sensitive`` is all of them, and ``none``, alone, none.

    Raises:
        UsageError: an unknown name, or no name.
    """
    if set(names) == {"none"}:
        return frozenset()
    known = {stage.value: frozenset({stage}) for stage in Stage} | {"sensitive": SENSITIVE}
    unknown = sorted(set(names) - set(known)) or ([] if names else [""])
    if unknown:
        raise UsageError(f"no stage is called {unknown[0]!r}", expected=f"{', '.join(known)}; or none, alone")
    return frozenset[Stage]().union(*(known[name] for name in names))
