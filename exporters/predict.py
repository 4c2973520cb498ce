"""``deploycli predict``: what a bundle answers to pictures, by any of its files that runs here."""

from __future__ import annotations

import io
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from deploycli.exporters.bundle.bundle import Engine
from deploycli.exporters.bundle.files import write_whole
from deploycli.exporters.data.samples import open_samples
from deploycli.exporters.derive import exported_file
from deploycli.exporters.precision.simulate import open_runtime
from deploycli.exporters.tensorrt.runtime import check_host, open_engine
from deploycli.exporters.verification.on_samples import class_output
from deploycli.models.errors import UsageError
from deploycli.models.spec import TOP_OUTPUTS

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    import numpy.typing as npt

    from deploycli.exporters.bundle.bundle import Bundle, ModelFile
    from deploycli.exporters.data.samples import Samples
    from deploycli.exporters.runtime.runtimes import Runtime
    from deploycli.models.spec import ModelSpec

    Arrays = Mapping[str, npt.NDArray[Any]]

BATCH = 8
"""Samples of a run, where the file takes any number."""


@dataclass(frozen=True)
class PredictOptions:
    """What to run, on what.

    Attributes:
        images: pictures, and folders of them.
        inputs: a ``.npz`` or ``.npy`` file of prepared samples, in their place.
        artifact: the file of the bundle: its name, or a precision; None takes the exported graph.
        top: how many classes of each.
        allow_engine_host_code: run a version compatible engine, which holds code for the CPU.
    """

    images: tuple[Path, ...] = ()
    inputs: Path | None = None
    artifact: str | None = None
    top: int = 5
    allow_engine_host_code: bool = False


@dataclass(frozen=True)
class Guess:
    """One class that a sample may be of.

    Attributes:
        index: its number.
        name: what it is called, or an empty string.
        probability: its share of the softmax over all classes.
    """

    index: int
    name: str
    probability: float


