"""JSON that is read back, such as a manifest or a sidecar: strict, typed by the dataclass it was written from.

A file comes from anywhere, so nothing of it is used before all of it has the types, the limits and the layout that the
dataclass declares; what does not is one error that names the field, such as ``$.artifacts[0].file.sha256``. Limits
stand in the annotations (`msgspec.Meta`) and in ``__post_init__``, which raises `deploycli.models.errors.InvalidValue`.
"""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import msgspec
from msgspec import Meta

from deploycli.models.errors import DeployError, IntegrityError, UsageError, first_line

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

Count = Annotated[int, Meta(ge=0, le=2**63 - 1)]
Positive = Annotated[int, Meta(ge=1, le=2**63 - 1)]
Sha256 = Annotated[str, Meta(pattern=r"^[0-9a-f]{64}\Z")]
SomeSha256 = Annotated[str, Meta(pattern=r"^([0-9a-f]{64})?\Z")]
"""A hash, or an empty string where there is nothing to hash."""

LARGEST_FILE = 1 << 28
"""A manifest with every name of a million pictures is smaller, bytes."""

DEEPEST = 64
"""Levels of lists and objects. What people configure has a few."""

T = TypeVar("T")


def load(
    path: Path, kind: type[T], *, what: str, hint: str = "", version: int | None = None, partial: bool = False
) -> T:
    """Read a JSON file.

    Args:
        path: the file.
        kind: the dataclass that it holds.
        what: what the file should be, such as ``a manifest``.
        hint: what to do where it is not.
        version: the schema version that is read, from the key ``schema_version``; None where the file has none.
        partial: the file holds more than the dataclass wants to know.

    Raises:
        OSError: it cannot be read.
        UsageError: it has another schema version.
        IntegrityError: see `decode`.
    """
    with path.open("rb") as stream:
        data = stream.read(LARGEST_FILE + 1)
    return decode(data, kind, where=str(path), what=what, hint=hint, version=version, partial=partial)


def decode(
    data: bytes | str,
    kind: type[T],
    *,
    where: str,
    what: str,
    hint: str = "",
    version: int | None = None,
    partial: bool = False,
) -> T:
    """Read JSON; for the arguments see `load`.

    Raises:
        UsageError: it has another schema version.
        IntegrityError: it is no JSON, or a field is missing, unknown, repeated, or of a value that it cannot have.
    """
    if version is not None:
        what = f"{what} of schema version {version}"
    try:
        values = _parse(data)
        if version is not None and _schema_version(values) != version:
            raise UsageError(
                f"{where} has schema version {values['schema_version']}",
                expected=what,
                hint=f"{hint}; or use the deploycli that wrote it",
            )
        if version is not None and "schema_version" not in kind.__annotations__:
            del values["schema_version"]
        decoded = msgspec.convert(values, kind)
        _refuse_unknown(values, msgspec.to_builtins(decoded), partial=partial)
    except msgspec.ValidationError as error:
        text, _, field = str(error).rpartition(" - at ")
        cause = error.__cause__
        reason = text or str(error)
        reason = reason[:1].lower() + reason[1:]
        if isinstance(cause, DeployError):
            reason = "; expected ".join(filter(None, (cause.found, cause.expected)))
        raise _malformed(where, field.strip("`") if text else "$", reason, what, hint) from error
    except _FieldError as error:
        raise _malformed(where, error.field, error.reason, what, hint) from error
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError and JSONDecodeError are ValueErrors
        raise IntegrityError(f"{where} is no JSON: {first_line(error)}", expected=what, hint=hint) from error
    return decoded


class _FieldError(Exception):
    def __init__(self, field: str, reason: str) -> None:
        super().__init__(field, reason)
        self.field = field
        self.reason = reason


class _Repeated(dict[str, Any]):
    """An object in which a key stands twice: which of its values counts depends on the reader."""

    key = ""


def _malformed(where: str, field: str, reason: str, what: str, hint: str) -> IntegrityError:
    return IntegrityError(f"{where} is malformed at {field}: {reason}", expected=what, hint=hint)


def _parse(data: bytes | str) -> Any:
    if len(data) > LARGEST_FILE:
        raise ValueError(f"it is larger than {LARGEST_FILE >> 20} MiB")
    text = data if isinstance(data, str) else data.decode("utf-8")
    values = json.loads(text, object_pairs_hook=_object, parse_constant=_no_number)
    for field, value, depth in _walk(values):
        if isinstance(value, _Repeated):
            raise _FieldError(f"{field}.{value.key}", "the key stands there twice")
        if depth > DEEPEST:
            raise _FieldError(field[:80], f"it is nested in more than {DEEPEST} others")
        if isinstance(value, float) and not math.isfinite(value):
            raise _FieldError(field, "the number is too large")
        if isinstance(value, int) and not -(2**63) <= value < 2**64:
            raise _FieldError(field, "the number takes more than 64 bits")
    return values


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) == len(pairs):
        return values
    repeated = _Repeated(values)
    seen: set[str] = set()
    repeated.key = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
    return repeated


def _no_number(text: str) -> float:
    raise ValueError(f"{text} is no number")


def _walk(values: Any) -> Iterator[tuple[str, Any, int]]:
    """Yield every value with its path and its depth; no recursion, for it may be as deep as the parser goes."""
    pending: list[tuple[str, Any, int]] = [("$", values, 0)]
    while pending:
        field, value, depth = item = pending.pop()
        yield item
        if isinstance(value, dict):
            pending += [(f"{field}.{key}", inner, depth + 1) for key, inner in value.items()]
        elif isinstance(value, list):
            pending += [(f"{field}[{index}]", inner, depth + 1) for index, inner in enumerate(value)]


def _schema_version(values: Any) -> int:
    if not isinstance(values, dict):
        raise _FieldError("$", "it is no object")
    if "schema_version" not in values:
        raise _FieldError("$", "it has no `schema_version`")
    version = values["schema_version"]
    if type(version) is not int:
        raise _FieldError("$.schema_version", "it is no integer")
    return version


def _refuse_unknown(values: Any, known: Any, *, partial: bool) -> None:
    """Raise where a field is not the dataclass's: written back, it would be lost, and it may have meant something."""
    pending = [("$", values, known)]
    while pending:
        field, given, kept = pending.pop()
        if isinstance(given, dict):
            for key, inner in given.items():
                if key in kept:
                    pending.append((f"{field}.{key}", inner, kept[key]))
                elif not (partial and field == "$"):
                    raise _FieldError(f"{field}.{key}", "no such field is known to this version")
        elif isinstance(given, list):
            pending += [(f"{field}[{i}]", *pair) for i, pair in enumerate(zip(given, kept, strict=True))]
