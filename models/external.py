"""Make the models that come from elsewhere. Their packages are optional: each is imported when it is asked for."""

from __future__ import annotations

import importlib
import re
from contextlib import contextmanager
from dataclasses import replace
from importlib import metadata
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from deploycli.models.errors import DeployError, EnvironmentUnsuitable, UsageError, first_line
from deploycli.models.factory import call_factory, said
from deploycli.models.family import Parted
from deploycli.models.features import chosen_stages, no_features
from deploycli.models.hub import fetch, parse
from deploycli.models.sources import FACTORY, LIBRARIES
from deploycli.models.values import converted, some

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
    from types import ModuleType

    from torch import Tensor

CLASSES = {"timm": "num_classes", "torchvision": "num_classes", "hf": "num_labels"}
"""Library -> the keyword argument that says how many classes a model's head has."""


def make(family: str, target: str, kwargs: Mapping[str, Any]) -> nn.Module:
    """Make a model with random weights.

    Args:
        family: one of :data:`deploycli.models.sources.LIBRARIES`, or ``factory``.
        target: the model's name there; see :mod:`deploycli.models.sources`.
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
    _refuse_arguments(family, kwargs)
    try:
        module = makers[family](target, kwargs)
    except DeployError:
        raise
    except Exception as error:  # a stranger's code raises what it likes; the user needs its message, not our traceback
        if (misfit := _torchvision_misfit(f"{target} cannot be made", error)) is not None:
            raise misfit from error
        raise UsageError(
            f"{target} could not be made: {said(error)}",
            expected="a function that returns an nn.Module",
            hint="--model-kwargs, if it needs arguments",
        ) from error
    if not isinstance(module, nn.Module):
        raise UsageError(f"{target} returned {type(module).__name__}", expected="an nn.Module")
    lazy = [name for name, value in chain(module.named_parameters(), module.named_buffers()) if is_lazy(value)]
    if lazy:
        raise UsageError(
            f"{target} has parameters that get their shapes when it first runs {some(lazy)}",
            expected="an nn.Module with weights",
            hint="let the function run it once, on zeros of an input's shape",
        )
    return module


_REACHING = {
    "timm": ("checkpoint_path", "pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "cache_dir"),
    "torchvision": ("weights", "weights_backbone"),
    "hf": ("trust_remote_code", "code_revision", "quantization_config"),
    FACTORY: (),
}
"""What reads files, fetches, unpickles, or runs code of a repository: a manifest names arguments, too."""


def _refuse_arguments(family: str, kwargs: Mapping[str, Any]) -> None:
    """Raise where an argument reaches for more than a model with random weights."""
    reaching = [name for name in _REACHING[family] if kwargs.get(name) not in (None, False)]
    attention = kwargs.get("attn_implementation")
    if family == "hf" and isinstance(attention, str) and not attention.replace("_", "").isalnum():
        reaching.append("attn_implementation")  # a repository of kernels
    if reaching:
        raise UsageError(
            f"the argument {reaching[0]!r} of a {family}: model",
            expected="arguments of the architecture: no files, no weights, no code",
            hint="--checkpoint FILE or --pretrained for weights",
        )


def classes_of(family: str, module: nn.Module) -> int | None:
    """Return how many classes a model says that it has; None where it is no classifier, or says nothing."""
    classes: object = None
    if family == "hf":
        config = getattr(module, "config", None)
        classes = getattr(config, "num_labels", None) if _classifies(config) else None
    elif family == "torchvision":  # its classifiers end in the head
        if not re.search(r"\.(detection|segmentation|optical_flow)\b", type(module).__module__):
            classes = next((len(p) for p in reversed(list(module.parameters())) if p.ndim), None)
    else:
        classes = getattr(module, "num_classes", None) if family == "timm" else _rows(getattr(module, "head", None))
    return classes if isinstance(classes, int) and classes > 0 else None


def _rows(head: object) -> int | None:
    return head.out_features if isinstance(head, nn.Linear) else None


def _library(family: str) -> ModuleType:
    package = LIBRARIES[family]
    try:
        return importlib.import_module(package)
    except (ImportError, RuntimeError, OSError) as error:  # RuntimeError: torchvision beside another PyTorch
        raise _torchvision_misfit(f"{package} cannot be imported", error) or EnvironmentUnsuitable(
            f"{package} cannot be imported: {first_line(error)}",
            expected=f"{package}, which {family}: models come from",
            hint=f"pip install {package}",
        ) from error


def _torchvision_misfit(what: str, error: BaseException) -> EnvironmentUnsuitable | None:
    """Explain an error of torchvision's compiled half, which fits one build of one PyTorch; None for any other error.

    Its Python half registers kernels of operators that the compiled half was to define: `operator torchvision::nms does
    not exist`. Or the library cannot be loaded: `_C.so: undefined symbol`. transformers raises another error from it.
    """
    cause: BaseException | None = error
    while cause is not None and not re.search("operator torchvision::|torchvision.*undefined symbol", str(cause)):
        cause = cause.__cause__ or cause.__context__
    if cause is None:
        return None
    found = metadata.version("torchvision")
    release, _, build = torch.__version__.partition("+")
    major, minor = release.split(".")[:2]
    # torchvision 0.15 came with PyTorch 2.0, and one more with each since. PyTorch's index has a folder for each build.
    fitting = f'"torchvision==0.{int(minor) + 15}.*"' if major == "2" else "torchvision"
    index = f" --index-url https://download.pytorch.org/whl/{build}" if build else ""
    return EnvironmentUnsuitable(
        f"{what}: torchvision {found} does not fit PyTorch {torch.__version__} ({first_line(cause)})",
        expected=f"a torchvision that was built for PyTorch {release}{f' ({build})' if build else ''}",
        hint=f"pip install --force-reinstall --no-deps {fitting}{index}",
    )


def _make_timm(target: str, kwargs: Mapping[str, Any]) -> object:
    timm = _library("timm")
    if not timm.is_model(target):
        near = timm.list_models(f"*{target.partition('.')[0]}*")[:3]
        raise UsageError(f"timm has no model {target!r}", hint=" or ".join(near) or "timm.list_models()")
    module = timm.create_model(target, pretrained=False, **kwargs)
    if kwargs.get(FEATURES_ONLY) and hasattr(module, "feature_info"):
        module.register_forward_hook(_channels_first)
    return module


FEATURES_ONLY = "features_only"
"""timm's argument for a model without its head, which gives feature maps."""


