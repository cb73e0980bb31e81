"""The way to the Hub: the token, names, and the upload of files that were checked before.

The token is given, or found as huggingface_hub finds it; it goes into request headers and nowhere
else.
"""

from __future__ import annotations

import glob
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from prune_export.errors import PublishError

_REVISION: Final = re.compile(r"(?!refs/)[A-Za-z0-9][\w./-]*")


def check_names(repo_id: str, revision: str | None = None) -> None:
    """Refuses a repository id or a branch that the Hub would refuse.

    Raises:
        PublishError: naming it.
    """
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    problem = "" if repo_id.count("/") == 1 else "names no owner"
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        problem = str(error).split(":")[0]
    if problem:
        raise PublishError(
            repr(repo_id), f"is not a repository id: {problem}", "write `owner/name`"
        )
    if revision is not None and (not _REVISION.fullmatch(revision) or ".." in revision):
        raise PublishError(repr(revision), "is not a branch name", "write for example `main`")


def found_token(given: str | None) -> str:
    """The token: as given, or as huggingface_hub finds it.

    Raises:
        PublishError: there is none.
    """
    from huggingface_hub import get_token

    token = given or get_token()
    if not token:
        raise PublishError(
            "Hugging Face Hub", "no token was given or found", "set HF_TOKEN or run `hf auth login`"
        )
    return token.strip()


def check_online() -> None:
    """Refuses to publish in offline mode.

    Raises:
        PublishError: it is on.
    """
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        raise PublishError(
            "Hugging Face Hub",
            "offline mode is on (HF_HUB_OFFLINE)",
            "unset HF_HUB_OFFLINE to publish, or use a dry run",
        )


def upload(
    directory: Path,
    repo_id: str,
    files: list[str],
    *,
    stale: tuple[str, ...],
    private: bool,
    revision: str | None,
    token: str,
    endpoint: str | None,
    bars: bool,
) -> tuple[str, str]:
    """Uploads files that were checked, removes `stale` ones; gives the address and the commit.

    Raises:
        PublishError: the Hub refuses.
    """
    from huggingface_hub import HfApi, utils
    from huggingface_hub.errors import HTTPError  # httpx's, whichever httpx the library uses

    api = HfApi(endpoint=endpoint, token=token)
    hidden = not bars and not utils.are_progress_bars_disabled()
    if hidden:
        utils.disable_progress_bars()
    try:
        url = api.create_repo(repo_id, private=private, exist_ok=True)
        if private and api.model_info(repo_id).private is False:
            failure = PublishError(
                repo_id,
                "exists and is public, expected a private repository",
                "publish with `--public`, or make the repository private",
            )
        else:
            if revision not in (None, "main"):
                api.create_branch(repo_id, branch=revision, exist_ok=True)
            commit = api.upload_folder(
                repo_id=repo_id,
                folder_path=directory,
                revision=revision,
                allow_patterns=[glob.escape(name) for name in files],
                delete_patterns=list(stale),
                commit_message="Upload with prune_export",
            )
            return str(url), str(commit.oid)
    # The library raises its own and httpx's errors, RuntimeError around a failed file, ValueError
    # for a card that the Hub rejects.
    except (HTTPError, OSError, RuntimeError, ValueError) as error:
        failure = _refusal(repo_id, error, token)
    finally:
        if hidden:
            utils.enable_progress_bars()
    # Raised here and not while handling: the library's errors carry the request, token included.
    raise failure


def _refusal(repo_id: str, error: BaseException, token: str) -> PublishError:
    """Turns what the Hub answered into an error, without the token."""
    from huggingface_hub.errors import HfHubHTTPError

    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, HfHubHTTPError):
        cause = cause.__cause__
    if not isinstance(cause, HfHubHTTPError):
        text = str(error).strip().replace(token, "hf_…") or type(error).__name__
        return PublishError(repo_id, f"upload failed: {text}", "check the network, then try again")
    status = cause.response.status_code
    said = f" ({message})" if (message := (cause.server_message or "").strip()) else ""
    problem, fix = _ANSWERS.get(
        status, (f"the Hub answered {status}", "try again later; what was uploaded is kept")
    )
    return PublishError(repo_id, f"{problem}{said}".replace(token, "hf_…"), fix)


_ANSWERS: Final[Mapping[int, tuple[str, str]]] = {
    401: ("the Hub does not accept the token", "make a new one, then `hf auth login` or HF_TOKEN"),
    403: (
        "the token may not write there",
        "use a token with write access to this owner, or another owner",
    ),
    404: ("the Hub has no such repository or branch", "check `owner/name` and the revision"),
    409: ("the repository changed meanwhile", "publish again"),
    412: ("the repository changed meanwhile", "publish again"),
    413: ("a file or the commit is too large for the Hub", "write smaller shards"),
    429: ("too many requests", "wait some minutes, then publish again"),
}
