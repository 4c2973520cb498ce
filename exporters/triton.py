"""A Triton model repository from a verified bundle.

    <repository>/<model>/config.pbtxt
                         labels.txt              with labels
                         1/model.onnx [+ data]   or model.plan

What was not verified, failed, changed since, has random weights or was calibrated on random data is refused; forced, the
configuration says so. Files are copied, and their hashes are those of the copied bytes. A new model appears whole, by
one rename. So does a new version of an existing one; then its labels and its configuration are replaced, and all is put
back where that fails. Of two that package the same model at once each makes a version of its own or is refused, and the
configuration is the later one's.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import secrets
import shutil
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from exporters.artifact import MANIFEST_NAME
from exporters.atomic import replaced_folder
from exporters.precision.whole_file import write_whole
from exporters.proof import Proof
from exporters.servable import engine_candidates, onnx_candidates
from exporters.triton_config import BACKENDS, CONFIG_NAME, LABELS_NAME, MARK, Options, config_text, interface
from models.errors import EnvironmentUnsuitable, IntegrityError, NumericsError, UsageError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from exporters.artifact import FileRecord
    from exporters.bundle import Bundle
    from exporters.proof import Verdict
    from exporters.servable import Candidate, Servable

DEFAULT_MAX_BATCH = 32
"""Of a file that takes any batch."""

_MODEL_FILES = {"onnx": "model.onnx", "tensorrt": "model.plan"}
_BEST_FIRST = ("int8", "fp16", "bf16", "fp32")
_MAKE = {"fp16": "deploycli cast", "bf16": "deploycli cast", "int8": "deploycli quantize"}
_CHUNK = 1 << 20  # bytes


@dataclass(frozen=True)
class Packaged:
    """A version of a model in a repository.

    Attributes:
        bundle: the folder it came from.
        path: the folder of the version.
        name: of the model.
        version: its number.
        flavour: ``onnx`` or ``tensorrt``.
        precision: of the file.
        artifact: the file of the bundle.
        sha256: of that file.
        size: bytes, external data included.
        max_batch_size: the largest batch, or 0 where the file has a fixed one.
        verified: ``ok``, or what the proof says instead.
        forced: why it is not for release; empty unless that was forced.
        notes: what the user should know.
    """

    bundle: str
    path: str
    name: str
    version: int
    flavour: str
    precision: str
    artifact: str
    sha256: str
    size: int
    max_batch_size: int
    verified: str
    forced: tuple[str, ...]
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Return it as JSON values."""
        return asdict(self)


@dataclass(frozen=True)
class Delivery:
    """A version that may be written: everything was checked, nothing was written yet.

    Attributes:
        bundle: where the files come from.
        folder: of the model.
        servable: what is copied.
        config: text of config.pbtxt.
        labels: text of labels.txt, or None.
        packaged: what it will be.
    """

    bundle: Bundle
    folder: Path
    servable: Servable
    config: str
    labels: str | None
    packaged: Packaged

    def write(self) -> Packaged:
        """Write the version.

        Raises:
            IntegrityError: a file of the bundle changed meanwhile.
            UsageError: another process wrote this version meanwhile.
            EnvironmentUnsuitable: the repository cannot be written, or the disk is full.
        """
        number = str(self.packaged.version)
        texts = {CONFIG_NAME: self.config} | ({} if self.labels is None else {LABELS_NAME: self.labels})
        try:
            if self.folder.exists():
                with replaced_folder(self.folder / number, replace=False) as staged:
                    self._copy(staged)
                self._publish({self.folder / name: text.encode() for name, text in texts.items()})
            else:
                with replaced_folder(self.folder, replace=False) as staged:
                    (staged / number).mkdir()
                    self._copy(staged / number)
                    for name, text in texts.items():
                        (staged / name).write_bytes(text.encode())
        except FileExistsError as error:
            raise UsageError(
                f"{error.filename} appeared while it was written", expected="nobody else", hint="package it again"
            ) from error
        except OSError as error:
            raise EnvironmentUnsuitable(
                f"cannot write {self.folder}: {error.strerror or error}",
                expected="a folder with write permission and space for the model",
                hint="free some space, or name another folder with --triton",
            ) from error
        return self.packaged

    def _copy(self, folder: Path) -> None:
        """Copy the model under Triton's name; external data keeps its own, which the model refers to."""
        _copy(self.bundle.path, self.servable.file, folder / _MODEL_FILES[self.packaged.flavour])
        for record in self.servable.external:
            _copy(self.bundle.path, record, folder / record.path)

    def _publish(self, files: dict[Path, bytes]) -> None:
        """Replace labels and configuration beside the new version; where that fails, take it all back."""
        before = {path: path.read_bytes() if path.is_file() else None for path in files}
        try:
            for path in reversed(files):  # labels first: the configuration names them
                write_whole(path, files[path])
        except BaseException:
            version_folder = Path(self.packaged.path)
            hidden = version_folder.with_name(f".{version_folder.name}.tmp-{secrets.token_hex(4)}")
            version_folder.rename(hidden)
            shutil.rmtree(hidden, ignore_errors=True)
            for path, content in before.items():
                if content is None:
                    path.unlink(missing_ok=True)
                elif path.read_bytes() != content:
                    write_whole(path, content)
            raise


