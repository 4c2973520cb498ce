"""Published weights, fetched from the Hugging Face hub into its usual cache.

``HF_ENDPOINT``, ``HF_HOME``, ``HF_TOKEN`` and ``HF_HUB_OFFLINE`` act as in every tool that uses the hub.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from deploycli.models.errors import DeployError, EnvironmentUnsuitable, UsageError
from deploycli.models.variants import HubFile


@dataclass(frozen=True)
class Fetched:
    """A file from the hub.

    Attributes:
        path: where it lies in the cache.
        origin: ``repository@commit/file``, for the manifest; the commit is resolved, never a branch.
    """

    path: Path
    origin: str


def parse(text: str) -> HubFile:
    """Read ``owner/name`` or ``owner/name@revision``.

    Raises:
        UsageError: the text has another form.
    """
    repo, at, revision = text.partition("@")
    owner, slash, name = repo.partition("/")
    if not (owner and slash and name) or "/" in name or (at and not revision):
        raise UsageError(
            f"{text!r} names no hub repository", expected="owner/name or owner/name@revision", hint="timm/NAME"
        )
    return HubFile(repo, revision) if revision else HubFile(repo)


def fetch(file: HubFile) -> Fetched:
    """Return the file from the cache, downloading it first if it is not there.

    Raises:
        EnvironmentUnsuitable: the hub cannot be reached, and the file is not in the cache.
        UsageError: there is no such repository, revision or file, or it is gated or private.
    """
    from huggingface_hub import hf_hub_download  # takes half a second to import
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        endpoint = os.environ.get("HF_ENDPOINT")  # the library reads it once, when it is imported
        path = Path(hf_hub_download(file.repo, file.filename, revision=file.revision, endpoint=endpoint))
    except LocalEntryNotFoundError as error:
        raise _unreachable(file, error) from error
    except HfHubHTTPError as error:
        raise _refused(file, error.response.status_code) from error
    except OSError as error:  # the connection broke, or the cache cannot be written
        raise _unreachable(file, error) from error
    snapshot = path.parents[len(Path(file.filename).parts) - 1]  # snapshots/<commit>/<filename>
    return Fetched(path, f"{file.repo}@{snapshot.name}/{file.filename}")


def _unreachable(file: HubFile, error: Exception) -> DeployError:
    cause = error.__cause__ or error
    return EnvironmentUnsuitable(
        f"{file.repo} could not be fetched ({type(cause).__name__}: {str(cause).partition(chr(10))[0][:200]})",
        expected="a reachable hub, or the file in the hub's cache",
        hint="check the network, set HF_ENDPOINT to a mirror, or pass the file with --checkpoint",
    )


def _refused(file: HubFile, status: int) -> DeployError:
    if status >= 500:
        return EnvironmentUnsuitable(f"the hub answered {status} for {file.repo}", hint="again later, or --checkpoint")
    return UsageError(
        f"the hub refused {file.repo}@{file.revision}/{file.filename} (HTTP {status})",
        expected="a public repository that has this revision and file",
        hint=f"{file.repo}@main, another repository, or HF_TOKEN if it is private or gated",
    )
