"""Replace a file, or a folder whole: the disk holds the old one or the new one, whatever is killed when.

A file is written under a hidden name beside its place, synced, and renamed. Only files are replaced: a device, a pipe
or a socket is refused, and a symbolic link stays one, for the file that it leads to is replaced.

For a folder ``name`` three hidden siblings may exist:

    .name.tmp-<random>   being written; its writer holds a lock on it, which dies with the process
    .name.replaced       the old folder, between the two renames of a swap and until it is deleted

    write .name.tmp-*, fsync  ->  name => .name.replaced  ->  .name.tmp-* => name  ->  delete .name.replaced

Killed before the first rename: the old folder stands. Between the two: `recover` puts it back. After: the new one
stands. Renames happen under a lock on the parent folder, so of two writers the later one wins whole, and nobody
recovers what another process is just swapping. Without locks (some network file systems, Windows) one writer at a time
is assumed, and what a killed one left is not cleaned up.
"""

from __future__ import annotations

import errno
import hashlib
import os
import secrets
import shutil
import stat
import sys
import tempfile
import time
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from deploycli.models.errors import EnvironmentUnsuitable, IntegrityError, UsageError

if sys.platform != "win32":
    import fcntl

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence


_TEMPORARY = "deploycli-"
_MOMENT_S = 60.0
_ATTEMPTS = 10
_LONGEST_STEM = 200  # bytes

_KINDS = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
    (stat.S_ISFIFO, "a pipe"),
    (stat.S_ISSOCK, "a socket"),
)


_notes: list[int] = []


def note_temporaries(descriptor: int) -> None:
    """Have every temporary file and folder noted there from now on, for who cleans up after a crash."""
    _notes[:] = [descriptor]


def note(what: bytes) -> None:
    """Write a note, if anybody wants one; a zero byte ends it."""
    for descriptor in _notes:
        os.write(descriptor, what + b"\0")


@contextmanager
def replaced_folder(
    target: Path,
    *,
    replace: bool = True,
    settle: Callable[[Path], None] = lambda _: None,
    late: Callable[[Path], None] = lambda _: None,
) -> Iterator[Path]:
    """Yield an empty folder that takes the place of ``target`` when the block ends, or vanishes when it raises.

    The parent folder is created where it is missing.

    Args:
        target: the folder.
        replace: whether a folder that is there may be replaced.
        settle: is given the new folder under the lock, just before the swap: ``target`` is then what it replaces, and
            nobody else replaces it.
        late: is given the old folder, if there was one, just after the swap and before it is deleted; where it raises,
            the swap is undone.

    Raises:
        FileExistsError: ``target`` exists, and may not be replaced.
        OSError: from the file system; ``target`` is then as it was.
    """
    with scratch_folder(target) as temporary:
        yield temporary
        _sync_tree(temporary)
        with locked(target.parent):
            _recover_locked(target)
            if not replace and target.exists():
                raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(target))
            settle(temporary)
            _sync_tree(temporary)  # what is there already costs nothing
            _swap(temporary, target, late)


@contextmanager
def scratch_folder(target: Path) -> Iterator[Path]:
    """Yield an empty hidden folder beside ``target``, which vanishes; what dead processes have left there does, too.

    The parent folder is created where it is missing, and removed again where nothing came of it.

    Raises:
        OSError: from the file system.
    """
    missing = [folder for folder in (target.parent, *target.parent.parents) if not folder.exists()]
    temporary = target.parent / f"{_temporary_prefix(target)}{secrets.token_hex(4)}"
    owner = None
    try:
        owner = _made(temporary, target)
        yield temporary
    finally:
        shutil.rmtree(temporary, ignore_errors=True)  # gone already where it was swapped
        if owner is not None:
            os.close(owner)
        with suppress(OSError):  # something is in it
            for folder in missing:
                folder.rmdir()


