"""A bundle on disk: open it and check every hash, list its model files, find all below a folder, write one whole."""

from __future__ import annotations

import errno
import os
import re
import shutil
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from deploycli.exporters.bundle.engine import ENGINES, sidecars
from deploycli.exporters.bundle.files import interrupted, locked, recover, replaced_folder, unreadable
from deploycli.exporters.bundle.manifest import MANIFEST_NAME, FileRecord, Manifest
from deploycli.exporters.bundle.verification import Verification
from deploycli.models.errors import DeployError, EnvironmentUnsuitable, IntegrityError, UsageError
from deploycli.models.sources import FACTORY

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Iterator

    from deploycli.exporters.bundle.engine import Sidecar
    from deploycli.exporters.bundle.manifest import Artifact
    from deploycli.exporters.bundle.verification import Verdict
    from deploycli.models.spec import ModelSpec

_DISK_ERRORS = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS})
_FULL_BELOW = 1 << 20  # bytes left on a disk that counts as full
_LONGEST_NAME = 200  # file systems end at 255 bytes, and hidden siblings have longer names


@dataclass(frozen=True)
class Bundle:
    """A folder that holds model files, golden arrays and their manifest.

    Attributes:
        path: the folder.
        manifest: what it holds.
        gone: what the bundle that it replaced held and this one does not; known to who wrote it.
    """

    path: Path
    manifest: Manifest
    gone: tuple[str, ...] = field(default=(), compare=False)

    @contextmanager
    def held(self) -> Iterator[None]:
        """Let nobody replace the folder inside the block, which would take away what is just written into it."""
        with locked(self.path.resolve().parent):
            yield

    @property
    def golden(self) -> Path:
        """Where the golden arrays are."""
        return self.path / self.manifest.golden.path

    @classmethod
    def open(cls, path: Path) -> Bundle:
        """Open a bundle, and compare the SHA-256 of every recorded file.

        Where a replacement was killed half-way, the old one is put back first.

        Args:
            path: the bundle's folder.

        Raises:
            UsageError: no bundle, or one of another schema version.
            IntegrityError: the manifest is malformed, or a file is missing or has changed.
            EnvironmentUnsuitable: the folder cannot be read.
        """
        try:
            recover(path)
            manifest = Manifest.read(path)
            for record in manifest.records():
                record.check(path)
        except OSError as error:
            raise unreadable(error.filename or path, error, "folder") from error
        return cls(path, manifest)

    def onnx_files(self) -> Iterator[OnnxFile]:
        """Yield the ONNX files, the exported one first."""
        verification = Verification.load(self.path)
        for artifact in self.manifest.artifacts:
            yield OnnxFile.of(self, artifact, verification)

    def engines(self) -> Iterator[Engine]:
        """Yield the engines, by name.

        Raises:
            IntegrityError: a plan without a sidecar, or a sidecar that is malformed.
            EnvironmentUnsuitable: the folder of engines cannot be read.
        """
        verification = Verification.load(self.path)
        for sidecar in sidecars(self.path / ENGINES):
            yield Engine.of(self, sidecar, verification)

    def onnx_file(self, name: str) -> OnnxFile | None:
        """Return the ONNX file of that name."""
        return next((file for file in self.onnx_files() if file.name == name), None)


@dataclass(frozen=True, eq=False)
class ModelFile:
    """A file of a bundle that can be run, judged or shipped: an `OnnxFile` or an `Engine`.

    Attributes:
        bundle: whose it is.
        record: the file as it was recorded.
        external: the same of its external data.
        precision: of `deploycli.exporters.bundle.manifest.PRECISIONS`: what it was made as, and the key of its
            budget.
        batches: the smallest and the largest batch that it takes, which are equal where its batch is fixed; None is
            any.
        unreleasable: why it must not be shipped, or an empty string.
        verification: the last one of the bundle.
    """

    bundle: Bundle = field(repr=False)
    record: FileRecord
    external: tuple[FileRecord, ...]
    precision: str
    batches: tuple[int, int] | None
    unreleasable: str
    verification: Verification = field(repr=False)

    @property
    def name(self) -> str:
        """Its path inside the bundle."""
        return self.record.path

    @property
    def path(self) -> Path:
        """Where it is."""
        return self.bundle.path / self.record.path

    @property
    def size(self) -> int:
        """Bytes, external data included."""
        return sum(record.size for record in (self.record, *self.external))

    def copy(self, folder: Path, name: str) -> None:
        """Copy the file under a name; external data keeps its own, which the model refers to.

        Raises:
            IntegrityError: a file changed since it was recorded.
            OSError: it cannot be written.
        """
        self.record.copy(self.bundle.path, folder / name)
        for record in self.external:
            record.copy(self.bundle.path, folder / record.path)

    @property
    def verdict(self) -> Verdict:
        """Whether it was verified, or why not."""
        return self.verification.verdict(self.record, *self.external)


