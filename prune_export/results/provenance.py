"""Loads a result directory as a model, with its provenance."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from prune_export.checkpoint import Checkpoint
from prune_export.checkpoint.loading import load_whole_model
from prune_export.errors import CheckpointError
from prune_export.recipe import PUBLISHED_NAME, Recipe
from prune_export.store import sha256_of_file
from prune_export.system.files import REPORT_BYTES, read_json_object
from prune_export.system.written import LOCK, listed


@dataclass(frozen=True)
class Provenance:
    """How a result was made, from its lock and its report.

    `base` is the model that it was made from (a Hub id, or the last part of a path), `revision` its
    commit on the Hub. `artifacts` are the ids of the stages and engines by their place in the
    recipe, `versions` those of what wrote them, and `files` the sha256 of each file by its path
    below the directory, None where the run noted none. `report` is report.json.
    """

    path: Path
    base: str
    revision: str | None
    artifacts: Mapping[str, str]
    versions: Mapping[str, str]
    files: Mapping[str, str | None] = field(repr=False)
    report: Mapping[str, Any] = field(repr=False)

    def recipe(self) -> Recipe:
        """The recipe as it was written.

        Raises:
            RecipeError: the file beside the model is no recipe of this version.
        """
        return Recipe.load(self.path / PUBLISHED_NAME)

    def changed(self) -> tuple[str, ...]:
        """Lists the files that are missing, or not byte for byte what the run wrote; hashes all."""
        return tuple(
            name
            for name, digest in sorted(self.files.items())
            if not (self.path / name).is_file()
            or (digest is not None and sha256_of_file(self.path / name) != digest)
        )


@dataclass(frozen=True)
class Loaded:
    """A transformers model and, where the directory is a result of this tool, its provenance."""

    model: Any = field(repr=False)
    provenance: Provenance | None


def load(path: str | Path, *, dtype: str = "auto", device: str | None = None) -> Loaded:
    """Loads the model of a result directory, and how it was made.

    Stock transformers opens it, without remote code and without a network; model types of this
    package (`layout: narrow`) are made known first. `dtype` is what transformers takes (`"auto"`:
    as stored, `"float32"`, `"bfloat16"` …), `device` where the model is moved to.

    Raises:
        CheckpointError: it is no checkpoint, is incomplete, or its lock cannot be read.
        UnsupportedArch: transformers does not know the model type.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise CheckpointError(
            str(folder),
            "is no directory, expected what `prune-export run` wrote to `--out`",
            "give the directory that holds config.json and the weights",
        )
    Checkpoint.open(folder)
    known = provenance_of(folder)
    model = load_whole_model(folder, dtype=dtype).eval()
    return Loaded(model.to(device) if device else model, known)


def provenance_of(folder: Path) -> Provenance | None:
    """Reads the provenance of a result from its lock and report; None where there is no lock.

    Raises:
        CheckpointError: one of them cannot be read, or is not of the form that this tool writes.
    """
    file = folder / LOCK
    if not file.is_file():
        return None
    lock = read_json_object(file, "the lock of a result", REPORT_BYTES)
    written = folder / "report.json"
    report = (
        read_json_object(written, "the report of a run", REPORT_BYTES) if written.is_file() else {}
    )
    try:
        base, made = lock["base"], lock["artifacts"]
        revision = base["revision"]
        return Provenance(
            path=folder,
            base=str(base["model"]),
            revision=None if revision is None else str(revision),
            artifacts={str(name): str(entry["id"]) for name, entry in made.items()},
            versions={str(name): str(version) for name, version in lock["versions"].items()},
            files=listed(folder),
            report=report,
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            str(file),
            f"is not a lock of this tool: {type(error).__name__} {error}",
            "take the file of the run that made the model, or remove it",
        ) from None