def _made(temporary: Path, target: Path) -> int | None:
    """Make a hidden folder beside ``target`` and hold it; return what holds it, if anything can."""
    for attempts_left in range(_ATTEMPTS - 1, -1, -1):
        temporary.parent.mkdir(parents=True, exist_ok=True)
        try:
            with locked(temporary.parent):  # nobody may take the folder for a dead writer's before it is locked
                _remove_stale(target)
                note(os.fsencode(temporary.absolute()))
                temporary.mkdir()
                return _try_lock(temporary)
        except FileNotFoundError:  # another writer, who had made the parent folder, gave up and removed it
            if not attempts_left:
                raise
    return None


@contextmanager
def temporary_folder(near: Path | None = None) -> Iterator[Path]:
    """Yield an empty folder for what lives no longer than the block; what dead processes have left goes, too.

    Args:
        near: the folder to make it in, hidden; by default the system's for temporary files.

    Raises:
        OSError: from the file system.
    """
    place = Path(tempfile.gettempdir()) if near is None else near
    prefix = _TEMPORARY if near is None else f".{_TEMPORARY}"
    _remove_dead(place, prefix)
    with tempfile.TemporaryDirectory(prefix=prefix, dir=place, ignore_cleanup_errors=True) as name:
        note(os.fsencode(Path(name).absolute()))
        owner = _try_lock(Path(name))
        try:
            yield Path(name)
        finally:
            if owner is not None:
                os.close(owner)


def _remove_dead(place: Path, prefix: str) -> None:
    """Delete this user's temporary folders that nobody holds any more; those of a moment ago may not be held yet."""
    with suppress(OSError):
        for folder in list(place.glob(f"{prefix}*")):
            found = folder.lstat()
            ours = stat.S_ISDIR(found.st_mode) and (sys.platform == "win32" or found.st_uid == os.getuid())
            if ours and time.time() - found.st_mtime > _MOMENT_S and (owner := _try_lock(folder)) is not None:
                shutil.rmtree(folder, ignore_errors=True)
                os.close(owner)


def regular_file(path: Path) -> Path:
    """Return the file that writing to ``path`` replaces or makes: links are followed.

    Raises:
        UsageError: something else is there: a folder, a device, a pipe, a socket.
        OSError: from the file system.
    """
    try:
        real = path.resolve(strict=False) if path.is_symlink() else path
        mode = real.stat().st_mode
    except FileNotFoundError:
        return real
    except RuntimeError as error:  # before Python 3.13, of a circle of links
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(path)) from error
    if not stat.S_ISREG(mode):
        kind = next((name for test, name in _KINDS if test(mode)), "no file")
        hint = "the name of a file in it" if stat.S_ISDIR(mode) else "another name"
        raise UsageError(f"{path} is {kind}", expected="a file to replace, or nothing there", hint=hint)
    return real


