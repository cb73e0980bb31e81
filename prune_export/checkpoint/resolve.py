"""Where a model is: a directory, a GGUF file, or the Hub."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final

from prune_export.errors import CheckpointError, PlanError

_HUB_ID: Final = re.compile(r"[\w][\w.-]*(/[\w][\w.-]*)?(@[\w./-]+)?")
_WANTED: Final = [
    "*.safetensors", "*.safetensors.index.json", "config.json", "generation_config.json",
    "tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json", "added_tokens.json",
    "chat_template*", "*.model", "LICENSE*", "NOTICE*", "USE_POLICY*",
]  # fmt: skip


def resolve_model(spec: str) -> tuple[Path, str | None]:
    """The local place of a model, and its commit where it is of the Hub.

    `spec` is a directory, a .gguf file, or `owner/name[@revision]`, of which only config,
    safetensors and tokenizer files are fetched.

    Raises:
        PlanError: there is no such file, or the Hub does not give the model.
        CheckpointError: a file of another format, or a repository without safetensors.
    """
    path = Path(spec)
    if path.is_dir():
        return path, None
    if path.is_file():
        if path.suffix == ".gguf":
            return path, None
        raise CheckpointError(
            spec,
            f"is a {path.suffix or 'plain'} file, expected a model directory or a .gguf file",
            "give the directory that holds config.json and *.safetensors",
        )
    local = spec.startswith((".", "/", "~")) or path.suffix == ".gguf" or spec.count("/") > 1
    if local or not _HUB_ID.fullmatch(spec):
        raise PlanError(spec, "there is no such file or directory", "check the path of the model")
    return _fetched(spec)


def _fetched(spec: str) -> tuple[Path, str]:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    name, _, revision = spec.partition("@")
    try:
        path = Path(snapshot_download(name, revision=revision or None, allow_patterns=_WANTED))
    except GatedRepoError:
        raise PlanError(
            spec, "is gated", "accept its terms on the Hub, then run `hf auth login`"
        ) from None
    except RevisionNotFoundError:
        raise PlanError(
            spec, f"has no revision `{revision}`", "check the branch, tag or commit"
        ) from None
    except RepositoryNotFoundError:
        raise PlanError(
            spec,
            "is neither a directory here nor a model on the Hub that you may see",
            "check the spelling; for a private model run `hf auth login`",
        ) from None
    except LocalEntryNotFoundError:
        raise PlanError(
            spec,
            "is no directory here, is not in the Hub's cache, and the Hub cannot be reached",
            "check the path, or connect and unset HF_HUB_OFFLINE",
        ) from None
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise PlanError(
            spec, f"the Hub does not give it: {str(error).splitlines()[0]}", "try again later"
        ) from None
    if not any(path.glob("*.safetensors")):
        raise CheckpointError(
            spec,
            "has no safetensors on the Hub",
            "convert it: `from_pretrained(...).save_pretrained(DIR)`, where you trust its pickles",
        )
    return path, path.name
