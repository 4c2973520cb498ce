"""A Triton model repository from a verified bundle.

    <repository>/<model>/config.pbtxt
                         labels.txt              with labels
                         1/model.onnx [+ data]   or model.plan

What was not verified, failed, changed since, has random weights or was calibrated on random data is refused; forced,
the configuration says so. Files are copied, and their hashes are those of the copied bytes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from deploycli.exporters.bundle.manifest import version_of
from deploycli.exporters.serving.release import (
    choose,
    names,
    not_for_release,
    place,
    provenance,
    smallest_proven,
)
from deploycli.exporters.serving.servable import servable, served_engines
from deploycli.exporters.serving.triton_config import CONFIG_NAME, MARK, TritonOptions, config_text
from deploycli.exporters.serving.triton_repository import Delivery, PackagedVersion, check_existing, next_version
from deploycli.models.errors import UsageError
from deploycli.models.files import text_of

if TYPE_CHECKING:
    from pathlib import Path

    from deploycli.exporters.bundle.bundle import Bundle, Engine, OnnxFile
    from deploycli.exporters.serving.servable import Servable

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
    if path is None:
        return "", None
    # The first output [B, classes] of more than one class, as in
    # `deploycli.exporters.verification.on_samples.class_output`.
    output = next((t for t in servable.outputs if len(t.shape) == 2 and t.shape[1] > 1), None)
    if output is None:
        raise UsageError(f"{servable.file.name} has no output [batch, classes] to label", hint="leave out --labels")
    try:
        text = text_of(path, "utf-8-sig")
    except (OSError, ValueError) as error:
        raise UsageError(f"the labels {path} cannot be read: {error}", expected="a text file in UTF-8") from error
    names = [line.strip() for line in text.removesuffix("\n").split("\n")]  # not splitlines: Triton reads lines so
    if "" in names:
        raise UsageError(f"{path} has an empty line {names.index('') + 1}", expected="one class name a line")
    if len(names) != output.shape[1]:
        raise UsageError(
            f"{path} names {len(names)} classes", expected=f"{output.shape[1]}, which {output.name!r} has, one a line"
        )
    return output.name, "\n".join(names) + "\n"
