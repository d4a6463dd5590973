"""Fetch one revision of a model repository from the Hugging Face hub.

In: a repository and a full commit hash. Out: the snapshot folder in the hub's cache, its weights checked against their
hashes. Changes no file of the repository, and fetches no weights of a model whose configuration is refused.
"""

import errno
import logging
import os
import re
import shlex
from collections.abc import Callable
from http import HTTPStatus
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from tutor.artifacts.hashing import file_sha256
from tutor.errors import ArtifactError, HostError, RecipeError, ServiceError, TutorError
from tutor.formats.models.model_config import check_model_config
from tutor.formats.models.safetensors import WEIGHTS
from tutor.recipe.values import KNOWN
from tutor.stages.base.text_tower import text_config

if TYPE_CHECKING:
    from huggingface_hub.errors import HfHubHTTPError

log = logging.getLogger(__name__)

FILES = (WEIGHTS, "*.json", "*.jinja", "tokenizer.model", "LICENSE*", "NOTICE*")
"""Patterns of the files that are fetched."""
LOCAL = "or name a local copy: base.source = 'path:FOLDER'"
"""Next step of any error of the hub."""
FULL = (errno.ENOSPC, errno.EDQUOT)
"""Numbers of the errors of a full disk."""
FULL_TEXT = re.compile(r"No space left|os error 28|Disk quota", re.IGNORECASE)
"""Pattern of a full disk in an error of hf_xet, which has no number."""


def fetch_snapshot(repo: str, revision: str) -> Path:
    """Return the snapshot folder of exactly this revision, fetched where the cache does not have it.

    Raises ArtifactError for a refused configuration or a damaged file, HostError where the disk cannot keep it,
    RecipeError for an impossible name, token or proxy, ServiceError where the hub cannot be reached or refuses.
    """
    hub = _client()
    _check_token()
    config = Path(_from_hub(hub.hf_hub_download, repo, revision, filename="config.json"))
    check_model_config(text_config(config.parent), f"{repo}@{revision}")
    log.info("fetching %s@%s: about 16 GB for 8 billion parameters, once", repo, revision[:12])
    folder = Path(_from_hub(hub.snapshot_download, repo, revision, allow_patterns=list(FILES)))
    _check_hashes(folder)
    return folder


def _client() -> ModuleType:
    """Return huggingface_hub. Raises RecipeError for variables with which it cannot be imported or connect."""
    for name in ("SSL_CERT_FILE", "SSL_CERT_DIR"):
        if (path := os.environ.get(name)) and not Path(path).exists():
            raise RecipeError(f"{name} is {path!r}, which is not there", f"correct or unset {name}")
    try:
        from huggingface_hub import constants  # noqa: F401 - reads the environment
    except ValueError as error:
        raise RecipeError(f"a variable of the hub's client is wrong: {error}", "check those named HF_...") from None
    import huggingface_hub

    return huggingface_hub


def _check_token() -> str | None:
    """Return the token that the hub's client sends, or None. Raises RecipeError for one that no request can hold."""
    import huggingface_hub as hub
    from huggingface_hub import errors

    place = "HF_TOKEN" if os.environ.get("HF_TOKEN", "").strip() else "the hub's token"
    try:
        token = hub.get_token()  # without blanks and newlines around
    except OSError as error:
        raise HostError(f"{place} cannot be read: {error}", "make HF_HOME a folder that you can read") from None
    except (ValueError, errors.OIDCError, errors.DeviceCodeError) as error:
        raise RecipeError(f"{place} cannot be read: {_line(error)}", "log in again: hf auth login") from None
    if token and (wrong := sorted(set(re.sub(r"[!-~]", "", token)))):
        problem = f"{place} holds {' '.join(map(repr, wrong[:5]))}, which no token has"
        raise RecipeError(problem, "copy the token alone, without quotation marks and blanks")
    return token


