"""Make the models that come from elsewhere. Their packages are optional: each is imported when it is asked for."""

from __future__ import annotations

import importlib
import re
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from models.errors import DeployError, EnvironmentUnsuitable, UsageError, first_line
from models.factory import call_factory, raised_at
from models.hub import fetch, parse
from models.sources import FACTORY, LIBRARIES

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from types import ModuleType

    import torch


def make(family: str, target: str, kwargs: Mapping[str, Any]) -> nn.Module:
    """Make a model with random weights.

    Args:
        family: one of :data:`models.sources.LIBRARIES`, or ``factory``.
        target: the model's name there; see :mod:`models.sources`.
        kwargs: keyword arguments of the function that makes it.

    Raises:
        UsageError: there is no such model, or making it fails.
        EnvironmentUnsuitable: the package is not installed.
    """
    makers: dict[str, Callable[[str, Mapping[str, Any]], object]] = {
        "timm": _make_timm,
        "torchvision": _make_torchvision,
        "hf": _make_transformers,
        FACTORY: call_factory,
    }
    try:
        module = makers[family](target, kwargs)
    except DeployError:
        raise
    except Exception as error:  # a stranger's code raises what it likes; the user needs its message, not our traceback
        raise UsageError(
            f"{target} could not be made: {type(error).__name__}: {first_line(error)}{raised_at(error)}",
            expected="a function that returns an nn.Module",
            hint="--model-kwargs, if it needs arguments",
        ) from error
    if not isinstance(module, nn.Module):
        raise UsageError(f"{target} returned {type(module).__name__}", expected="an nn.Module")
    return module


def _library(family: str) -> ModuleType:
    package = LIBRARIES[family]
    try:
        return importlib.import_module(package)
    except (ImportError, RuntimeError, OSError) as error:  # RuntimeError: torchvision beside another PyTorch
        raise EnvironmentUnsuitable(
            f"{package} cannot be imported: {first_line(error)}",
            expected=f"{package}, which {family}: models come from",
            hint=f"pip install {package}",
        ) from error


def _make_timm(target: str, kwargs: Mapping[str, Any]) -> object:
    timm = _library("timm")
    if not timm.is_model(target):
        near = timm.list_models(f"*{target.partition('.')[0]}*")[:3]
        raise UsageError(f"timm has no model {target!r}", hint=" or ".join(near) or "timm.list_models()")
    return timm.create_model(target, pretrained=False, **kwargs)


def _make_torchvision(target: str, kwargs: Mapping[str, Any]) -> object:
    library = _library("torchvision").models
    if target not in library.list_models():
        near = library.list_models(include=f"*{target}*")[:3]
        raise UsageError(f"torchvision has no model {target!r}", hint=" or ".join(near) or "torchvision.models")
    return library.get_model(target, weights=None, **kwargs)


def _make_transformers(target: str, kwargs: Mapping[str, Any]) -> object:
    """Make a model from its configuration; its weights are loaded as those of any checkpoint, strictly."""
    transformers = _library("hf")
    config = transformers.AutoConfig.from_pretrained(transformers_folder(target), trust_remote_code=False)
    kind = transformers.AutoModelForImageClassification if _classifies(config) else transformers.AutoModel
    # Plain MatMul, Softmax, MatMul is what the passes read.
    return kind.from_config(config, trust_remote_code=False, **{"attn_implementation": "eager", **kwargs})


def by_own_names(
    config: Mapping[str, Any], state: dict[str, torch.Tensor]
) -> tuple[dict[str, torch.Tensor], tuple[str, ...]]:
    """Bring a checkpoint to the names of the module: transformers keeps older ones in its files.

    Raises:
        UsageError: transformers finds keys missing, unexpected or of another shape.
    """
    kind = type(make("hf", **config))
    folder = transformers_folder(config["target"])
    module, told = kind.from_pretrained(  # type: ignore[attr-defined]  # every transformers model has it
        None,
        config=kind.config_class.from_pretrained(folder),  # type: ignore[attr-defined]
        state_dict=state,
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # they are reported below, with the rest
    )
    faults = {what.partition("_")[0]: sorted(map(str, keys)) for what, keys in told.items() if keys}
    if faults:
        raise UsageError(
            "the checkpoint does not belong to this model: "
            + "; ".join(f"{what} {', '.join(keys[:4])}" for what, keys in faults.items()),
            expected="exactly the model's own parameters",
            hint="the model.safetensors that lies beside config.json",
        )
    return module.state_dict(), ()


def transformers_folder(target: str, *more: str) -> Path:
    """Return the folder of a configuration: the target itself, or the hub's cache."""
    if (Path(target) / "config.json").is_file():
        return Path(target)
    if Path(target).exists() or not re.fullmatch(r"[\w.-]+/[\w.-]+(@[\w.-]+)?", target):
        raise UsageError(
            f"{target} is no transformers model",
            expected="a folder with config.json, or owner/name[@revision] on the hub",
            hint="model.save_pretrained(FOLDER)",
        )
    file = parse(target)
    folder = fetch(replace(file, filename="config.json")).path.parent
    for name in more:
        fetch(replace(file, filename=name))
    return folder


def _classifies(config: Any) -> bool:
    return any("ForImageClassification" in name for name in config.architectures or ())
