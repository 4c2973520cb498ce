"""The ranges of a calibration as a JSON file, bound to what they were measured on."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated, Any

from msgspec import Meta

from deploycli.exporters.bundle.files import write_whole
from deploycli.exporters.graph.unique import listed
from deploycli.exporters.precision.methods import Method
from deploycli.exporters.precision.ranges import MOST_NAMES, check_ranges
from deploycli.models.codec import Positive, Sha256, load
from deploycli.models.errors import EnvironmentUnsuitable, IntegrityError, UsageError

if TYPE_CHECKING:
    from pathlib import Path

    from deploycli.exporters.data.samples import Samples
    from deploycli.exporters.precision.calibrate import Calibration

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
    count: Positive
    sha256: Sha256
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

    model: Sha256
    data: DataRecord
    preprocessing: Mapping[str, Any] | None
    method: Method
    random: bool
    tool_version: str
    ranges: Annotated[Mapping[str, float], Meta(min_length=1)]

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
            EnvironmentUnsuitable: it cannot be read.
            NumericsError: a degenerate range, see `check_ranges`.
        """
        if not path.is_file():
            raise UsageError(f"there is no calibration {path}", expected="a file that a calibration wrote")
        try:
            cache = load(path, cls, what="a calibration", hint=_CALIBRATE_AGAIN, version=SCHEMA_VERSION)
        except OSError as error:
            raise EnvironmentUnsuitable(f"cannot read {path}: {error.strerror or error}") from error
        check_ranges(cache.ranges)
        return cache

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
                f"the calibration has no range of {listed(missing, MOST_NAMES)}",
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
