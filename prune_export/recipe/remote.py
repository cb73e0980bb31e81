"""Fetches recipes from the Hub: one file of a repository, and nothing else of it."""

from __future__ import annotations

import re
from pathlib import Path

from prune_export.errors import RecipeError

_URI = re.compile(r"hf://([\w.-]+/[\w.-]+)(?:@([\w./-]+))?")


def fetched(uri: str) -> Path:
    """Fetches `prune_recipe.yaml` of `hf://owner/name[@revision]`; gives the local path.

    Raises:
        RecipeError: the URI is malformed, or the Hub or its cache does not give the file.
    """
    match = _URI.fullmatch(uri)
    if match is None:
        raise RecipeError(uri, "is not a recipe address", "write `hf://owner/name[@revision]`")
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(match[1], "prune_recipe.yaml", revision=match[2]))
    except LocalEntryNotFoundError:
        raise RecipeError(
            uri,
            "is not in the local cache, and the Hub cannot be reached",
            "connect, unset HF_HUB_OFFLINE, or copy the recipe here",
        ) from None
    except (HfHubHTTPError, ValueError, OSError) as error:
        raise RecipeError(
            uri,
            f"cannot be fetched: {str(error).splitlines()[0]}",
            "check the address, the revision and your access to it",
        ) from None
