"""Reads the store's manifests and notes; a broken one counts as absent.

Manifests, notes about results and remembered hashes all come in here, and only here. A file that
is no regular one, is too large or says something else than was asked is None.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Final

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from prune_export.system.platforms import open_flags
from prune_export.units import MIB

_MANIFEST_BYTES: Final = 512 * MIB
"""The largest have a score for each channel of each block; ten times a 70B model's."""

_NOTE_BYTES: Final = 64 * MIB

_Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


def _inside(name: str) -> str:
    """A file's name below a directory, which it cannot leave."""
    parts = PurePosixPath(name).parts
    if not parts or name.startswith("/") or ".." in parts or "\0" in name:
        raise ValueError("leaves the directory")
    return name


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, frozen=True)


class _File(_Strict):
    sha256: _Sha256
    stamp: list[int]


class _Manifest(_Strict):
    id: str
    kind: str
    name: str
    version: str
    parameters: dict[str, Any]
    inputs: list[str]
    data: str | None
    seconds: float = Field(ge=0, allow_inf_nan=False)
    record: dict[str, Any]
    files: dict[Annotated[str, AfterValidator(_inside)], _File]
    sum: str | None = None


class _Root(_Strict):
    out: str = Field(min_length=1)
    ids: list[str]


class _Seen(_Strict):
    stamp: list[int]
    sha256: _Sha256


_SEEN: Final = TypeAdapter(dict[str, _Seen])


def summed(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """Adds to a manifest the hash of all that never changes in it."""
    plain: dict[str, Any] = json.loads(json.dumps(manifest))
    return plain | {"sum": _sum(plain)}


def manifest_of(folder: Path, name: str) -> dict[str, Any] | None:
    """Reads the manifest of an artifact's folder; None where it is missing or invalid."""
    found = _json(folder / name, _MANIFEST_BYTES)
    try:
        checked = _Manifest.model_validate(found)
    except (ValidationError, RecursionError):
        return None
    # Manifests of earlier versions have no sum.
    if checked.id != folder.name or checked.sum not in (None, _sum(found)):
        return None
    return dict(found)


def root_of(file: Path) -> tuple[Path, frozenset[str]] | None:
    """Reads a note about a result: (result directory, the artifacts that it needs)."""
    try:
        found = _Root.model_validate(_json(file, _NOTE_BYTES))
    except ValidationError:
        return None
    return Path(found.out), frozenset(found.ids)


def seen_in(file: Path) -> dict[str, dict[str, Any]]:
    """Reads the remembered hashes of files: path -> stamp and hash; empty where lost."""
    found = _json(file, _NOTE_BYTES)
    try:
        return {path: one.model_dump() for path, one in _SEEN.validate_python(found).items()}
    except ValidationError:
        return {}


def _json(file: Path, most: int) -> Any:
    """Reads a JSON file; None where it cannot be read."""
    try:
        descriptor = os.open(file, os.O_RDONLY | open_flags("O_NONBLOCK", "O_CLOEXEC"))
        with os.fdopen(descriptor, "rb") as stream:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode) or status.st_size > most:
                return None
            return json.loads(stream.read(most))
    except (OSError, ValueError, RecursionError):
        return None


def _sum(manifest: Mapping[str, Any]) -> str:
    """Hashes a manifest without the times at which its files were last checked."""
    files: Iterable[tuple[str, Any]] = manifest["files"].items()
    body = {key: value for key, value in manifest.items() if key != "sum"}
    body["files"] = {name: entry["sha256"] for name, entry in files}
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
