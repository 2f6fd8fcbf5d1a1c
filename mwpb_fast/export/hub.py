"""An exported model on the Hugging Face hub: the file and its card, in one commit.

The token is huggingface_hub's affair (HF_TOKEN, or what `hf auth login` keeps): it is read there for each request,
and what a server says of it is not repeated here.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mwpb_fast.config import ConfigError
from mwpb_fast.export import CARD, MARK
from mwpb_fast.export.formats import ExportError
from mwpb_fast.system.optional import attempt


def require() -> Any:
    """huggingface_hub. Raises ConfigError where it is missing or broken."""
    found = attempt("huggingface_hub", "huggingface_hub.errors")
    if found.module is None:
        cure = found.cure("huggingface_hub", "hub")
        raise ConfigError(f"--push-to-hub needs huggingface_hub, which {found.why}: {cure}")
    return found.module


def push(files: Sequence[Path], repository: str, private: bool | None = None) -> str:
    """Commit files, by their names, to the model repository ORG/NAME, and return the commit's address.

    private: None leaves a repository as it is, and makes a new one private. Raises ConfigError for what the user
    can mend (a token without the right, a repository of the other kind, somebody else's card), ExportError else.
    """
    hub = require()
    api = hub.HfApi(endpoint=os.environ.get("HF_ENDPOINT"))  # huggingface_hub itself has read it once and for all
    try:
        api.create_repo(repository, private=private is not False, exist_ok=True)
        found = bool(api.repo_info(repository).private)
        if private not in (None, found):
            kind, other = ("private", "public") if found else ("public", "private")
            raise ConfigError(
                f"{repository}: is there, and {kind}; change its settings on the hub, or leave out --{other}"
            )
        _keep_theirs(hub, api, repository)
        operations = [hub.CommitOperationAdd(path_in_repo=file.name, path_or_fileobj=file) for file in files]
        done = api.create_commit(repository, operations, commit_message=f"{files[0].name}, {MARK}")
        return str(done.commit_url)
    except (ConfigError, MemoryError):
        raise
    except Exception as error:  # of the network, the hub, or the package's own checks
        status = getattr(getattr(error, "response", None), "status_code", 0)
        reason = _without_token(hub, getattr(error, "server_message", None) or str(error) or type(error).__name__)
    # outside, since a traceback shows the error that was being handled, with whatever the server had said
    if status in (401, 403, 404):
        cure = "HF_TOKEN, or `hf auth login`, must be a token that may write there"
        raise ConfigError(f"{repository}: the hub refuses ({status}: {reason}); {cure}")
    raise (ConfigError if 400 <= status < 500 else ExportError)(f"{repository}: not pushed: {reason}")


def _keep_theirs(hub: Any, api: Any, repository: str) -> None:
    """Somebody's own card is not replaced, as in a folder."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            card = Path(api.hf_hub_download(repository, CARD, local_dir=folder))
        except (
            hub.errors.LocalEntryNotFoundError
        ):  # the hub could not be asked, which does not say that there is none
            raise
        except hub.errors.EntryNotFoundError:
            return
        if MARK not in card.read_text(encoding="utf-8", errors="replace"):
            raise ConfigError(f"{repository}: its {CARD} is not of this command, and would be replaced")


def _without_token(hub: Any, text: str) -> str:
    """The first line, in which a token stands as `***`."""
    line = text.strip().partition("\n")[0]
    token = hub.get_token()
    return line.replace(token, "***") if token else line
