"""A Triton model repository from a verified bundle.

    <repository>/<model>/config.pbtxt
                         labels.txt              with labels
                         1/model.onnx [+ data]   or model.plan

What was not verified, failed, changed since, has random weights or was calibrated on random data is refused; forced,
the configuration says so. Files are copied, and their hashes are those of the copied bytes.

A new model appears by one rename. So does a new version of an existing one; then its labels and its configuration are
replaced, and all is put back where that fails. Of two that package the same model at once each makes a version of its
own or is refused, and the configuration is the later one's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from deploycli.exporters.bundle.files import replaced_folder, write_whole
from deploycli.exporters.bundle.manifest import version_of
from deploycli.exporters.serving.release import (
    Packaged,
    cannot_write,
    choose,
    names,
    not_for_release,
    place,
    provenance,
    servable,
    served_engines,
    smallest_proven,
)
from deploycli.exporters.serving.triton_config import (
    CONFIG_NAME,
    LABELS_NAME,
    MARK,
    TritonOptions,
    config_text,
    interface,
)
from deploycli.models.errors import UsageError
from deploycli.models.labels import read_labels, require_fitting

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from deploycli.exporters.bundle.bundle import Bundle, Engine, OnnxFile
    from deploycli.exporters.serving.release import Servable


DEFAULT_MAX_BATCH = 32
"""Of a file that takes any batch."""


def prepare(bundle: Bundle, root: Path, options: TritonOptions | None = None) -> Delivery:
    """Check all that can be checked before a version is written.

    Args:
        bundle: an opened bundle; its hashes were checked by `Bundle.open`.
        root: the repository; made where it is missing.
        options: what the user chose.

    Raises:
        UsageError: the file is not for release, an option does not fit it, or something else stands in its place.
        NumericsError: verification found it outside its budget.
        IntegrityError: an engine is not the recorded one.
    """
    options = options or TritonOptions()
    _check_options(options)
    name = options.name or bundle.path.resolve().name
    folder = place(
        root,
        name,
        CONFIG_NAME,
        wanted="nothing there, or a model to add a version to",
        foreign="so no model of a repository",
        option="--triton",
    )
    file = _choose(bundle, options)
    forced = not_for_release(file, force=options.force)
    served = servable(file)
    max_batch, notes = _max_batch(served, options)
    label_output, labels = _labels(served, options.labels)
    number = next_version(folder, options.version)
    source = provenance(served, forced)
    parameters = {MARK: version_of("deploycli"), "deploycli_model_version": str(number)}
    parameters |= {f"deploycli_{key}": text for key, text in source.items()}
    if tolerances := parameters.get("deploycli_proof_tolerances"):
        notes.append(f"verified with a looser budget: {tolerances}")
    if needs := served.facts.get("tensorrt"):
        notes.append(f"the server's TensorRT must be {needs}, its GPU {served.facts['gpu']}")
    config = config_text(
        name,
        served,
        max_batch,
        options,
        label_output=label_output,
        example={spec.name: spec.shape for spec in bundle.manifest.spec.inputs},
        parameters=parameters,
        warnings=[f"NOT FOR RELEASE: {why}" for why in forced],
    )
    check_existing(folder / CONFIG_NAME, config, force=options.force)
    path = str(folder / str(number))
    packaged = PackagedVersion(file, path, forced, name, number, options.flavour, max_batch, tuple(notes))
    return Delivery(folder, config, labels, packaged)


def _check_options(options: TritonOptions) -> None:
    if options.flavour == "tensorrt" and (options.onnx_tensorrt or options.kind not in (None, "gpu")):
        what = "--onnx-tensorrt" if options.onnx_tensorrt else f"--kind {options.kind}"
        raise UsageError(f"{what} with --flavour tensorrt", expected="an engine runs on GPUs", hint="--flavour onnx")
    if options.onnx_tensorrt and options.kind == "cpu":
        raise UsageError("--onnx-tensorrt with --kind cpu", expected="a GPU", hint="leave one of them out")
    if options.engine is not None and options.flavour != "tensorrt":
        raise UsageError("--engine without --flavour tensorrt", hint="--flavour tensorrt")
    numbers = (options.version, options.max_batch, options.instances, *options.preferred_batch)
    if any(number is not None and number < 1 for number in numbers) or (options.queue_delay or 0) < 0:
        raise UsageError("a version, a batch or a number of instances below 1, or a negative delay")


def _choose(bundle: Bundle, options: TritonOptions) -> OnnxFile | Engine:
    engines = options.flavour == "tensorrt"
    found: list[OnnxFile | Engine] = [*(served_engines(bundle) if engines else bundle.onnx_files())]
    named = found
    if options.engine is not None:
        named = [file for file in found if file.path.name == options.engine]
        if not named:
            raise UsageError(f"{bundle.path} holds no {options.engine}", expected=names(found), hint="one of these")
    default = named[0].precision if options.engine else smallest_proven(found) if engines else "fp32"
    fitting = choose(bundle, named, options.precision or default, "deploycli build-trt" if engines else "")
    if len(fitting) > 1:
        raise UsageError(
            f"{bundle.path} holds {len(fitting)} engines of that precision",
            expected="one",
            hint=f"--engine: {names(found)}",
        )
    return fitting[0]


def _max_batch(servable: Servable, options: TritonOptions) -> tuple[int, list[str]]:
    """Return Triton's max_batch_size, and notes.

    A size above 0 means a variable leading axis of every tensor. A file with a fixed batch has size 0, and its dims say
    the batch.
    """
    asked = options.max_batch, options.preferred_batch, options.queue_delay
    if not servable.batched:
        if asked != (None, (), None):
            raise UsageError(
                f"{servable.file.name} has no variable batch axis, so a server cannot form batches of it",
                expected="no --max-batch, --preferred-batch or --queue-delay",
                hint="export it with --batch dynamic",
            )
        return 0, ["the file has a fixed batch: clients send it whole (max_batch_size 0)"]
    if servable.smallest_batch > 1:
        raise UsageError(
            f"{servable.file.name} takes no batch below {servable.smallest_batch}",
            expected="an engine that takes 1, which a server may always send",
            hint="build it again with a profile from batch 1",
        )
    largest = servable.largest_batch
    size = options.max_batch or largest or DEFAULT_MAX_BATCH
    if largest is not None and size > largest:
        raise UsageError(
            f"--max-batch {size}, but {servable.file.name} takes {largest} at most", hint=f"--max-batch {largest}"
        )
    if any(batch > size for batch in options.preferred_batch):
        raise UsageError(
            f"preferred batches {', '.join(map(str, options.preferred_batch))}",
            expected=f"none above the largest batch, {size}",
            hint="--max-batch",
        )
    return size, []


def _labels(servable: Servable, path: Path | None) -> tuple[str, str | None]:
    """Return the name of the output whose classes have names, and the text of labels.txt."""
    # The first output [B, classes] of more than one class, as in
    # `deploycli.exporters.verification.on_samples.class_output`.
    output = next((t for t in servable.outputs if len(t.shape) == 2 and t.shape[1] > 1), None)
    if path is None:
        known = servable.file.bundle.manifest.labels
        fits = output is not None and output.shape[1] == len(known)
        return (output.name, "\n".join(known) + "\n") if output is not None and fits else ("", None)
    if output is None:
        raise UsageError(f"{servable.file.name} has no output [batch, classes] to label", hint="leave out --labels")
    names = read_labels(path)
    require_fitting(names, output.shape[1], str(path))
    return output.name, "\n".join(names) + "\n"


_MODEL_FILES = {"onnx": "model.onnx", "tensorrt": "model.plan"}


@dataclass(frozen=True)
class PackagedVersion(Packaged):
    """A version of a model in a repository.

    Attributes:
        name: of the model.
        version: its number.
        flavour: ``onnx`` or ``tensorrt``.
        max_batch_size: the largest batch, or 0 where the file has a fixed one.
        notes: what the user should know.
    """

    name: str
    version: int
    flavour: str
    max_batch_size: int
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Return it as JSON values."""
        return super().to_json() | {
            "name": self.name,
            "version": self.version,
            "flavour": self.flavour,
            "max_batch_size": self.max_batch_size,
            "notes": list(self.notes),
        }