def _channels_first(module: Any, _inputs: object, maps: Sequence[Tensor]) -> list[Tensor]:
    """Return maps as [B, C, H, W], which detectors' necks read; some of timm's models give [B, H, W, C]."""
    last = str(getattr(module, "output_fmt", "")).endswith("NHWC")
    channels = module.feature_info.channels()
    return [x.permute(0, 3, 1, 2) if last or x.shape[1] != c else x for x, c in zip(maps, channels, strict=True)]


def backbone_arguments(target: str, kwargs: Mapping[str, Any], stages: Sequence[int]) -> dict[str, Any]:
    """Return the arguments that make a backbone of a timm model, with numbers of its feature maps.

    Args:
        target: timm's name of the model.
        kwargs: the other arguments.
        stages: which maps, the first is 1; none for those that timm gives.

    Raises:
        UsageError: it cannot give maps, or has no such one.
    """
    arguments = {**kwargs, FEATURES_ONLY: True}
    with torch.device("meta"):
        try:
            backbone: Any = make("timm", target, arguments)
        except UsageError:
            make("timm", target, kwargs)  # which says what is wrong with the name or the arguments
            backbone = None
    if not hasattr(backbone, "feature_info"):
        raise no_features(f"timm:{target}", "a model that timm makes with features_only=True")
    if not stages:
        return arguments
    known = range(1, len(backbone.feature_info.info) + 1)
    return {**arguments, "out_indices": [stage - 1 for stage in chosen_stages(f"timm:{target}", stages, known)]}


def maps_of(module: nn.Module) -> tuple[tuple[int, int], ...]:
    """Return number and stride, pixels, of each map that a backbone of timm's gives; the first number is 1."""
    told: Any = module.feature_info
    return tuple((index + 1, stride) for index, stride in zip(told.out_indices, told.reduction(), strict=True))


