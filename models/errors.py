"""Errors that a user can act on: one message, one documented exit code, no traceback.

They live in the lowest package because every layer above raises them and only the command line renders them.
"""

from functools import partial
from typing import Any, ClassVar


class DeployError(Exception):
    """A failure with a remedy.

    Args:
        found: what was found, as a full sentence or clause.
        expected: what was expected instead.
        hint: what to try next.
    """

    exit_code: ClassVar[int] = 1

    def __init__(self, found: str, *, expected: str = "", hint: str = "") -> None:
        super().__init__(found, expected, hint)
        self.found = found
        self.expected = expected
        self.hint = hint

    def __reduce__(self) -> tuple[Any, ...]:  # by default, keywords would be given by position
        return partial(type(self), expected=self.expected, hint=self.hint), (self.found,)

    def __str__(self) -> str:
        parts = [self.found]
        if self.expected:
            parts.append(f"expected: {self.expected}")
        if self.hint:
            parts.append(f"try: {self.hint}")
        return "\n  ".join(parts)


class UsageError(DeployError):
    """An argument, a name or an input file cannot be used."""

    exit_code = 2


class InvalidValue(UsageError, ValueError):  # noqa: N818 - of a field; where it stands, its reader says
    """A value that its field cannot have: the user's, unless `deploycli.models.codec` read it from a file."""


class ExportError(DeployError):
    """The model could not be traced or rewritten, or the rewritten graph disagrees with the traced one."""

    exit_code = 3


class BuildError(DeployError):
    """The engine builder refused or crashed."""

    exit_code = 4


class NumericsError(DeployError):
    """Outputs are outside their budget."""

    exit_code = 5


class RequirementError(DeployError):
    """A precision or speed assertion does not hold."""

    exit_code = 6


class EnvironmentUnsuitable(DeployError):  # noqa: N818 - it describes the machine, not a mistake
    """This machine lacks what the command needs: a GPU, a library, disk space, a writable folder."""

    exit_code = 7


class IntegrityError(DeployError):
    """A file is not the one that was recorded: hash, lock or cache mismatch."""

    exit_code = 8


def first_line(error: BaseException) -> str:
    """Return the first line of an exception's message, or the exception's name where it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
