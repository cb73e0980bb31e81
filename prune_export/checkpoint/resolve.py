"""Finds the model that a recipe names: a directory, a GGUF file, or a model on the Hub.

From the Hub come config, tokenizer and safetensors, and nothing that could run code.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any, Final

from prune_export.checkpoint.config import read_json
from prune_export.checkpoint.side import ADAPTER, MERGE, SIDE_NAMES, SIDE_STEMS
from prune_export.checkpoint.stored import CONVERT, INDEX, PICKLES, SINGLE
from prune_export.errors import CheckpointError, PlanError, PruneExportError
from prune_export.system.files import shown

_ID: Final = re.compile(r"(?P<id>[\w.-]+(?:/[\w.-]+)?)(?:@(?P<revision>[^@\s]+))?")
_SIDE: Final = ("config.json", *sorted(SIDE_NAMES), *(f"{stem}*" for stem in SIDE_STEMS))


def resolve_model(
    spec: str,
    *,
    below: Path | None = None,
    asker: str = "",
    offline: bool = False,
    weights: bool = True,
    endpoint: str | None = None,
) -> tuple[Path, str | None]:
    """Finds a model's local path, fetching it from the Hub where needed, and its commit there.

    `spec` is a directory, a `.gguf` file, or `org/name[@revision]`. With `below`, a path in it is
    taken as one below that directory, which it may not leave, and `~` has no meaning: so a recipe
    (`asker`) names its model, whoever wrote it. `offline` looks in the cache only, and so does the
    environment's HF_HUB_OFFLINE; `weights=False` fetches all but the weights.

    Raises:
        PlanError: there is no such model, or it may not or cannot be fetched.
        CheckpointError: a file of another format, or a repository without safetensors.
    """
    place = _below(below, spec, asker) if below else _expanded(spec)
    # An empty name would be this directory; a name may be too long for one, or hold a zero byte.
    if spec and os.path.exists(place):
        if place.is_dir() or place.suffix == ".gguf":
            return place, None
        raise CheckpointError(
            spec,
            "is a file, expected a model directory, a .gguf file or a Hub id",
            "give the directory that holds config.json and the safetensors files",
        )
    named = _ID.fullmatch(spec)
    if named is None or place.suffix == ".gguf" or spec.startswith((".", "~", "/")):
        if below:
            raise PlanError(
                f"{asker}  model",
                f"`{spec}` is not below the data root {below}, and is not a Hub id (`org/name`)",
                "pass `--model` for a model that lies elsewhere",
            )
        raise PlanError(
            shown(spec),
            "does not exist, and is not a Hub id (`org/name`, `org/name@revision`)",
            "give a model directory, a .gguf file or a Hub id",
        )
    try:
        return _from_hub(named["id"], named["revision"], offline, weights, endpoint)
    except PruneExportError:
        raise
    except Exception as error:
        raise _readable(spec, error) from error


def _below(root: Path, spec: str, asker: str) -> Path:
    place = root / spec
    # Before it is known to be there: whether it is, is none of a recipe's business.
    if not Path(os.path.realpath(place)).is_relative_to(os.path.realpath(root)):
        raise PlanError(
            f"{asker}  model",
            f"`{spec}` leaves the data root {root}",
            f"pass `--model {place}` if you trust it",
        )
    return place


def _expanded(spec: str) -> Path:
    try:
        return Path(spec).expanduser()
    except RuntimeError:  # no home directory is known, of this user or of the one named
        return Path(spec)


def _from_hub(
    name: str, revision: str | None, offline: bool, weights: bool, endpoint: str | None
) -> tuple[Path, str]:
    from huggingface_hub import constants, snapshot_download

    offline = offline or constants.HF_HUB_OFFLINE
    if weights and not offline:
        _refuse_without_safetensors(name, revision, endpoint)

    def fetch(at: str | None, *patterns: str) -> Path:
        return Path(
            snapshot_download(
                name,
                revision=at,
                allow_patterns=[*_SIDE, *patterns],
                local_files_only=offline,
                endpoint=endpoint,
            )
        )

    path = fetch(revision, SINGLE, INDEX) if weights else fetch(revision)
    if weights and not (path / SINGLE).exists() and (path / INDEX).exists():
        listed = read_json(path / INDEX).get("weight_map")
        shards = {str(shard) for shard in listed.values()} if isinstance(listed, dict) else set()
        # The commit, not the branch: the index and its shards must be of one version.
        path = fetch(path.name, *sorted(shards))
    return path, path.name


def _refuse_without_safetensors(name: str, revision: str | None, endpoint: str | None) -> None:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        info = HfApi(endpoint=endpoint).model_info(name, revision=revision)
    except (HfHubHTTPError, HFValidationError):
        raise
    except Exception:
        # Not reached: the cache may have the model, and if not, the download says so.
        return
    stored = {sibling.rfilename for sibling in info.siblings or ()}
    if ADAPTER in stored and "config.json" in stored:
        raise CheckpointError(name, "holds a PEFT adapter beside the model's own weights", MERGE)
    if SINGLE in stored or INDEX in stored:
        return
    quantized = sorted(file for file in stored if file.endswith(".gguf"))
    if quantized:
        raise CheckpointError(
            name,
            f"has only GGUF files ({quantized[0]}, …)",
            f"fetch one (`hf download {name} {quantized[0]}`) and give its path",
        )
    pickled = sorted(file for file in stored if Path(file).suffix in PICKLES)
    if pickled:
        raise CheckpointError(
            name,
            f"has no safetensors, only {pickled[0]}: pickles can run code, so they are not fetched",
            CONVERT,
        )
    raise CheckpointError(name, f"has no weights: neither {SINGLE} nor {INDEX}")


def _readable(spec: str, error: Exception) -> PlanError:
    """Turns an error of huggingface_hub into three lines."""
    from huggingface_hub import errors

    where = f"{spec} (on the Hub)"
    cause: Any = error
    status = getattr(getattr(cause, "response", None), "status_code", None)
    if isinstance(error, errors.GatedRepoError):
        return PlanError(
            where,
            "is gated: its owner lets only those read it who accepted its terms",
            "accept them on the model's page, then run `hf auth login`",
        )
    if isinstance(error, errors.RevisionNotFoundError | errors.RevisionResolutionError):
        return PlanError(
            where, "has no such revision", "write a branch, a tag or a commit after the `@`"
        )
    if isinstance(error, errors.RepositoryNotFoundError) or status in (401, 403):
        return PlanError(
            where,
            "is not found there, or is private; no such directory exists here either",
            "check the spelling; for a private model run `hf auth login`",
        )
    if isinstance(error, errors.HFValidationError):
        return PlanError(where, f"is not a Hub id: {error}", "write `org/name`")
    first = (str(error).strip().splitlines() or [type(error).__name__])[0]
    if isinstance(error, errors.LocalEntryNotFoundError | errors.OfflineModeIsEnabled):
        return PlanError(
            where,
            "is not in the local cache, and the Hub is not asked (offline) or not reached",
            "fetch it once with a network (`hf download ID`), or give a local directory",
        )
    return PlanError(
        where,
        f"cannot be fetched: {first}",
        "check the network and run again; what was fetched is kept",
    )
