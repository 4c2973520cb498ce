"""What a family of models is: what building one of it and loading its checkpoints needs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch import Tensor, nn

    Rename = Callable[[nn.Module, Mapping[str, Any], dict[str, Tensor]], dict[str, Tensor]]
    Resample = Callable[[Mapping[str, Any], dict[str, Tensor]], tuple[dict[str, Tensor], tuple[str, ...]]]


def as_it_is(state: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Rename nothing."""
    return state, {}


def fits_all(_config: Mapping[str, Any], _state: Mapping[str, Tensor]) -> None:
    """Refuse nothing."""


def own_names(_model: nn.Module, _config: Mapping[str, Any], state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename nothing: the names are the model's."""
    return state


def keep(_config: Mapping[str, Any], state: dict[str, Tensor]) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """Resample nothing."""
    return state, ()


@dataclass(frozen=True)
class Family:
    """What the rest of the package knows about a family.

    Attributes:
        create: makes the module from the keyword arguments of ``ModelSpec.config``.
        translate: brings a checkpoint to the official names; returns it with ``{name in the file: official name}``
            for the keys that it renamed. By default it renames none.
        check_geometry: raises UsageError where a checkpoint was made for another window or image size than the config,
            or for another variant, and ``resample`` cannot adapt it. By default any fits.
        head: official name of the classifier's weight [num_classes, C]; empty where none is known.
        derived: last parts of the names of buffers that follow from the config; a checkpoint may hold them or not.
        rename: brings a checkpoint to the names of the model that was made, where its library alone knows the older
            ones. By default it renames none.
        resample: adapts a checkpoint to the config, such as its learned tables to the image size; returns it with the
            official names of the tables that were resampled. By default it changes nothing.
    """

    create: Callable[..., nn.Module]
    translate: Callable[[dict[str, Tensor]], tuple[dict[str, Tensor], dict[str, str]]] = as_it_is
    check_geometry: Callable[[Mapping[str, Any], Mapping[str, Tensor]], None] = fits_all
    head: str = ""
    derived: frozenset[str] = frozenset()
    rename: Rename = own_names
    resample: Resample = keep

    @property
    def strange(self) -> bool:
        """Whether its models come from elsewhere: their head has no name that is known here."""
        return not self.head