@dataclass(frozen=True)
class Prediction:
    """What a file answered.

    Attributes:
        artifact: the file.
        runtime: what ran it.
        samples: the names of the pictures, or the places in the data.
        guesses: the best classes of each sample, best first; empty where no output names classes.
        outputs: name -> [samples, ...].
        skipped: names of the pictures that could not be read.
    """

    artifact: str
    runtime: str
    samples: tuple[str, ...]
    guesses: tuple[tuple[Guess, ...], ...]
    outputs: Arrays = field(repr=False)
    skipped: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Return it as JSON values; of outputs that name no classes the shapes alone."""
        guesses = self.guesses or ((),) * len(self.samples)
        return {
            "artifact": self.artifact,
            "runtime": self.runtime,
            "samples": [
                {"name": name, "classes": [asdict(guess) for guess in best]}
                for name, best in zip(self.samples, guesses, strict=True)
            ],
            "outputs": {name: list(array.shape) for name, array in self.outputs.items()},
            "skipped": list(self.skipped),
        }

    def save(self, path: Path) -> None:
        """Write the outputs, and the names of the samples as ``samples``, as a ``.npz`` file.

        Raises:
            UsageError: an output has that name.
            EnvironmentUnsuitable: it cannot be written.
        """
        if "samples" in self.outputs:
            raise UsageError("an output is called 'samples', as the names of the samples are", hint="without -o")
        data = io.BytesIO()
        np.savez(data, **self.outputs, samples=np.array(self.samples))  # type: ignore[arg-type]  # numpy's own stubs
        write_whole(path, data.getvalue())


def predict(
    bundle: Bundle, options: PredictOptions, *, progress: Callable[[str, int, int], None] = lambda _l, _d, _t: None
) -> Prediction:
    """Run a file of a bundle.

    Args:
        bundle: an opened bundle.
        options: what, on what.
        progress: called with a label, what is done and how much there is.

    Raises:
        UsageError: no such file; nothing to run it on, or what does not fit; nobody said how pictures become inputs.
        EnvironmentUnsuitable: an engine cannot run here.
        IntegrityError: it is not what was recorded.
        ExportError: the file cannot be loaded, or does not run.
    """
    if bool(options.images) == (options.inputs is not None):
        raise UsageError(
            "nothing to run it on" if not options.images else "both pictures and --inputs were given",
            expected="pictures, or --inputs FILE.npz",
        )
    manifest = bundle.manifest
    file = _chosen(bundle, options.artifact)
    samples = _samples(bundle, options)
    names: list[str] = []
    skipped: list[str] = []
    answers: list[Arrays] = []
    with _opened(file, allow_host_code=options.allow_engine_host_code) as runtime:
        read = 0
        for batch in samples.batches(file.batches[1] if file.batches else BATCH):
            progress(f"running {file.name}", read, len(samples.names))
            names += [name for name in samples.names[read : batch.stop] if name not in batch.skipped]
            skipped += batch.skipped
            read = batch.stop
            if len(next(iter(batch.inputs.values()))):
                answers.append(_run(runtime, batch.inputs, file.batches))
    if not answers:
        raise UsageError(f"none of {samples.description} could be read", expected="one or more")
    outputs = {name: np.concatenate([answer[name] for answer in answers]) for name in answers[0]}
    guesses = _guesses(manifest.spec, outputs, manifest.labels, options.top)
    return Prediction(file.name, runtime.name, tuple(names), guesses, outputs, tuple(skipped))


def _chosen(bundle: Bundle, wanted: str | None) -> ModelFile:
    if wanted is None:
        return exported_file(bundle)
    files: list[ModelFile] = [*bundle.onnx_files(), *bundle.engines()]
    found = [file for file in files if wanted in (file.name, Path(file.name).name)]
    found = found or [file for file in bundle.onnx_files() if file.precision == wanted]
    if len(found) != 1:
        raise UsageError(
            f"{bundle.path} has {'no' if not found else 'several'} {wanted!r}",
            expected=", ".join(file.name for file in files),
            hint="--artifact NAME",
        )
    return found[0]


def _samples(bundle: Bundle, options: PredictOptions) -> Samples:
    """Return the data, in the order in which they were named; a folder stands for the pictures in it."""
    manifest = bundle.manifest
    inputs, recipe = manifest.spec.inputs, manifest.preprocessing
    if options.inputs is not None:
        return open_samples(options.inputs, inputs, recipe)
    from deploycli.exporters.data.pictures import PictureFiles, image_files  # needs Pillow

    files = [file for path in options.images for file in (image_files(path) if path.is_dir() else (path,))]
    return PictureFiles(files, tuple(map(str, files)), f"{len(files)} pictures", inputs, recipe)


def _opened(file: ModelFile, *, allow_host_code: bool) -> Runtime:
    if isinstance(file, Engine):
        check_host(file.sidecar, allow_host_code=allow_host_code)
        return open_engine(file.path.parent, file.sidecar, allow_host_code=allow_host_code)
    return open_runtime(file.path)


def _run(runtime: Runtime, inputs: Arrays, batches: tuple[int, int] | None) -> Arrays:
    """Run a few samples; a file of more at least is given copies of the last one, too."""
    held = len(next(iter(inputs.values())))
    least = batches[0] if batches else 1
    order = np.minimum(np.arange(max(held, least)), held - 1)
    outputs = runtime.run({name: array[order] for name, array in inputs.items()})
    return {name: np.asarray(array)[:held] for name, array in outputs.items()}


def _guesses(spec: ModelSpec, outputs: Arrays, labels: Sequence[str], top: int) -> tuple[tuple[Guess, ...], ...]:
    """Return the best classes of each sample; none where no output names classes."""
    ending = spec.ending
    if ending is not None and ending.kind == "topk":
        scores, classes = (outputs[name] for name in TOP_OUTPUTS)  # [B, k]
    else:
        found = class_output(outputs)
        if found is None:
            return ()
        values = outputs[found.name].astype(np.float64)  # [B, classes]
        if ending is None:
            values = np.exp(values - values.max(axis=1, keepdims=True))
            values /= values.sum(axis=1, keepdims=True)
        classes = np.argsort(-values, axis=1, kind="stable")[:, :top]  # [B, top]
        scores = np.take_along_axis(values, classes, axis=1)
    return tuple(
        tuple(
            Guess(int(index), labels[index] if index < len(labels) else "", float(score))
            for index, score in list(zip(row, shares, strict=True))[:top]
        )
        for row, shares in zip(classes, scores, strict=True)
    )