def write_whole(path: Path, data: bytes) -> None:
    """Write a file, in a folder that is created where it is missing.

    Raises:
        UsageError: what is there is no file.
        EnvironmentUnsuitable: it cannot be written, or the disk is full; ``path`` is as it was.
    """
    try:
        path = regular_file(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.parent / f"{_temporary_prefix(path)}{secrets.token_hex(4)}"
        note(os.fsencode(temporary.absolute()))
        try:
            with temporary.open("xb") as stream:  # with the permissions of any other file, as mkstemp does not
                stream.write(data)
                stream.flush()
                os.fsync(stream.fileno())
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
    except OSError as error:
        raise unwritable(path, error) from error


def place(files: Sequence[Path], target: Path) -> tuple[Path, ...]:
    """Move a file to where it belongs, and others beside it, first: killed at any time, the old file has its own.

    Args:
        files: the file that is to be the target, and those that it refers to, under names that are theirs only.
        target: its place.

    Raises:
        UsageError: the target is no file, or is a link and would be parted from the other files.
        EnvironmentUnsuitable: a file cannot be replaced; all are as they were.
    """
    try:
        real = regular_file(target)
        if real != target and len(files) > 1:
            raise UsageError(
                f"{target} is a link to {real}, and the file refers to others beside it",
                expected="the place itself",
                hint=str(real),
            )
        places = [real, *(real.parent / path.name for path in files[1:])]
        made = [path for path in places[1:] if not path.exists()]
        try:
            for path in files:
                _sync(path)
            for path, where in reversed(list(zip(files, places, strict=True))):
                path.replace(where)
        except BaseException:
            for path in made if files[0].exists() else ():  # the file itself has not been moved
                path.unlink(missing_ok=True)
            raise
        _sync(real.parent)
    except OSError as error:
        raise unwritable(target, error) from error
    return (target, *places[1:])


def require_inside(path: Path, folder: Path) -> None:
    """Refuse a path of a bundle that a symbolic link leads out of it.

    Raises:
        IntegrityError: it does.
    """
    if not path.resolve().is_relative_to(folder.resolve()):
        raise IntegrityError(f"{path} is a link that leaves the bundle", expected=f"a path inside {folder}")


def unwritable(path: Path, error: OSError) -> EnvironmentUnsuitable:
    """Return what to say where a file cannot be written."""
    return EnvironmentUnsuitable(
        f"cannot write {path}: {error.strerror or error}", expected="a place with write permission and some space"
    )


def unreadable(path: Path | str, error: OSError, kind: Literal["file", "folder"] = "file") -> EnvironmentUnsuitable:
    """Return what to say where a file, or a folder, cannot be read."""
    return EnvironmentUnsuitable(
        f"cannot read {path}: {error.strerror or error}", hint=f"check the {kind}'s permissions"
    )


def recover(target: Path) -> None:
    """Put the old folder back where a swap was killed between its two renames.

    Raises:
        OSError: the folder cannot be renamed.
    """
    if target.exists() or not _replaced(target).exists():
        return
    with locked(target.parent):  # a living writer is about to finish its swap: wait, then look again
        _recover_locked(target)


def interrupted(root: Path) -> Iterator[Path]:
    """Yield the folders below ``root`` whose swap was killed, so that they exist under their hidden name only."""
    for old in sorted(root.glob(".*.replaced")):
        target = root / old.name[1 : -len(".replaced")]
        if not target.exists():
            yield target


def _replaced(target: Path) -> Path:
    return target.parent / f".{target.name}.replaced"


def _temporary_prefix(target: Path) -> str:
    name = os.fsencode(target.name)
    if len(name) > _LONGEST_STEM:  # 255 bytes are all that a name may have
        return f".{hashlib.sha256(name).hexdigest()}.tmp-"
    return f".{target.name}.tmp-"


def _recover_locked(target: Path) -> None:
    if not target.exists() and _replaced(target).exists():
        _replaced(target).rename(target)


def _swap(temporary: Path, target: Path, late: Callable[[Path], None]) -> None:
    old = _replaced(target)
    shutil.rmtree(old, ignore_errors=True)  # left where a writer died while it deleted
    try:
        if target.exists():
            target.rename(old)
        temporary.rename(target)
        _sync(target.parent)
        late(old)
    except BaseException:
        if not temporary.exists():
            target.rename(temporary)
        _recover_locked(target)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _remove_stale(target: Path) -> None:
    """Delete the temporary folders whose writers are dead: their locks can be had."""
    for folder in list(target.parent.iterdir()):
        if folder.name.startswith(_temporary_prefix(target)) and (descriptor := _try_lock(folder)) is not None:
            shutil.rmtree(folder, ignore_errors=True)
            os.close(descriptor)


def _sync_tree(folder: Path) -> None:
    for path in folder.rglob("*"):
        _sync(path)
    _sync(folder)


def _sync(path: Path) -> None:
    if sys.platform == "win32" and path.is_dir():
        return  # Windows opens no folders
    descriptor = os.open(path, os.O_RDONLY if sys.platform != "win32" else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the lock on ``folder``, waiting for it: meanwhile no folder below it is replaced.

    It is not for one thread to take twice.
    """
    descriptor = _try_lock(folder, wait=True)
    try:
        yield
    finally:
        if descriptor is not None:
            os.close(descriptor)


def _try_lock(folder: Path, *, wait: bool = False) -> int | None:
    """Return a descriptor that holds the lock on ``folder`` until it is closed, or None where it cannot be had."""
    if sys.platform == "win32":
        return None
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except FileNotFoundError:  # a stale folder that another writer removed first
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError:  # held by another process, or a file system without locks
        os.close(descriptor)
        return None
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor
