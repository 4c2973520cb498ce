"""The model families: what building one and loading its checkpoints needs. A new family is one entry here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from models.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch import Tensor, nn


@dataclass(frozen=True)
class Family:
    """What the rest of the package knows about a family.

    Attributes:
        create: makes the module from the keyword arguments of ``ModelSpec.config``.
        translate: brings a checkpoint to the official names; returns it with ``{name in the file: official name}``
            for the keys that it renamed.
        check_geometry: raises UsageError where a checkpoint was made for another window or image size than the config.
        head: official name of the classifier's weight [num_classes, C].
        derived: last parts of the names of buffers that follow from the config; a checkpoint may hold them or not.
    """

    create: Callable[..., nn.Module]
    translate: Callable[[dict[str, Tensor]], tuple[dict[str, Tensor], dict[str, str]]]
    check_geometry: Callable[[Mapping[str, Any], Mapping[str, Tensor]], None]
    head: str
    derived: frozenset[str]


def family(name: str) -> Family:
    """Return the family of that name, importing it only now, since it imports PyTorch.

    Raises:
        UsageError: there is no such family.
    """
    if name == "swin":
        from models import swin_checkpoint
        from models.swin import SwinTransformer

        return Family(
            create=SwinTransformer,
            translate=swin_checkpoint.translate,
            check_geometry=swin_checkpoint.check_geometry,
            head="head.weight",
            derived=frozenset({"attn_mask", "relative_position_index"}),
        )
    raise UsageError(f"unknown model family {name!r}", expected="swin")
