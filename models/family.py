"""What a family of models is: what building one of it and loading its checkpoints needs."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping

    from torch import Tensor, nn

    Rename = Callable[[nn.Module, Mapping[str, Any], dict[str, Tensor]], dict[str, Tensor]]
    Part = Callable[[Mapping[str, Any], dict[str, Tensor], Collection[str]], "Parted"]
    Resample = Callable[[Mapping[str, Any], dict[str, Tensor]], tuple[dict[str, Tensor], tuple[str, ...]]]


@dataclass(frozen=True)
class Parted:
    """What of a checkpoint belongs to a model that is a part of another one.

    Attributes:
        state: what belongs to it.
        renamed: ``{name in the checkpoint: name in the part}`` for the renamed keys.
        left_out: names in the checkpoint of what the part does not have.
    """

    state: dict[str, Tensor]
    renamed: Mapping[str, str]
    left_out: tuple[str, ...]


def whole(_config: Mapping[str, Any], state: dict[str, Tensor], _own: Collection[str]) -> Parted:
    """Leave nothing out."""
    return Parted(state, {}, ())


def without_head(_config: Mapping[str, Any], state: dict[str, Tensor], own: Collection[str]) -> Parted:
    """Take a backbone out of the checkpoint of its classifier, or of a detector that calls it ``backbone``.

    Buffers that follow from the classifier's image size go untold.
    """
    prefix = "backbone." if any(key.startswith("backbone.") for key in state) else ""
    names = {key: key.removeprefix(prefix) for key in state if key.startswith(prefix)}
    foreign = {key for key, name in names.items() if name not in own and re.match(r"(head|norm\d?)\.", name)}
    derived = {key for key, name in names.items() if re.search(r"\.(attn_mask|biases|relative_position_index)$", name)}
    kept = {key: name for key, name in names.items() if key not in foreign | derived}
    return Parted(
        {name: state[key] for key, name in kept.items()},
        {key: name for key, name in kept.items() if key != name},
        tuple(key for key in state if key in foreign or key not in names),
    )


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
        part: takes out of a checkpoint what belongs to the model, where that is a part of the checkpoint's. By default
            all does.
        fresh: regular expression of the parameters that such a part has and the whole may not: all of them are in a
            checkpoint, or none, and then they stay as the model was made. Empty where there are none.
        strange: its models come from elsewhere.
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
    part: Part = whole
    fresh: str = ""
    strange: bool = False
    rename: Rename = own_names
    resample: Resample = keep
