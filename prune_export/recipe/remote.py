"""Fetches recipes from the Hub: named small files of a repository, and nothing else of it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from prune_export.errors import RecipeError

_URI = re.compile(r"hf://(\w[\w.-]*/\w[\w.-]*)(?:/(\w[\w.-]*))?(?:@([\w./-]+))?")
_MISSING = "check the address, the revision and your access to it"


def fetched(uri: str) -> Path:
    """Fetches the recipe of `hf://owner/name[@revision]`; gives the local path.

    That is `prune_recipe.yaml` of the repository; of `hf://owner/name/other[@revision]` it is
    `recipes/other.yaml`.

    Raises:
        RecipeError: the URI is malformed, or the Hub or its cache does not give the file.
    """
    name = _parts(uri)[1]
    file = f"recipes/{name}.yaml" if name else "prune_recipe.yaml"
    return fetched_files(uri, (file,)) / file


def owner_of(uri: str) -> str:
    """Who owns the repository of an `hf://` address.

    Raises:
        RecipeError: the URI is malformed.
    """
    return _parts(uri)[0].partition("/")[0]


def _parts(uri: str) -> tuple[str, str | None, str | None]:
    """Takes an address apart: repository, recipe, revision."""
    match = _URI.fullmatch(uri)
    if match is None:
        raise RecipeError(
            uri, "is not a recipe address", "write `hf://owner/name[/recipe][@revision]`"
        )
    return match[1], match[2], match[3]


def fetched_files(uri: str, needed: Sequence[str], wanted: Sequence[str] = ()) -> Path:
    """Fetches files of one commit of `hf://owner/name[@revision]`; gives their local directory.

    Those in `wanted` may be missing there.

    Raises:
        RecipeError: the URI is malformed, or the Hub or its cache does not give what is needed.
    """
    repo_id, _, revision = _parts(uri)
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import (
        EntryNotFoundError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
    )

    folder = Path()
    for name in (*needed, *wanted):
        try:
            file = Path(hf_hub_download(repo_id, name, revision=revision))
        except LocalEntryNotFoundError:
            if name in wanted:
                continue
            raise RecipeError(
                uri,
                "is not in the local cache, and the Hub cannot be reached",
                "connect, unset HF_HUB_OFFLINE, or copy the recipe here",
            ) from None
        except (HfHubHTTPError, ValueError, OSError) as error:
            if name in wanted and isinstance(error, EntryNotFoundError):
                continue
            raise RecipeError(
                uri, f"cannot be fetched: {str(error).splitlines()[0]}", _MISSING
            ) from None
        # Whatever else is fetched is of the commit that the first file was found in.
        folder = file.parents[name.count("/")]
        revision = folder.name
    return folder