@dataclass(frozen=True, eq=False)
class OnnxFile(ModelFile):
    """An ONNX file of a bundle.

    Attributes:
        artifact: what the manifest says of it.
    """

    artifact: Artifact = field(repr=False)

    @classmethod
    def of(cls, bundle: Bundle, artifact: Artifact, verification: Verification) -> OnnxFile:
        """Return the file of an artifact."""
        batches = None if artifact.batch is None else (artifact.batch, artifact.batch)
        return cls(
            bundle,
            artifact.file,
            artifact.external,
            artifact.precision,
            batches,
            artifact.unreleasable,
            verification,
            artifact,
        )


@dataclass(frozen=True, eq=False)
class Engine(ModelFile):
    """An engine of a bundle: a plan and its sidecar.

    Attributes:
        sidecar: what is known of it.
    """

    sidecar: Sidecar = field(repr=False)

    @classmethod
    def of(cls, bundle: Bundle, sidecar: Sidecar, verification: Verification) -> Engine:
        """Return the engine of a sidecar."""
        record = FileRecord(f"{ENGINES}/{sidecar.plan}", sidecar.sha256, sidecar.size)
        precision, batches, unreleasable = sidecar.precision, sidecar.batches, sidecar.unreleasable
        return cls(bundle, record, (), precision, batches, unreleasable, verification, sidecar)

    @property
    def stale(self) -> str:
        """Say where it was built from another graph than the bundle holds now; an empty string where it was not."""
        onnx = self.sidecar.onnx
        artifact = self.bundle.manifest.artifact(onnx)
        if artifact is None:
            return f"was built from {onnx}, which the bundle does not hold"
        if artifact.sha256 == self.sidecar.onnx_sha256:
            return ""
        return f"was built from another {onnx} than the bundle holds now"

    def check(self) -> None:
        """Compare the plan with its sidecar, without opening it in TensorRT.

        Raises:
            IntegrityError: it is not what was recorded.
        """
        self.sidecar.check_file(self.path.parent)


def unreleasable(files: Iterable[ModelFile]) -> tuple[str, ...]:
    """Name the files that must not be shipped, and why."""
    return tuple(f"{file.name}: {file.unreleasable}" for file in files if file.unreleasable)


def find_bundles(root: Path) -> list[Path]:
    """Return the folders directly below ``root`` that are bundles, by name.

    Raises:
        UsageError: there is none.
        EnvironmentUnsuitable: the folder cannot be read.
    """
    try:
        if root.is_dir():
            for target in interrupted(root):
                recover(target)
            found = sorted(path.parent for path in root.glob(f"[!.]*/{MANIFEST_NAME}"))
            if found:
                return found
    except OSError as error:
        raise unreadable(error.filename or root, error, "folder") from error
    raise UsageError(
        f"there is no bundle in {root}",
        expected="folders that `deploycli export` wrote",
        hint="export a model first (deploycli export swin_t --fmt onnx), or name the folder with --output",
    )


class Draft:
    """A bundle, or a file more in one, while it is written.

    Args:
        folder: for the files.
        base: manifest of the bundle that is extended, or None.

    Attributes:
        folder: for the files.
        manifest: what they are; who writes them sets it, or calls `add`.
    """

    def __init__(self, folder: Path, base: Manifest | None = None) -> None:
        self.folder = folder
        self.manifest: Manifest | None = None
        self._base = base
        self._bundle: Bundle | None = None

    def add(self, artifact: Artifact) -> None:
        """Say which artifact was written for a bundle that is extended."""
        assert self._base is not None, "a new bundle has a manifest of its own"
        self.manifest = replace(self._base, artifacts=(artifact,))

    @property
    def bundle(self) -> Bundle:
        """The bundle that it has become, once the block has ended."""
        assert self._bundle is not None, "it is not written yet"
        return self._bundle

    def written(self, bundle: Bundle) -> None:
        """Set the bundle that it has become."""
        self._bundle = bundle


