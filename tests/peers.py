"""Other implementations of the same models, to compare with."""

import importlib
import sys
import warnings
from functools import cache
from types import ModuleType

import torch


@cache
def import_timm() -> ModuleType:
    """Import timm where torchvision's compiled operators may be missing.

    timm imports torchvision, whose Python half registers meta kernels for operators that its compiled half defines.
    Where a CPU build of PyTorch meets a torchvision without that half, defining the schemas first is enough: the models
    do not call the operators.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecations inside timm and torchvision are theirs
        try:
            return importlib.import_module("timm")
        except RuntimeError:
            for name in [m for m in sys.modules if m.split(".")[0] in ("timm", "torchvision")]:
                del sys.modules[name]
            _define_operators()
            return importlib.import_module("timm")


@cache
def import_transformers() -> ModuleType:
    """Import transformers, which imports torchvision as timm does."""
    import_timm()
    return importlib.import_module("transformers")


def _define_operators() -> None:
    _LIBRARY.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _LIBRARY.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _LIBRARY.define(
        "roi_align(Tensor input, Tensor rois, float spatial_scale, SymInt pooled_height, SymInt pooled_width, "
        "int sampling_ratio, bool aligned) -> Tensor"
    )


_LIBRARY = torch.library.Library("torchvision", "FRAGMENT")  # the operators live as long as this object
