"""Models that come from elsewhere: how their names are read. Light: nothing of theirs is imported.

timm:swin_tiny_patch4_window7_224     a model of timm
torchvision:swin_t                    a model of torchvision
hf:FOLDER_OR_ID                       a transformers model: a folder, or a repository of the hub
package.module:factory                a function that returns an nn.Module, found from the working folder
path/to/file.py:factory               the same, by file
"""

from __future__ import annotations

import re
from dataclasses import dataclass

LIBRARIES = {"timm": "timm", "torchvision": "torchvision", "hf": "transformers"}
"""Prefix -> the package that it needs."""

FACTORY = "factory"
"""Family of the models that a user's own function makes."""

IMPORTED = "onnx"
"""Family, and source of the weights, of what came as an ONNX file: there is no PyTorch model of it."""


@dataclass(frozen=True)
class Source:
    """Where a model comes from.

    Attributes:
        family: ``timm``, ``torchvision``, ``hf`` or ``factory``; `build` makes it under this name.
        target: the name there; for a factory ``package.module:function``.
    """

    family: str
    target: str

    @property
    def name(self) -> str:
        """A name for the bundle: what the model is called, without what a file name cannot hold.

        A factory's begins with its module, ``modules.detector``: one function of many is called ``model``, and no
        registered name has a dot.
        """
        if self.family != FACTORY:
            return safe_name(self.target.rstrip("/").rpartition("/")[2]) or self.family
        module, _, function = self.target.rpartition(":")
        return f"{safe_name(module.rpartition('/')[2].removesuffix('.py')) or FACTORY}.{safe_name(function) or FACTORY}"


def safe_name(text: str) -> str:
    """Return a text without what a file name cannot hold; empty where nothing is left."""
    return re.sub(r"[^A-Za-z0-9._+-]+", "_", text).strip("._+-")


def parse_source(name: str) -> Source | None:
    """Read the name of a model that is not registered here; None where it has no colon."""
    prefix, colon, target = name.partition(":")
    if not colon:
        return None
    if prefix in LIBRARIES and target:
        return Source(prefix, target)
    return Source(FACTORY, name)