def features_of(config: Mapping[str, Any], state: dict[str, Tensor], own: Collection[str]) -> Parted:
    """Take a backbone of timm's out of the checkpoint of its classifier.

    timm wraps the classifier: its names get a prefix, or an underscore for their first dot.
    """
    kwargs = dict(config["kwargs"])
    if not kwargs.pop(FEATURES_ONLY, False):
        return Parted(state, {}, ())
    kwargs.pop("out_indices", None)
    with torch.device("meta"):
        classifier = make("timm", config["target"], kwargs).state_dict()
    names = {key: _name_in_part(key, own) for key in state}
    left_out = tuple(key for key, name in names.items() if name is None and key in classifier)
    kept = {names[key] or key: value for key, value in state.items() if key not in left_out}
    return Parted(kept, {key: name for key, name in names.items() if name not in (None, key)}, left_out)


def _name_in_part(key: str, own: Collection[str]) -> str | None:
    return next((name for name in (key, key.replace(".", "_", 1), f"model.{key}") if name in own), None)


def _make_torchvision(target: str, kwargs: Mapping[str, Any]) -> object:
    library = _library("torchvision").models
    if target not in library.list_models():
        near = library.list_models(include=f"*{target}*")[:3]
        raise UsageError(f"torchvision has no model {target!r}", hint=" or ".join(near) or "torchvision.models")
    return library.get_model(target, weights=None, **kwargs)


def _make_transformers(target: str, kwargs: Mapping[str, Any]) -> object:
    """Make a model from its configuration; its weights are loaded as those of any checkpoint, strictly."""
    transformers = _library("hf")
    config, rest = _configuration(target, kwargs)
    if CLASSES["hf"] in kwargs and not _classifies(config):
        raise UsageError(
            f"{target} is no classifier: a number of classes means nothing to it",
            expected=f"an architecture ForImageClassification in its config.json, not {config.architectures}",
            hint="leave out --num-classes",
        )
    kind = transformers.AutoModelForImageClassification if _classifies(config) else transformers.AutoModel
    # Plain MatMul, Softmax, MatMul is what the passes read.
    return kind.from_config(config, trust_remote_code=False, **{"attn_implementation": "eager", **rest})


def _configuration(target: str, kwargs: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Read a transformers configuration; return it and the arguments that are not for it."""
    rest = dict(kwargs)
    labels = {CLASSES["hf"]: rest.pop(CLASSES["hf"])} if CLASSES["hf"] in rest else {}
    folder = transformers_folder(target)
    return _library("hf").AutoConfig.from_pretrained(folder, trust_remote_code=False, **labels), rest


def by_own_names(own: nn.Module, config: Mapping[str, Any], state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Bring a checkpoint to the names of a module: transformers keeps older ones in its files.

    It renames them only while it loads them, into a model that it makes for itself.

    Raises:
        UsageError: transformers finds keys missing, unexpected or of another shape; or a weight is of a type that would
            lose more than digits.
    """
    _refuse_what_would_be_cast(own.state_dict(), state)
    kind = type(own)
    with _silent(_library("hf").logging):
        module, told = kind.from_pretrained(  # type: ignore[attr-defined]  # every transformers model has it
            None,
            config=_configuration(config["target"], config["kwargs"])[0],
            state_dict=state,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are reported below, with the rest
        )
    faults = {what.partition("_")[0]: sorted(map(str, keys)) for what, keys in told.items() if keys}
    if faults:
        raise UsageError(
            "the checkpoint does not belong to this model: "
            + "; ".join(f"{what} {some(keys)}" for what, keys in faults.items()),
            expected="exactly the model's own parameters",
            hint="the model.safetensors that lies beside config.json",
        )
    renamed: dict[str, Tensor] = module.state_dict()
    return renamed


@contextmanager
def _silent(logging: Any) -> Iterator[None]:
    """Keep transformers from printing a report with the file's names as they are, and a bar across our own."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)


def _refuse_what_would_be_cast(own: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> None:
    """Judge the tensors before transformers casts them; under older names, by what is called so in the model."""
    floats = {key.rpartition(".")[2] for key, value in own.items() if value.is_floating_point()}
    for key, value in state.items():
        if (like := own.get(key)) is not None:
            if like.shape == value.shape:
                converted(key, value, like)
        elif value.is_complex() or key.rpartition(".")[2] in floats:
            converted(key, value, torch.empty(0))


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
