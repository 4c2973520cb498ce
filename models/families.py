"""The model families: what building one and loading its checkpoints needs. A new family is one entry here."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from deploycli.models.errors import UsageError
from deploycli.models.sources import FACTORY, LIBRARIES

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch import Tensor, nn

    Resample = Callable[[Mapping[str, Any], dict[str, Tensor]], tuple[dict[str, Tensor], tuple[str, ...]]]


def _keep(_config: Mapping[str, Any], state: dict[str, Tensor]) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    return state, ()


@dataclass(frozen=True)
class Family:
    """What the rest of the package knows about a family.

    Attributes:
        create: makes the module from the keyword arguments of ``ModelSpec.config``.
        translate: brings a checkpoint to the official names; returns it with ``{name in the file: official name}``
            for the keys that it renamed.
        check_geometry: raises UsageError where a checkpoint was made for another window or image size than the config,
            or for another variant, and ``resample`` cannot adapt it.
        head: official name of the classifier's weight [num_classes, C]; empty where none is known.
        derived: last parts of the names of buffers that follow from the config; a checkpoint may hold them or not.
        resample: adapts a checkpoint to the config, such as its learned tables to the image size; returns it with the
            official names of the tables that were resampled. By default it changes nothing.
    """

    create: Callable[..., nn.Module]
    translate: Callable[[dict[str, Tensor]], tuple[dict[str, Tensor], dict[str, str]]]
    check_geometry: Callable[[Mapping[str, Any], Mapping[str, Tensor]], None]
    head: str
    derived: frozenset[str]
    resample: Resample = _keep

    @property
    def strange(self) -> bool:
        """Whether its models come from elsewhere: their head has no name that is known here."""
        return not self.head


def family(name: str) -> Family:
    """Return the family of that name, importing it only now, since it imports PyTorch.

    Raises:
        UsageError: there is no such family.
    """
    if name == "swin":
        from deploycli.models import swin_checkpoint
        from deploycli.models.swin import SwinTransformer

        return Family(
            create=SwinTransformer,
            translate=swin_checkpoint.translate,
            check_geometry=swin_checkpoint.check_geometry,
            head="head.weight",
            derived=frozenset({"attn_mask", "relative_position_index"}),
        )
    if name == "crossformer":
        from deploycli.models import crossformer_checkpoint
        from deploycli.models.crossformer import CrossFormer

        return Family(
            create=CrossFormer,
            translate=crossformer_checkpoint.translate,
            check_geometry=crossformer_checkpoint.check_geometry,
            head="head.weight",
            derived=frozenset({"biases", "relative_position_index"}),
        )
    if name == "crossformer_pp":
        from deploycli.models import crossformer_checkpoint
        from deploycli.models.crossformer_pp import CrossFormerPP

        return Family(
            create=CrossFormerPP,
            translate=crossformer_checkpoint.translate,
            check_geometry=crossformer_checkpoint.accept_any_geometry,
            head="head.weight",
            derived=frozenset(),
        )
    if name == "vit":
        from deploycli.models import vit_checkpoint
        from deploycli.models.vit import VisionTransformer

        return Family(
            create=VisionTransformer,
            translate=vit_checkpoint.translate,
            check_geometry=vit_checkpoint.check_geometry,
            head="head.weight",
            derived=frozenset(),
            resample=vit_checkpoint.resample,
        )
    if name in (*LIBRARIES, FACTORY):
        from deploycli.models import foreign

        return Family(
            create=partial(foreign.make, name),
            translate=lambda state: (state, {}),
            check_geometry=lambda _config, _state: None,
            head="",
            derived=frozenset(),
            resample=foreign.by_own_names if name == "hf" else _keep,
        )
    raise UsageError(f"unknown model family {name!r}", expected="swin, vit, crossformer or crossformer_pp")