def _from_hub(call: Callable[..., str], repo: str, revision: str, **options: Any) -> str:
    """Return the result of a call of huggingface_hub. Raises TutorError with the reason and the remedy."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import httpx  # type: ignore[attr-defined]  # httpx2 from 2.0, httpx before

    try:
        return call(repo, revision=revision, **options)
    except HFValidationError as error:
        raise RecipeError(f"base.source is {f'hub:{repo}@{revision}'!r}: {error}", KNOWN) from None
    except (httpx.HTTPError, OSError, RuntimeError) as error:  # errors of the hub are OSErrors, of hf_xet RuntimeErrors
        raise _explained(error, repo, revision) from error
    except (httpx.InvalidURL, ValueError, ImportError) as error:  # of a client that the environment describes
        problem = f"the hub's client cannot be made: {_line(error)}"
        raise RecipeError(problem, "check HF_ENDPOINT, HTTPS_PROXY, ALL_PROXY and NO_PROXY") from error


def _explained(error: Exception, repo: str, revision: str) -> TutorError:
    """Return the error that names the reason of a failed fetch, and the remedy."""
    from huggingface_hub import constants, errors

    what = f"cannot fetch {repo}@{revision} from the model hub"
    cause = error.__cause__ if isinstance(error, errors.LocalEntryNotFoundError) and error.__cause__ else error
    if isinstance(cause, errors.HfHubHTTPError):
        problem, hint = _refusal(cause, f"{constants.ENDPOINT}/{repo}")
        return ServiceError(f"{what}: {problem}", f"{hint}, {LOCAL}")
    if isinstance(cause, errors.OfflineModeIsEnabled) or constants.HF_HUB_OFFLINE:
        return ServiceError(f"{what}: HF_HUB_OFFLINE is set, and the cache lacks it", f"unset HF_HUB_OFFLINE, {LOCAL}")
    number, network = getattr(cause, "errno", None), isinstance(cause, (ConnectionError, TimeoutError))
    if number in FULL or FULL_TEXT.search(str(cause)):
        problem = f"cannot keep {repo}@{revision} on this disk: it is full ({_line(cause)})"
        return HostError(
            problem, "free disk space, or set HF_HOME to a folder on another disk; the fetch goes on there"
        )
    if number is not None and not network:
        hint = "make the folder of HF_HOME writable, or set HF_HOME to another folder"
        return HostError(f"cannot keep {repo}@{revision} on this disk: {_line(cause)}", hint)
    tls = "CERTIFICATE" in str(cause)
    where = f" ({constants.ENDPOINT})"
    hint = "name the CA of your proxy in SSL_CERT_FILE" if tls else f"check the network and the proxy{where}"
    return ServiceError(f"{what}: {_line(cause)}", f"{hint}, {LOCAL}")


def _refusal(error: "HfHubHTTPError", page: str) -> tuple[str, str]:
    """Return the reason of an HTTP error of the hub, and the next step; `page` is the repository's address."""
    from huggingface_hub import errors

    token, status = _check_token(), error.response.status_code
    code, words = (error.response.headers.get(f"X-Error-{name}", "") for name in ("Code", "Message"))
    reason = _line(words) if words else "no reason given"
    account = "with the account of your token" if token else "and set HF_TOKEN to a token of that account"
    private = "the token's account may not see it" if token else "a private one needs HF_TOKEN"
    bad_token = status == HTTPStatus.UNAUTHORIZED and token is not None and code != "RepoNotFound"
    cases = (
        (isinstance(error, errors.GatedRepoError), "it is gated", f"accept its licence at {page} {account}"),
        (isinstance(error, errors.RevisionNotFoundError), "no such revision", f"copy a hash from {page}/commits/main"),
        (isinstance(error, errors.EntryNotFoundError), "no config.json", "name a repository of a transformers model"),
        (bad_token, f"the hub refuses the token ({reason})", "set HF_TOKEN to a valid one or unset it"),
        (isinstance(error, errors.RepositoryNotFoundError), "no such repository", f"check its name ({private})"),
        (status == HTTPStatus.FORBIDDEN, f"it is forbidden ({reason})", "give the token the right to read it"),
        (
            status == HTTPStatus.TOO_MANY_REQUESTS,
            "the hub gets too many requests",
            "wait some minutes (HF_TOKEN raises the limit)",
        ),
        (True, f"the hub answers {status} ({reason})", "try again later"),
    )
    return next((problem, hint) for applies, problem, hint in cases if applies)


def _line(text: object) -> str:
    """Return the first line of an error or of a text, shortened."""
    return (str(text).strip().partition("\n")[0] or type(text).__name__)[:300]


def _check_hashes(folder: Path) -> None:
    """Raise ArtifactError for a damaged weight file: the hub's cache names the blob of a large file by its sha256."""
    for path in sorted(folder.glob(WEIGHTS)):
        name = path.resolve().name
        if re.fullmatch(r"[0-9a-f]{64}", name) and file_sha256(path) != name:
            remove = f"rm {shlex.quote(str(path.resolve()))}"
            raise ArtifactError(f"{path} is damaged: its hash is not {name[:12]}…", f"{remove} and run again")
