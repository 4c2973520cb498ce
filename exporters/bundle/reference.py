"""The truth that a bundle is compared with: the untouched eager model, or what it once answered."""

from __future__ import annotations

import importlib
import importlib.util
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deploycli.exporters.bundle.manifest import EXPORT_AGAIN, MANIFEST_NAME
from deploycli.exporters.bundle.trust import TRUST, distrust
from deploycli.models.errors import DeployError, EnvironmentUnsuitable, IntegrityError, UsageError, first_line
from deploycli.models.files import sha256_of
from deploycli.models.sources import FACTORY, IMPORTED, LIBRARIES

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from torch import nn

    from deploycli.exporters.bundle.manifest import Manifest
    from deploycli.models.spec import Weights

_LARGEST_ARGUMENT = 2**16
"""No width or depth is larger; a number of classes is, where the bundle's files hold as many weights."""

_TIMES_STORED, _MOST_WEIGHTS = 16, 2**26
"""A model has no more weights than so many times what the bundle stores of them, and so many: some are never used."""

REFERENCES = ("auto", "eager", "golden")


def choose_reference(
    manifest: Manifest, wanted: str, checkpoint: Path | None, *, trust_factory: bool = False
) -> tuple[str, str]:
    """Decide between the eager model, the file that was imported, and golden.npz, without the network.

    Args:
        manifest: the bundle's.
        wanted: ``eager``, ``golden``, or ``auto``: eager where PyTorch and the weights are at hand.
        checkpoint: where the user says that the weights are.
        trust_factory: run the function that the manifest names, whoever wrote it.

    Returns:
        ``eager``, ``golden``, or ``onnx`` for what was imported; and what a reader should know of it: why ``auto`` fell
        back on golden, or what the reference is; else an empty string.

    Raises:
        UsageError: an unknown choice, or a checkpoint that the bundle or the choice has no use for.
        EnvironmentUnsuitable: eager was asked for and is not possible here.
    """
    if wanted not in REFERENCES:
        raise UsageError(f"there is no reference {wanted!r}", expected=", ".join(REFERENCES))
    if checkpoint is not None and (wanted == "golden" or not manifest.weights.from_file):
        why = "the golden reference" if wanted == "golden" else f"a bundle of {manifest.weights.kind}"
        raise UsageError(f"a checkpoint was given for {why}", expected="no checkpoint", hint="leave out --checkpoint")
    if wanted == "golden":
        return "golden", ""
    if manifest.spec.family == IMPORTED:
        if wanted == "eager":
            raise UsageError(
                "the bundle is of an ONNX file that was imported: there is no eager model",
                expected="the file as it was, in ONNX Runtime",
                hint="--reference auto",
            )
        return "onnx", "the file as it was imported, in ONNX Runtime"
    why = "" if trust_factory else distrust(manifest)
    obstacle = f"{why} ({TRUST})" if why else _obstacle(manifest, checkpoint)
    if obstacle is None:
        return "eager", ""
    if why and wanted == "eager":
        raise EnvironmentUnsuitable(
            f"the eager reference is not possible: {why}",
            expected="a bundle that you exported on this machine: another one's code is not run unasked",
            hint=f"{TRUST}, where you trust who made the bundle; or --reference golden",
        )
    if wanted == "eager" or checkpoint is not None:
        raise EnvironmentUnsuitable(
            f"the eager reference is not possible: {obstacle}",
            expected="PyTorch, and the weights that the bundle was made from",
            hint="pass the file with --checkpoint, or --reference golden",
        )
    return "golden", f"golden, because {obstacle}"


def reference_model(manifest: Manifest, checkpoint: Path | None, *, trust_factory: bool = False) -> nn.Module:
    """Build the eager model with the very weights that the bundle was made from.

    Args:
        manifest: the bundle's.
        checkpoint: where the checkpoint is now; None means where the manifest says.
        trust_factory: run the function that the manifest names, whoever wrote it.

    Raises:
        EnvironmentUnsuitable: that function is a stranger's.
        IntegrityError: the manifest makes no model; the checkpoint is not the recorded file; or a factory brings other
            weights than it did.
        UsageError: the checkpoint cannot be read.
    """
    from deploycli.models.build import build
    from deploycli.models.checkpoint import load

    if not trust_factory and (why := distrust(manifest)):
        raise EnvironmentUnsuitable(f"the eager model is not made: {why}", hint=TRUST)
    weights = manifest.weights
    if not weights.from_file:
        with _as_recorded(manifest):
            module = build(manifest.spec, seed=weights.seed or 0)
        if weights.sha256:
            _check_factory(manifest, module)
        return module
    path = _checkpoint_path(weights, checkpoint)
    if path is None:
        raise UsageError(f"the weights {weights.path} are not on this machine", hint="pass the file with --checkpoint")
    if (found := sha256_of(path)) != weights.sha256:
        raise IntegrityError(
            f"{path} is not the checkpoint that the bundle was made from: sha256 {found}",
            expected=f"sha256 {weights.sha256}",
            hint="pass the recorded file with --checkpoint, or export again from this one",
        )
    with _as_recorded(manifest, path.stat().st_size):
        return load(manifest.spec, path, entry=weights.entry or None).model


@contextmanager
def _as_recorded(manifest: Manifest, mapped: int = 0) -> Iterator[None]:
    """Make a sentence of an error in what follows from the manifest, which may be anybody's.

    Args:
        manifest: the bundle's.
        mapped: bytes of a checkpoint that is read inside the block.

    Raises:
        IntegrityError: the arguments in the manifest make no model, or a far larger one than the bundle holds.
    """
    from deploycli.models.memory import memory_that_is_left, weights_at_most

    spec = manifest.spec
    where = f"{MANIFEST_NAME} names arguments at $.spec.config that make no {spec.family}"
    try:
        with ExitStack() as limits:
            if spec.family != FACTORY:  # that is the user's own, or one that the user trusts
                stored = sum(
                    r.size for artifact in manifest.artifacts if not artifact.source for r in artifact.records()
                )
                weights = stored // 4  # of FP32
                _refuse_huge_numbers(spec.config, max(_LARGEST_ARGUMENT, weights), where)
                limits.enter_context(memory_that_is_left(mapped))
                limits.enter_context(weights_at_most(_TIMES_STORED * weights + _MOST_WEIGHTS, where))
            yield
    except (DeployError, MemoryError):
        raise
    except Exception as error:
        raise IntegrityError(f"{where}: {type(error).__name__}: {first_line(error)}", hint=EXPORT_AGAIN) from error


def _refuse_huge_numbers(config: Mapping[str, Any], largest: int, where: str) -> None:
    if (huge := max(_numbers(config), default=0)) > largest:
        raise IntegrityError(f"{where}: {huge}", expected=f"numbers up to {largest}", hint=EXPORT_AGAIN)


def _numbers(value: Any) -> Iterator[float]:
    if isinstance(value, dict | list | tuple):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _numbers(inner)
    elif isinstance(value, int | float):
        yield abs(value)


def _check_factory(manifest: Manifest, module: nn.Module) -> None:
    """Refuse weights that are not those that the factory brought at export."""
    from deploycli.models.fingerprint import Fingerprint

    found = Fingerprint.of(module).sha256
    if found != manifest.weights.sha256:
        raise IntegrityError(
            f"the eager model is another one: {manifest.spec.config['target']} now brings weights of sha256 {found}",
            expected=f"sha256 {manifest.weights.sha256}, as at export",
            hint="export again, or --reference golden; draw weights from torch, numpy or random, which are seeded",
        )


def _obstacle(manifest: Manifest, checkpoint: Path | None) -> str | None:
    """Say why the eager model cannot be built, or None."""
    weights = manifest.weights
    try:
        importlib.import_module("torch")
    except (ImportError, OSError) as error:  # OSError: installed, but a shared library is missing
        return f"PyTorch cannot be imported ({error})"
    package = LIBRARIES.get(manifest.spec.family)
    if package is not None and importlib.util.find_spec(package) is None:
        return f"{package} is not installed"
    if not weights.from_file:
        return None
    path = _checkpoint_path(weights, checkpoint)
    if path is None or not path.is_file():
        return f"the weights are not at hand ({path or weights.path})"
    return None


def _checkpoint_path(weights: Weights, checkpoint: Path | None) -> Path | None:
    """Return where the checkpoint should be; for published weights that is the hub's cache, if they are in it."""
    if checkpoint is not None or weights.source == "checkpoint":
        return checkpoint or Path(weights.path)
    from huggingface_hub import try_to_load_from_cache

    repository, _, rest = weights.path.partition("@")
    revision, _, filename = rest.partition("/")
    try:
        cached = try_to_load_from_cache(repository, filename, revision=revision)
    except (OSError, ValueError):  # what the manifest names is no file of a repository
        return None
    return Path(cached) if isinstance(cached, str) else None
