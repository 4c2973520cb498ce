"""What an engine is built with: shapes, limits, compatibility. Everything converts to JSON and back."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from deploycli.models.codec import Count
from deploycli.models.errors import InvalidValue, UsageError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from deploycli.models.spec import TensorSpec

HARDWARE_COMPATIBILITY = ("none", "ampere+", "same-compute-capability")
"""Names of ``tensorrt.HardwareCompatibilityLevel``, in words."""

DEFAULT_BATCH = (1, 8, 32)
"""Smallest, best and largest batch of an engine whose graph takes any."""

_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30}
_MOST_BYTES = 2**50


def shapes_text(*shapes: Sequence[int], between: str = " / ") -> str:
    """Return shapes as people write them: ``1x3x224x224 / 8x3x224x224``."""
    return between.join("x".join(map(str, shape)) for shape in shapes)


@dataclass(frozen=True)
class ShapeRange:
    """The shapes of one input that an engine takes, batch first.

    Attributes:
        min: smallest.
        opt: the one that TensorRT tunes for.
        max: largest.
    """

    min: tuple[Count, ...]
    opt: tuple[Count, ...]
    max: tuple[Count, ...]

    def __post_init__(self) -> None:
        """Refuse shapes that are no range."""
        shapes = (self.min, self.opt, self.max)
        ordered = all(0 < low <= opt <= high for low, opt, high in zip(*shapes, strict=False))
        if len({len(shape) for shape in shapes}) != 1 or not ordered:
            raise InvalidValue(
                f"the shapes {shapes_text(*shapes, between=', ')} are no range",
                expected="three shapes of one rank, each axis min <= opt <= max, all positive",
            )


@dataclass(frozen=True)
class BuildSettings:
    """How an engine is built. What is not here is TensorRT's default.

    Attributes:
        profile: input name -> shapes, the first optimization profile.
        workspace: bytes of scratch memory that a layer may take; None for all of the GPU.
        optimization_level: 0 to 5; None for TensorRT's default, 3.
        hardware_compatibility: one of `HARDWARE_COMPATIBILITY`.
        version_compatible: the plan also runs on later versions; it then carries a lean runtime.
        strip_weights: leave out the weights; they are refitted from the ONNX file.
        max_aux_streams: streams beside the main one; None for TensorRT's choice.
        timing_cache: folder of kernel timings, or None; see `deploycli.exporters.tensorrt.compilers.tensorrt`.
        error_on_timing_cache_miss: fail where the cache does not know a layer.
        tf32: let FP32 matrix products round to TF32.
        more_profiles: the others, each with kernels of its own.
    """

    profile: Mapping[str, ShapeRange]
    workspace: int | None = None
    optimization_level: int | None = None
    hardware_compatibility: str = "none"
    version_compatible: bool = False
    strip_weights: bool = False
    max_aux_streams: int | None = None
    timing_cache: str | None = None
    error_on_timing_cache_miss: bool = False
    tf32: bool = False
    more_profiles: tuple[Mapping[str, ShapeRange], ...] = ()

    def __post_init__(self) -> None:
        """Refuse what no builder takes."""
        level, streams = self.optimization_level, self.max_aux_streams
        if self.hardware_compatibility not in HARDWARE_COMPATIBILITY:
            raise InvalidValue(
                f"hardware compatibility {self.hardware_compatibility!r}", expected=", ".join(HARDWARE_COMPATIBILITY)
            )
        if level is not None and not 0 <= level <= 5:
            raise InvalidValue(f"builder optimization level {level}", expected="0 to 5")
        if streams is not None and streams < 0:
            raise InvalidValue(f"{streams} auxiliary streams", expected="0 or more")
        if self.error_on_timing_cache_miss and self.timing_cache is None:
            raise InvalidValue("an error on a timing cache miss was asked for", expected="--timing-cache DIR as well")
        if self.timing_cache is not None and level == 0:
            raise InvalidValue("builder optimization level 0 does not use a timing cache", expected="level 1 to 5")

    @property
    def profiles(self) -> tuple[Mapping[str, ShapeRange], ...]:
        """All optimization profiles."""
        return self.profile, *self.more_profiles

    @classmethod
    def default(cls, name: str) -> Any:
        """Return what a setting is where nobody says otherwise."""
        return cls.__dataclass_fields__[name].default

    def to_json(self) -> dict[str, Any]:
        """Return the settings as JSON values; enumerations by name, for their numbers differ between versions."""
        return asdict(self)


@dataclass(frozen=True)
class ShapeOptions:
    """The shapes that a user asks for.

    Attributes:
        batch: smallest, best and largest batch; None for `DEFAULT_BATCH`, or for the one that the graph has.
        more: further batches, each for a profile of its own.
    """

    batch: tuple[int, int, int] | None = None
    more: tuple[tuple[int, int, int], ...] = ()

    def __post_init__(self) -> None:
        """Refuse profiles that leave out a batch between them."""
        if not self.more:
            return
        ranges = sorted((low, high) for low, _, high in (*filter(None, (self.batch,)), *self.more))
        reached = ranges[0][1]
        for low, high in ranges[1:]:
            if low > reached + 1:
                gap = str(low - 1) if low == reached + 2 else f"{reached + 1} to {low - 1}"
                raise UsageError(
                    f"no profile takes batch {gap}",
                    expected="ranges of batches that meet, such as 1:1:1 and 2:8:32",
                )
            reached = max(reached, high)

    def profiles(self, inputs: Sequence[TensorSpec], fixed_batch: int | None) -> tuple[dict[str, ShapeRange], ...]:
        """Return all profiles of a model; see `profile`."""
        others = (ShapeOptions(batch).profile(inputs, fixed_batch) for batch in self.more)
        return self.profile(inputs, fixed_batch), *others

    def profile(self, inputs: Sequence[TensorSpec], fixed_batch: int | None) -> dict[str, ShapeRange]:
        """Return the first profile of a model.

        Args:
            inputs: the model's.
            fixed_batch: the batch that the graph was exported with, or None where it is symbolic.

        Raises:
            UsageError: a batch that the graph does not take.
        """
        batch = self.batch or (DEFAULT_BATCH if fixed_batch is None else (fixed_batch,) * 3)
        if fixed_batch is not None and (wrong := [size for size in batch if size != fixed_batch]):
            raise UsageError(
                f"the graph was exported with batch {fixed_batch}, and cannot have batch {wrong[0]}",
                expected=f"batch {fixed_batch}",
                hint="export the model with another --batch",
            )
        return {i.name: ShapeRange(*((size, *i.shape) for size in batch)) for i in inputs}


def parse_size(text: str) -> int:
    """Read ``4G``, ``512M`` or a number of bytes.

    Raises:
        UsageError: it is none.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([KMG]?)(?:i?B)?", text.strip(), re.IGNORECASE)
    size = 0.0 if found is None else float(found[1]) * _UNITS[found[2].upper()]
    if not 1 <= size <= _MOST_BYTES:
        raise UsageError(f"{text[:40]!r} is no size", expected="a number of bytes, such as 4G or 512M, at most 2^50")
    return int(size)
