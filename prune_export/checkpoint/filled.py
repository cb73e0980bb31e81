"""Keeps configs whose defaults transformers has filled in, so that a plan need not import it.

Its configuration classes import most of transformers and the distributed half of torch: a second
of processor time for a dictionary. They are kept in the user's cache, by a hash of the config and
the version of transformers. Nothing depends on it: whatever cannot be read is made again.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from contextlib import suppress
from functools import cache
from hashlib import sha256
from importlib import metadata
from pathlib import Path
from typing import Any, Final

from prune_export.errors import CheckpointError
from prune_export.machine import user_cache
from prune_export.system.files import is_regular, open_regular, read_json_object
from prune_export.system.locking import write_atomically

_VERSION: Final = 1
_AUTO: Final = "transformers.models.auto.configuration_auto"
_HEADER_BYTES: Final = 2**25
"""The beginning of a GGUF file by which it is known: vocabularies of 262,144 tokens take 8 MiB."""
_COUNTED: Final = "id2label"
"""The one key of transformers whose value has numbers for keys, which JSON makes text of."""


def kept_config(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """Finds a filled config of an earlier process; None where transformers is imported anyway."""
    if _AUTO in sys.modules:
        return None
    try:
        file = _file(config)
        if file is None or not is_regular(file):
            return None
        found = _restored(read_json_object(file, "a kept config"))
    except (CheckpointError, OSError, ValueError, AttributeError):
        return None
    same = found.get("model_type") == config.get("model_type")
    return found if same else None


def keep_config(config: Mapping[str, Any], filled: Mapping[str, Any], made_by: type) -> None:
    """Keeps a filled config, if it was made by a class of transformers itself."""
    if not made_by.__module__.startswith("transformers.models."):
        return
    with suppress(OSError, ValueError, TypeError):
        file = _file(config)
        text = json.dumps(filled)
        if file is None or file.exists() or _restored(json.loads(text)) != filled:
            return
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(file, text)


def kept_gguf_config(gguf: Path) -> dict[str, Any] | None:
    """Finds the config that an earlier process read from a GGUF file's header, or None.

    A file is known by its size and its first bytes, in which the header lies. Without the gguf
    package none is found: it is needed for the rest of the work.
    """
    try:
        file = _file(_beginning(gguf))
        if file is None or not is_regular(file):
            return None
        found = _restored(read_json_object(file, "a kept config"))
    except (metadata.PackageNotFoundError, CheckpointError, OSError, ValueError, AttributeError):
        return None
    return found if isinstance(found.get("model_type"), str) else None


def keep_gguf_config(gguf: Path, config: Mapping[str, Any]) -> None:
    """Keeps the config of a GGUF file, which takes seconds to read: it has the vocabulary in it."""
    with suppress(metadata.PackageNotFoundError, OSError, ValueError, TypeError):
        file = _file(_beginning(gguf))
        text = json.dumps(config)
        if file is None or file.exists() or _restored(json.loads(text)) != config:
            return
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(file, text)


def _beginning(gguf: Path) -> dict[str, Any]:
    with open_regular(gguf, None, "a GGUF file") as stream:
        digest = sha256(stream.read(_HEADER_BYTES)).hexdigest()
    return {"gguf": digest, "bytes": gguf.stat().st_size, "reader": metadata.version("gguf")}


def _file(config: Mapping[str, Any]) -> Path | None:
    try:
        known = [_VERSION, _transformers(), config]
        folder = user_cache() / "configs"
    except (metadata.PackageNotFoundError, RuntimeError):
        return None
    return folder / f"{sha256(json.dumps(known).encode()).hexdigest()[:32]}.json"


@cache
def _transformers() -> str:
    """The version of transformers; asked anew, it costs more than filling in a config."""
    return metadata.version("transformers")


def _restored(found: dict[str, Any]) -> dict[str, Any]:
    if isinstance(labels := found.get(_COUNTED), dict):
        found[_COUNTED] = {int(number): name for number, name in labels.items()}
    return found
