"""The ranges of a calibration as a JSON file, bound to what they were measured on."""

from __future__ import annotations

import json
import math
import re
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from exporters.precision.methods import Method
from exporters.precision.ranges import check_ranges, listed
from exporters.precision.whole_file import write_whole
from models.errors import IntegrityError, UsageError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path

    from exporters.precision.calibrate import Calibration
    from exporters.samples import Samples

SCHEMA_VERSION = 1
_CALIBRATE_AGAIN = "calibrate again, or restore the file from where it was copied"


@dataclass(frozen=True)
class DataRecord:
    """The data of a calibration.

    Attributes:
        description: where it came from, for people.
        count: samples that were used.
        sha256: hash of the samples, ``Samples.sha256``.
        skipped: names of the samples that could not be read.
        samples: names of all samples, those included, in order.
    """

    description: str
    count: int
    sha256: str
    skipped: tuple[str, ...]
    samples: tuple[str, ...] = ()


@dataclass(frozen=True)
class CalibrationCache:
    """Ranges of the tensors of one model, and what they depend on.

    Attributes:
        model: sha256 of the FP32 model, `model_sha256`.
        data: what it ran on.
        preprocessing: the recipe as JSON values, or None where the data are model inputs already.
        method: how the ranges were chosen.
        random: made from random data; it stays with the ranges for ever.
        tool_version: version of the tool that measured.
        ranges: tensor -> amax; the INT8 scale is ``amax / 127``.
    """

    model: str
    data: DataRecord
    preprocessing: Mapping[str, Any] | None
    method: Method
    random: bool
    tool_version: str
    ranges: Mapping[str, float]

    @classmethod
    def of(
        cls,
        calibration: Calibration,
        samples: Samples,
        *,
        model: str,
        preprocessing: Mapping[str, Any] | None,
        tool_version: str,
    ) -> CalibrationCache:
        """Bind the ranges of a calibration to what they were measured on."""
        data = DataRecord(
            samples.description, calibration.count, samples.sha256, calibration.skipped, tuple(samples.names)
        )
        return cls(
            model,
            data,
            _as_json(preprocessing),
            calibration.method,
            samples.random,
            tool_version,
            dict(sorted(calibration.ranges.items())),
        )

    def to_json(self) -> dict[str, Any]:
        """Return the cache as JSON values, the ranges sorted by name."""
        return {
            "schema_version": SCHEMA_VERSION,
            "tool_version": self.tool_version,
            "model": self.model,
            "data": asdict(self.data),
            "preprocessing": self.preprocessing,
            "method": self.method.to_json(),
            "random": self.random,
            "ranges": dict(sorted(self.ranges.items())),
        }

    def save(self, path: Path) -> None:
        """Write the JSON file whole or not at all; every float reads back as the same.

        Raises:
            EnvironmentUnsuitable: it cannot be written.
        """
        write_whole(path, (json.dumps(self.to_json(), indent=2, allow_nan=False) + "\n").encode())

    @classmethod
    def load(cls, path: Path) -> CalibrationCache:
        """Read a file that `save` wrote.

        Raises:
            UsageError: there is no such file, or its schema version is unknown.
            IntegrityError: it is malformed.
            NumericsError: a degenerate range, see `check_ranges`.
        """
        if not path.is_file():
            raise UsageError(f"there is no calibration {path}", expected="a file that a calibration wrote")
        try:
            data = json.loads(path.read_text("utf-8"))
        except (ValueError, RecursionError) as error:  # UnicodeDecodeError and JSONDecodeError are ValueErrors
            raise IntegrityError(
                f"{path} is not JSON: {error}", expected="a calibration", hint=_CALIBRATE_AGAIN
            ) from error
        return cls.from_json(data, str(path))

    @classmethod
    def from_json(cls, data: Any, where: str = "the calibration") -> CalibrationCache:
        """Rebuild a cache from :meth:`to_json`.

        Args:
            data: parsed JSON.
            where: what messages call it.

        Raises:
            UsageError, IntegrityError, NumericsError: see `load`.
        """
        version = data.get("schema_version") if isinstance(data, dict) else None
        if type(version) is int and version != SCHEMA_VERSION:
            raise UsageError(
                f"{where} has schema version {version}",
                expected=f"schema version {SCHEMA_VERSION}",
                hint="calibrate again, or use the version of this tool that wrote it",
            )
        try:
            cache = cls._parsed(data)
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError, UsageError) as error:
            why = error.found if isinstance(error, UsageError) else f"{type(error).__name__}: {error}"
            raise IntegrityError(
                f"{where} is malformed ({why})",
                expected=f"a calibration of schema version {SCHEMA_VERSION}",
                hint=_CALIBRATE_AGAIN,
            ) from error
        check_ranges(cache.ranges)
        return cache

    @classmethod
    def _parsed(cls, data: Any) -> CalibrationCache:
        if type(data["schema_version"]) is not int:
            raise ValueError("no schema version")
        record = data["data"]
        return cls(
            _sha256(data["model"]),
            DataRecord(
                _typed(str, record["description"]),
                _count(record["count"]),
                _sha256(record["sha256"]),
                tuple(_typed(str, name) for name in _typed(list, record["skipped"])),
                tuple(_typed(str, name) for name in _typed(list, record["samples"])),
            ),
            None if data["preprocessing"] is None else _typed(dict, data["preprocessing"]),
            Method.from_json(data["method"]),
            _typed(bool, data["random"]),
            _typed(str, data["tool_version"]),
            _ranges(data["ranges"]),
        )

    def check(
        self,
        *,
        model: str,
        preprocessing: Mapping[str, Any] | None,
        method: Method | None = None,
        data: str | None = None,
        tensors: Iterable[str] = (),
    ) -> None:
        """Compare the cache with what the ranges are wanted for.

        Args:
            model: sha256 of the model.
            preprocessing: the recipe as JSON values.
            method: the method asked for; None takes the cache's.
            data: sha256 of the samples; None where there are none to compare.
            tensors: what ranges are needed of.

        Raises:
            IntegrityError: one differs, or a range is missing; the message says which, found and expected.
        """
        self._compare("model", self.model, model)
        self._compare("preprocessing", _shown(self.preprocessing), _shown(preprocessing))
        if method is not None:
            self._compare("method", _shown(self.method.to_json()), _shown(method.to_json()))
        if data is not None:
            self._compare("data", self.data.sha256, data)
        if missing := [name for name in tensors if name not in self.ranges]:
            raise IntegrityError(
                f"the calibration has no range of {listed(missing)}",
                expected="a range of every tensor that becomes INT8",
                hint=_CALIBRATE_AGAIN,
            )

    def _compare(self, field: str, found: str, expected: str) -> None:
        if found != expected:
            raise IntegrityError(
                f"the calibration was made with another {field}: {found}", expected=expected, hint="calibrate again"
            )


def _as_json(value: Any) -> Any:
    """Return the value as it would be read back."""
    return json.loads(json.dumps(value))


def _shown(value: Any) -> str:
    return json.dumps(value, sort_keys=True)


def _typed(kind: type[Any], value: Any) -> Any:
    if type(value) is not kind:
        raise TypeError(f"{value!r} is no {kind.__name__}")
    return value


def _sha256(value: Any) -> str:
    if not re.fullmatch(r"[0-9a-f]{64}", value):
        raise ValueError(f"{value!r} is no sha256")
    return str(value)


def _count(value: Any) -> int:
    if type(value) is not int or value < 1:
        raise ValueError(f"{value!r} is no number of samples")
    return value


def _ranges(values: Any) -> dict[str, float]:
    """Return the ranges as floats; what is a number but no range is not judged here."""
    if not values:
        raise ValueError("no ranges")
    if wrong := [name for name, value in values.items() if type(value) not in (int, float) or math.isnan(value)]:
        raise ValueError(f"no number for {', '.join(wrong)}")
    return {name: float(value) for name, value in values.items()}
