"""Fetch one revision of a model repository from the Hugging Face hub.

In: a repository and a full commit hash. Out: the snapshot folder in the hub's cache, its weights checked against their
hashes. Changes no file of the repository, and fetches no weights of a model whose configuration is refused.
"""

import logging
import re
import shlex
from pathlib import Path

from tutor.artifacts.disk import read_json
from tutor.artifacts.hashing import file_sha256
from tutor.errors import ArtifactError, HostError, RecipeError, ServiceError
from tutor.formats.models.base_source import KNOWN
from tutor.formats.models.model_folder import check_model_config
from tutor.formats.models.safetensors import WEIGHTS

log = logging.getLogger(__name__)

FILES = (WEIGHTS, "*.json", "*.jinja", "tokenizer.model", "LICENSE*", "NOTICE*")
"""Patterns of the files that are fetched."""


def fetch_snapshot(repo: str, revision: str) -> Path:
    """Return the snapshot folder of exactly this revision, fetched where the cache does not have it.

    Raises ArtifactError for a refused configuration or a damaged file, HostError where the disk cannot keep it,
    RecipeError for an impossible name, ServiceError where the hub cannot be reached or does not have it.
    """
    import huggingface_hub as hub
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import httpx  # type: ignore[attr-defined]  # httpx2 from 2.0, httpx before

    try:
        config = Path(hub.hf_hub_download(repo, "config.json", revision=revision))
        check_model_config(read_json(config), f"{repo}@{revision}")
        log.info("fetching %s@%s: about 16 GB for 8 billion parameters, once", repo, revision[:12])
        folder = Path(hub.snapshot_download(repo, revision=revision, allow_patterns=list(FILES)))
    except HFValidationError as error:
        raise RecipeError(f"base.source is {f'hub:{repo}@{revision}'!r}: {error}", KNOWN) from None
    except (httpx.HTTPError, OSError) as error:  # errors of the hub are OSErrors without a number
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        if getattr(error, "errno", None) is not None:
            raise HostError(
                f"cannot keep {repo}@{revision} on this disk: {reason}",
                "free disk space, or set HF_HOME to another folder",
            ) from error
        raise ServiceError(
            f"cannot fetch {repo}@{revision} from the model hub: {reason}",
            "check the network, or name a local copy: base.source = 'path:FOLDER'",
        ) from error
    _check_hashes(folder)
    return folder


def _check_hashes(folder: Path) -> None:
    """Raise ArtifactError for a damaged weight file: the hub's cache names the blob of a large file by its sha256."""
    for path in sorted(folder.glob(WEIGHTS)):
        name = path.resolve().name
        if re.fullmatch(r"[0-9a-f]{64}", name) and file_sha256(path) != name:
            remove = f"rm {shlex.quote(str(path.resolve()))}"
            raise ArtifactError(f"{path} is damaged: its hash is not {name[:12]}…", f"{remove} and run again")