@dataclass(frozen=True)
class Delivery:
    """A version that may be written: everything was checked, nothing was written yet.

    Attributes:
        folder: of the model.
        config: text of config.pbtxt.
        labels: text of labels.txt, or None.
        packaged: what it will be.
    """

    folder: Path
    config: str
    labels: str | None
    packaged: PackagedVersion

    def write(self) -> PackagedVersion:
        """Write the version.

        Raises:
            IntegrityError: a file of the bundle changed meanwhile.
            UsageError: another process wrote this version meanwhile.
            EnvironmentUnsuitable: the repository cannot be written, or the disk is full.
        """
        try:
            if self.folder.exists():
                self._add_version()
            else:
                self._add_model()
        except FileExistsError as error:
            raise UsageError(
                f"{error.filename} appeared while it was written", expected="nobody else", hint="package it again"
            ) from error
        except OSError as error:
            raise cannot_write(self.folder, error, "--triton") from error
        return self.packaged

    def _add_model(self) -> None:
        with replaced_folder(self.folder, replace=False) as staged:
            (staged / str(self.packaged.version)).mkdir()
            self._copy(staged / str(self.packaged.version))
            for name, text in self._texts().items():
                (staged / name).write_bytes(text)

    def _add_version(self) -> None:
        """Add the version, then replace labels and configuration beside it; where that fails, take it all back."""
        texts = {self.folder / name: text for name, text in self._texts().items()}
        before = {path: path.read_bytes() if path.is_file() else None for path in texts}
        version = self.folder / str(self.packaged.version)
        with replaced_folder(version, replace=False, late=lambda _: _replace(texts, before)) as staged:
            self._copy(staged)

    def _texts(self) -> dict[str, bytes]:
        """Return the files beside the versions; labels first, for the configuration names them."""
        labels = {} if self.labels is None else {LABELS_NAME: self.labels.encode()}
        return labels | {CONFIG_NAME: self.config.encode()}

    def _copy(self, folder: Path) -> None:
        self.packaged.file.copy(folder, _MODEL_FILES[self.packaged.flavour])


def _replace(texts: Mapping[Path, bytes], before: Mapping[Path, bytes | None]) -> None:
    """Write files, each whole; where one fails, all are as they were before."""
    try:
        for path, text in texts.items():
            write_whole(path, text)
    except BaseException:
        for path, content in before.items():
            if content is None:
                path.unlink(missing_ok=True)
            elif path.read_bytes() != content:
                write_whole(path, content)
        raise


def next_version(folder: Path, wanted: int | None) -> int:
    """Return the number of the new version: above all that are there, for Triton serves the largest.

    Raises:
        UsageError: the wanted one is taken, or would not be served.
    """
    taken = [int(p.name) for p in folder.iterdir() if p.name.isdecimal()] if folder.exists() else []
    latest = max(taken, default=0)
    if wanted is None:
        return latest + 1
    if wanted in taken:
        raise UsageError(f"{folder} has a version {wanted} already", expected=f"{latest + 1} or above")
    if wanted < latest:
        raise UsageError(
            f"version {wanted} of {folder} would not be served, for version {latest} is there",
            expected=f"{latest + 1} or above",
        )
    return wanted


def check_existing(path: Path, config: str, *, force: bool) -> None:
    """Refuse to replace a configuration that people wrote, or one of another interface, unless forced.

    Raises:
        UsageError: the one at ``path`` is such, or cannot be read.
    """
    if force or not path.exists():
        return
    try:
        old, new = interface(path.read_text("utf-8")), interface(config)
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} cannot be read: {error}", expected="a model configuration", hint="--force") from error
    if old is None:
        raise UsageError(
            f"{path} was not written by deploycli, and would be replaced",
            expected="a model of this tool's",
            hint="another --name, or --force",
        )
    if new is not None and (differences := new.differences(old)):
        raise UsageError(
            f"{path} describes another interface; the new one has {'; '.join(differences)}",
            expected="the inputs and outputs that clients of the model know",
            hint="another --name, or --force, after which the older versions no longer fit their configuration",
        )