def package(bundle: Bundle, root: Path, options: Options | None = None) -> Packaged:
    """Write a version of a model into a Triton repository; see `prepare` for arguments and errors."""
    return prepare(bundle, root, options).write()


def prepare(bundle: Bundle, root: Path, options: Options | None = None) -> Delivery:
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
    options = options or Options()
    _check_options(options)
    name = options.name or bundle.path.resolve().name
    folder = _place(root, name)
    proof = Proof.load(bundle)
    candidate = _choose(bundle, proof, options)
    verdict = proof.verdict_of(candidate.file, *candidate.external)
    forced = _not_for_release(bundle, candidate, verdict)
    if forced and not options.force:
        raise _refusal(bundle, candidate, verdict, forced)
    servable = candidate.read()
    max_batch, notes = _max_batch(servable, options)
    label_output, labels = _labels(servable, options.labels)
    number = _version(folder, options.version)
    parameters = _provenance(bundle, servable, number, proof, verdict, forced)
    if tolerances := parameters.get("deploycli_proof_tolerances"):
        notes.append(f"verified with a looser budget: {tolerances}")
    if needs := servable.facts.get("tensorrt"):
        notes.append(f"the server's TensorRT must be {needs}, its GPU {servable.facts['gpu']}")
    config = config_text(
        name,
        servable,
        max_batch,
        options,
        label_output=label_output,
        example={spec.name: spec.shape for spec in bundle.manifest.spec.inputs},
        parameters=parameters,
        warnings=[f"NOT FOR RELEASE: {why}" for why in forced],
    )
    _check_existing(folder / CONFIG_NAME, config, options)
    packaged = Packaged(
        str(bundle.path),
        str(folder / str(number)),
        name,
        number,
        options.flavour,
        servable.precision,
        servable.file.path,
        servable.file.sha256,
        sum(record.size for record in (servable.file, *servable.external)),
        max_batch,
        verdict.status,
        forced,
        tuple(notes),
    )
    return Delivery(bundle, folder, servable, config, labels, packaged)


# --- what


def _check_options(options: Options) -> None:
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


def _choose(bundle: Bundle, proof: Proof, options: Options) -> Candidate:
    engines = options.flavour == "tensorrt"
    found = engine_candidates(bundle) if engines else onnx_candidates(bundle)
    if options.engine is not None:
        fitting = [c for c in found if Path(c.file.path).name == options.engine]
    else:
        fitting = [c for c in found if c.precision == (options.precision or _best(found, proof, engines=engines))]
    if options.precision is not None:
        fitting = [c for c in fitting if c.precision == options.precision]
    names = ", ".join(Path(c.file.path).name if engines else c.file.path for c in found)
    if not fitting:
        wanted = options.engine or options.precision or "fp32"
        make = "deploycli build-trt" if engines else _MAKE.get(wanted, "deploycli export")
        raise UsageError(f"{bundle.path} holds no {wanted}", expected=names, hint=f"one of these, or {make}")
    if engines and len(fitting) > 1:
        raise UsageError(
            f"{bundle.path} holds {len(fitting)} engines of that precision", expected="one", hint=f"--engine: {names}"
        )
    return fitting[0]


def _best(found: Sequence[Candidate], proof: Proof, *, engines: bool) -> str:
    """Return the precision to take where none was asked for: of engines the smallest that is fit for release."""
    if not engines:
        return "fp32"
    fit = [c for c in found if not c.unreleasable and proof.verdict_of(c.file, *c.external).passed]
    return min((c.precision for c in fit or found), key=_BEST_FIRST.index)


def _not_for_release(bundle: Bundle, candidate: Candidate, verdict: Verdict) -> tuple[str, ...]:
    weights = bundle.manifest.weights
    why = [] if verdict.passed else [f"{verdict.status}: {verdict.reason}"]
    if weights.source == "random":
        why.append(f"random weights ({weights.describe()})")
    if candidate.unreleasable:
        why.append(candidate.unreleasable)
    return tuple(why)


def _refusal(bundle: Bundle, candidate: Candidate, verdict: Verdict, why: Sequence[str]) -> NumericsError | UsageError:
    kind = NumericsError if verdict.status == "failed" else UsageError
    again = f"deploycli verify {bundle.path.name}"
    real = "export it with --checkpoint or --pretrained, quantise it on real data"
    return kind(
        f"{bundle.path}/{candidate.file.path} is not for release: {'; '.join(why)}",
        expected="a verified file, of trained weights, calibrated on data",
        hint=f"{real if verdict.passed else again}; or --force, which the configuration then says",
    )


def _max_batch(servable: Servable, options: Options) -> tuple[int, list[str]]:
    """Return Triton's max_batch_size, and notes.

    A size above 0 means a variable leading axis of every tensor. A file with a fixed batch has size 0, and its dims say
    the batch.
    """
    asked = options.max_batch, options.preferred_batch, options.queue_delay
    if not servable.batched:
        if asked != (None, (), None):
            raise UsageError(
                f"{servable.file.path} has no variable batch axis, so a server cannot form batches of it",
                expected="no --max-batch, --preferred-batch or --queue-delay",
                hint="export it with --batch dynamic",
            )
        return 0, ["the file has a fixed batch: clients send it whole (max_batch_size 0)"]
    if servable.smallest_batch > 1:
        raise UsageError(
            f"{servable.file.path} takes no batch below {servable.smallest_batch}",
            expected="an engine that takes 1, which a server may always send",
            hint="build it again with a profile from batch 1",
        )
    largest = servable.largest_batch
    size = options.max_batch or largest or DEFAULT_MAX_BATCH
    if largest is not None and size > largest:
        raise UsageError(
            f"--max-batch {size}, but {servable.file.path} takes {largest} at most", hint=f"--max-batch {largest}"
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
    # The first output [B, classes] of more than one class, as in `exporters.verify_samples.class_output`.
    output = next((t for t in servable.outputs if len(t.shape) == 2 and t.shape[1] > 1), None)
    if output is None:
        raise UsageError(f"{servable.file.path} has no output [batch, classes] to label", hint="leave out --labels")
    try:
        text = path.read_text("utf-8-sig")
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


def _provenance(
    bundle: Bundle, servable: Servable, number: int, proof: Proof, verdict: Verdict, forced: Sequence[str]
) -> dict[str, str]:
    manifest = bundle.manifest
    judged = proof.judged.get(servable.file.path) if verdict.status in ("ok", "failed") else None
    parameters = {
        MARK: _tool_version(),
        "deploycli_model_version": str(number),
        "deploycli_bundle": bundle.path.resolve().name,
        "deploycli_model": f"{manifest.spec.name} ({manifest.spec.family})",
        "deploycli_artifact": servable.file.path,
        "deploycli_precision": servable.precision,
        "deploycli_sha256": servable.file.sha256,
        **{f"deploycli_sha256 {record.path}": record.sha256 for record in servable.external},
        **{f"deploycli_{key}": text for key, text in servable.facts.items()},
        "deploycli_weights": manifest.weights.describe(),
        "deploycli_proof": verdict.status,
    }
    if judged is not None:
        parameters |= {
            "deploycli_proof_reference": proof.reference,
            "deploycli_proof_time": proof.time,
            "deploycli_proof_checks": ", ".join(judged.checks),
            "deploycli_proof_runtime": ", ".join(judged.runtimes),
        }
        if judged.tolerances:
            bounds = (f"{name} {bound:.3g}" for name, bound in judged.tolerances.items())
            parameters["deploycli_proof_tolerances"] = ", ".join(bounds)
    if manifest.preprocessing is not None:
        parameters["deploycli_preprocessing"] = json.dumps(manifest.preprocessing.to_json())
    if forced:
        parameters["deploycli_not_for_release"] = "; ".join(forced)
    return parameters


# --- where


def _place(root: Path, name: str) -> Path:
    """Return the model's folder, where one may be made or already is."""
    if name in (".", "..") or name[:1] in ("", ".", " ") or not name.isprintable() or {*name} & {*"/\\"}:
        raise UsageError(
            f"{name!r} cannot name a model", expected="a folder's name, not beginning with a dot", hint="--name NAME"
        )
    folder = root / name
    if (root / MANIFEST_NAME).exists():
        wrong, found = root, "a bundle"
    elif root.exists() and not root.is_dir():
        wrong, found = root, "a file"
    elif folder.is_symlink() or (folder / CONFIG_NAME).is_symlink():
        wrong, found = folder, "a symbolic link, or holds one"
    elif folder.exists() and not folder.is_dir():
        wrong, found = folder, "a file"
    elif folder.exists() and any(folder.iterdir()) and not (folder / CONFIG_NAME).is_file():
        wrong, found = folder, f"a folder without {CONFIG_NAME}, so no model of a repository"
    else:
        return folder
    raise UsageError(
        f"{wrong} is {found}",
        expected="nothing there, or a model to add a version to",
        hint="another --triton or --name",
    )


def _version(folder: Path, wanted: int | None) -> int:
    """Return the number of the new version: above all that are there, for Triton serves the largest."""
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


def _check_existing(path: Path, config: str, options: Options) -> None:
    """Refuse to replace a configuration that people wrote, or one of another interface, unless forced."""
    if options.force or not path.exists():
        return
    try:
        old, new = interface(path.read_text("utf-8")), interface(config)
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} cannot be read: {error}", expected="a model configuration", hint="--force") from error
    if not old.ours:
        raise UsageError(
            f"{path} was not written by deploycli, and would be replaced",
            expected="a model of this tool's",
            hint="another --name, or --force",
        )
    if differences := new.differences(old):
        raise UsageError(
            f"{path} describes another interface; the new one has {'; '.join(differences)}",
            expected="the inputs and outputs that clients of the model know",
            hint="another --name, or --force, after which the older versions no longer fit their configuration",
        )


def _copy(folder: Path, record: FileRecord, target: Path) -> None:
    """Copy a file, and check that what was copied is what was recorded."""
    target.parent.mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256()
    with (folder / record.path).open("rb") as source, target.open("xb") as copy:
        while chunk := source.read(_CHUNK):
            digest.update(chunk)
            copy.write(chunk)
        copy.flush()
        os.fsync(copy.fileno())
    if digest.hexdigest() != record.sha256:
        raise IntegrityError(
            f"{folder / record.path} changed while it was packaged: sha256 {digest.hexdigest()}",
            expected=f"sha256 {record.sha256}",
            hint="package it again",
        )


def _tool_version() -> str:
    try:
        return version("deploycli")
    except PackageNotFoundError:  # run from a source tree
        return "unknown"
