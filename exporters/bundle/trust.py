"""Whose code a bundle names: a factory of this user's own, exported on this machine, or a stranger's.

A manifest names the function that makes the eager model, with its arguments, and whoever wrote the manifest chose them:
`os:system` is a function, too. So export signs them with a key that only this user can read, and that is in no bundle;
the function runs unasked only where the signature is right. A bundle may be moved and copied; what was changed in it,
or was exported by another user or elsewhere, is a stranger's.

What is signed: the name of the function and its arguments, once with the hash of the file that holds it and once with
the file's place. So the file may be moved, and its owner may work on where it is: `verify` then says whether the model
is another one. What that file imports is not signed.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import secrets
import stat
import sys
from importlib.machinery import PathFinder
from pathlib import Path
from typing import TYPE_CHECKING

from platformdirs import user_state_path

from deploycli.models.files import sha256_of
from deploycli.models.sources import FACTORY

if TYPE_CHECKING:
    from deploycli.exporters.bundle.manifest import Manifest
    from deploycli.models.spec import ModelSpec

STATE = "DEPLOYCLI_STATE"
"""Environment variable with the folder of the key, in place of the user's folder for state."""

TRUST = "--trust-factory runs it"

_SEPARATOR = "-"  # between the two signatures
_KEY_NAME, _KEY_BYTES = "factory.key", 32


def key_path() -> Path:
    """Return where the key of this user is."""
    folder = os.environ.get(STATE)
    return (Path(folder) if folder else user_state_path("deploycli", appauthor=False)) / _KEY_NAME


def sign(spec: ModelSpec) -> tuple[str, str]:
    """Sign the factory of a model that is being exported, and make the key where there is none yet.

    Returns:
        The signature, and why there is none; one of them is empty, and both are where no factory made the model.
    """
    if spec.family != FACTORY:
        return "", ""
    try:
        key = _read_key() or _make_key()
        return _SEPARATOR.join(_signatures(spec, key)), ""
    except (OSError, _UnusableError) as error:
        return "", str(error)


def distrust(manifest: Manifest) -> str:
    """Say why the code that a bundle names is not run unasked; empty where it is, or where the bundle names none."""
    spec = manifest.spec
    if spec.family != FACTORY:
        return ""
    names = f"it names a function, {spec.config.get('target')}, "
    if not manifest.factory_signature:
        return f"{names}and was not signed at export"
    try:
        key = _read_key()
        told = manifest.factory_signature.encode().split(_SEPARATOR.encode())
        if key is not None and any(map(hmac.compare_digest, map(str.encode, _signatures(spec, key)), told)):
            return ""
    except (OSError, _UnusableError) as error:
        return f"{names}and the signature cannot be checked: {error}"
    return (
        f"{names}and it or its file is another than when you exported it, or somebody else did, or on another machine"
    )


class _UnusableError(Exception):
    """There is no telling whose code it is."""


def _signatures(spec: ModelSpec, key: bytes) -> tuple[str, str]:
    """Return the signature with the hash of the function's file, and the one with its place."""
    target = spec.config.get("target")
    sources = _sources_of(str(target))
    if not sources:
        raise _UnusableError(f"no file of {target} is found from here")
    signed = {"what": "factory", "target": target, "kwargs": spec.config.get("kwargs")}

    def signature(**source: str | list[str]) -> str:
        text = json.dumps(signed | source, sort_keys=True, ensure_ascii=True)
        return hmac.new(key, text.encode(), hashlib.sha256).hexdigest()

    content, places = map(sha256_of, sources), (str(source.resolve()) for source in sources)
    return signature(source=list(content)), signature(place=list(places))


def _sources_of(target: str) -> tuple[Path, ...]:
    """Return the file that holds a factory, after those of the packages around it, which run when it is imported.

    Nothing is imported: that would run it.
    """
    place = target.rpartition(":")[0]
    if place.endswith(".py"):
        return (Path(place),) if Path(place).is_file() else ()
    files: list[Path] = []
    where: list[str] | None = [str(Path.cwd()), *sys.path]  # as `deploycli.models.factory` finds it
    for part in place.split("."):
        try:
            spec = PathFinder.find_spec(part, where)  # the parts alone: of a whole name it would look up the parents
        except (ImportError, ValueError):  # a name that is none
            return ()
        if spec is None:
            return ()
        where = list(spec.submodule_search_locations or ())
        if spec.origin is not None and Path(spec.origin).is_file():  # a folder without an __init__.py has none
            files.append(Path(spec.origin))
        elif not where:  # built in
            return ()
    return tuple(files)


def _read_key() -> bytes | None:
    """Return the key, or None where there is none yet."""
    path = key_path()
    try:
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0))
    except FileNotFoundError:
        return None
    found = os.fstat(descriptor)
    if not stat.S_ISREG(found.st_mode):
        os.close(descriptor)
        raise _UnusableError(f"the key {path} is no regular file")
    with os.fdopen(descriptor, "rb") as stream:
        if hasattr(os, "getuid") and (found.st_uid != os.getuid() or found.st_mode & 0o077):
            raise _UnusableError(f"the key {path} can be read by others than you (remove it: export makes a new one)")
        key = stream.read(_KEY_BYTES + 1)
    if len(key) != _KEY_BYTES:
        raise _UnusableError(f"the key {path} is damaged (remove it: export makes a new one)")
    return key


def _make_key() -> bytes:
    """Make the key, whole at once; where another export is faster, take its."""
    path = key_path()
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(descriptor, "wb") as stream:
            stream.write(secrets.token_bytes(_KEY_BYTES))
            stream.flush()
            os.fsync(stream.fileno())
        try:
            os.link(temporary, path)  # unlike a rename, it replaces none that is there
        except FileExistsError:
            pass
        except OSError:  # a file system without links
            if not path.exists():
                temporary.rename(path)
    finally:
        temporary.unlink(missing_ok=True)
    key = _read_key()
    if key is None:
        raise _UnusableError(f"the key {path} vanished")
    return key