@contextmanager
def new_bundle(root: Path, name: str, *, model: ModelSpec | None = None) -> Iterator[Draft]:
    """Yield a draft that becomes the bundle ``root / name`` when the block ends, or nothing where it raises.

    An existing bundle is replaced whole. Where the exported graph is that of the bundle which is replaced, byte for
    byte, all that was made from it stays: other precisions, engines, reports.

    Args:
        root: folder of bundles; made where it is missing.
        name: name of the bundle.
        model: what the bundle is of: one of another model is not replaced. None replaces any.

    Raises:
        UsageError: the name is no plain file name, or something that is no bundle, or one of another model, stands in
            its place.
        EnvironmentUnsuitable: the folder cannot be written, or the disk is full.
    """
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._+-]*", name) or len(name) > _LONGEST_NAME:
        raise UsageError(
            f"{name if len(name) <= _LONGEST_NAME else name[:20] + '...'!r} cannot name a bundle",
            expected=f"at most {_LONGEST_NAME} letters, digits, '.', '_', '+', '-', not starting with a sign",
            hint="--name NAME",
        )
    target = root / name

    def check() -> None:
        _refuse_foreign(target)
        if model is not None:
            _refuse_other_model(target, model)

    def merge(manifest: Manifest) -> Manifest | None:
        check()  # somebody else may have put it there meanwhile
        derived = _derived(target, manifest)
        return None if derived is None else replace(manifest, artifacts=(*manifest.artifacts, *derived))

    with _disk_errors(target):
        if root.exists() and not root.is_dir():
            raise UsageError(f"{root} is no folder", expected="a folder of bundles", hint="another --output")
        check()
        with _draft(target, merge) as draft:
            yield draft


@contextmanager
def extend_bundle(bundle: Bundle) -> Iterator[Draft]:
    """Yield a draft whose artifact is added to a bundle, or replaces the one of the same file name, or nothing is done.

    What else is in the folder is kept, and so is what others added to it meanwhile.

    Args:
        bundle: an opened bundle.

    Raises:
        IntegrityError: meanwhile another model was exported in its place.
        EnvironmentUnsuitable: the folder cannot be written, or the disk is full.
    """

    def merge(made: Manifest) -> Manifest:
        (artifact,) = made.artifacts
        now = Manifest.read(bundle.path)  # others may have added to it since it was opened
        if now.artifact(artifact.source) != bundle.manifest.artifact(artifact.source):
            raise IntegrityError(
                f"{bundle.path / artifact.source} was replaced while {artifact.file.path} was made from it",
                expected="the bundle as it was",
                hint="run this command again",
            )
        others = tuple(a for a in now.artifacts if a.file.path != artifact.file.path)
        return replace(now, artifacts=(*others, artifact))

    path = bundle.path
    if path.is_symlink() or path.name in ("", ".."):  # neither has a name that could be given to another folder
        path = path.resolve()
    with _disk_errors(path), _draft(path, merge, bundle.manifest) as draft:
        yield draft


@contextmanager
def _draft(target: Path, merge: Callable[[Manifest], Manifest | None], base: Manifest | None = None) -> Iterator[Draft]:
    """Yield a draft that takes the place of what is there.

    Args:
        target: the bundle.
        merge: is given the manifest of what was written while nobody else replaces the bundle, and returns the one that
            it will have; None where nothing of the old bundle stays.
        base: the manifest of the bundle that is extended.
    """
    left_out: set[str] = set()

    def settle(folder: Path) -> None:
        assert draft.manifest is not None
        merged = merge(draft.manifest)
        if merged is not None:
            left_out.update({MANIFEST_NAME, *_recorded(target)} - {record.path for record in merged.records()})
            _take_over(target, folder, left_out)
        manifest = merged or draft.manifest
        for record in manifest.records():
            record.check(folder, content=False)
        (folder / MANIFEST_NAME).write_text(manifest.dumps(), "utf-8")
        draft.written(Bundle(target, manifest, _gone(target, folder)))

    def late(old: Path) -> None:
        if left_out:  # what a build that runs wrote into its folder since
            with suppress(OSError):
                _take_over(old, target, left_out)

    with replaced_folder(target, settle=settle, late=late) as folder:
        draft = Draft(folder, base)
        yield draft
        assert draft.manifest is not None, "who writes a bundle says what is in it"
        for record in (record for artifact in draft.manifest.artifacts for record in artifact.records()):
            record.check(folder, content=False)  # before a file of the old bundle could take its place


def _derived(target: Path, made: Manifest) -> tuple[Artifact, ...] | None:
    """Return what ``target`` holds that was made from the very graph which was written; None if it is of another."""
    try:
        old = Manifest.read(target)
    except DeployError:  # there is none, or it is damaged
        return None
    exported, before = (next((a for a in m.artifacts if not a.source), None) for m in (made, old))
    if exported is None or before is None or (*exported.records(),) != (*before.records(),):
        return None
    return tuple(a for a in old.artifacts if a.source and _is_whole(a, target))


def _is_whole(artifact: Artifact, folder: Path) -> bool:
    """Say whether the files are as they were recorded: one that is damaged may be why the bundle is exported again."""
    try:
        for record in artifact.records():
            record.check(folder)
    except DeployError:
        return False
    return True


def _recorded(target: Path) -> set[str]:
    return {record.path for record in Manifest.read(target).records()}


def _take_over(old: Path, folder: Path, left_out: Collection[str]) -> None:
    """Give what is in ``old``, and not in ``folder``, a second name there.

    Args:
        old: a bundle.
        folder: the one that takes its place; what it holds already stays.
        left_out: paths in ``old`` that are of no use any more.
    """

    def ignored(parent: str, names: list[str]) -> list[str]:
        place = Path(parent)
        paths = {name: place / name for name in names}
        # A hidden folder holds a model with further outputs, as long as it runs; its writer removes it.
        passing = [name for name, path in paths.items() if place == old and name.startswith(".") and path.is_dir()]
        return [*passing, *(name for name, path in paths.items() if path.relative_to(old).as_posix() in left_out)]

    shutil.copytree(old, folder, copy_function=_link, ignore=ignored, dirs_exist_ok=True)


def _gone(old: Path, folder: Path) -> tuple[str, ...]:
    """Name what is in ``old`` and not in ``folder``: files, engines, other folders."""
    if not old.is_dir():
        return ()
    found = [path for path in (*old.iterdir(), *old.glob(f"{ENGINES}/*.plan")) if path.name != ENGINES]
    missing = [p for p in found if not p.name.startswith(".") and not (folder / p.relative_to(old)).exists()]
    return tuple(sorted(path.relative_to(old).as_posix() + "/" * path.is_dir() for path in missing))


def _link(source: str, target: str) -> None:
    """Give a file a second name, which takes no space; copy it where the file system cannot."""
    try:
        os.link(source, target)
    except (FileExistsError, FileNotFoundError):  # newer, or of a writer that has renamed it since
        return
    except OSError:
        shutil.copy2(source, target)


def _refuse_foreign(target: Path) -> None:
    """Raise UsageError where replacing ``target`` would delete something that is no bundle."""
    if target.is_symlink():
        found = "a symbolic link"
    elif not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return
    elif not target.is_dir():
        found = "a file"
    elif not _looks_like_manifest(target / MANIFEST_NAME):
        found = "a folder that is no bundle"
    else:
        return
    raise UsageError(
        f"{target} exists and is {found}",
        expected="nothing there, an empty folder, or a bundle to replace",
        hint="another --name or --output, or move it away",
    )


def _refuse_other_model(target: Path, model: ModelSpec) -> None:
    """Raise UsageError where ``target`` is a bundle of another model; of one that is damaged nobody knows."""
    try:
        found = Manifest.read(target).spec
    except DeployError:
        return
    if _identity(found) != _identity(model):
        raise UsageError(
            f"{target} is a bundle of {_called(found)}, and would be replaced by one of {_called(model)}",
            expected="a bundle of the same model, or none",
            hint="another --name, or --replace to give it up with all that was made from it",
        )


def _identity(spec: ModelSpec) -> tuple[str, str]:
    """What makes a model the same, whatever the sizes and the weights are: its name, or its place elsewhere."""
    target = spec.config.get("target")
    # A commit behind @ is a version of the same model; a path may be written in several ways.
    return spec.family, spec.name if target is None else os.path.normpath(str(target).partition("@")[0])


def _called(spec: ModelSpec) -> str:
    target = spec.config.get("target")
    return spec.name if target is None else str(target) if spec.family == FACTORY else f"{spec.family}:{target}"


def _looks_like_manifest(path: Path) -> bool:
    """A damaged bundle may be replaced, but many other things keep a manifest.json too."""
    return path.is_file() and b'"schema_version"' in path.read_bytes()


@contextmanager
def _disk_errors(target: Path) -> Iterator[None]:
    """Say of an error of the disk which bundle cannot be written."""
    try:
        yield
    except OSError as error:
        if _concerns_disk(error, target.parent):
            raise _unwritable(target, error) from error
        raise


def _concerns_disk(error: OSError, root: Path) -> bool:
    """Whether writing below ``root`` failed, as against a checkpoint that could not be read or downloaded."""
    if error.errno in _DISK_ERRORS:
        return True
    if isinstance(error.filename, str | Path):
        path = Path(error.filename)
        return path.is_relative_to(root) or root.is_relative_to(path)
    # numpy reports a short write without an error number; so do errors that have nothing to do with the disk.
    return error.errno is None and root.is_dir() and shutil.disk_usage(root).free < _FULL_BELOW


def _unwritable(target: Path, error: OSError) -> EnvironmentUnsuitable:
    return EnvironmentUnsuitable(
        f"cannot write the bundle {target}: {error.strerror or error}",
        expected="a folder with write permission and space for the model",
        hint="free some space, or name another folder with --output",
    )
