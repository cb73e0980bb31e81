"""Finds the engines of a result, a checkpoint or an engine's own directory, ready to be opened."""

from __future__ import annotations

import re
from dataclasses import asdict, replace
from pathlib import Path
from typing import Final

from prune_export import registry
from prune_export.contracts import BuildRecord
from prune_export.errors import CheckpointError
from prune_export.exporter_facts import ExporterFacts
from prune_export.report.reading import ExportReading, Report
from prune_export.store import Store
from prune_export.system.files import is_regular
from prune_export.verify.engine import PYTORCH, Engine

_NAME: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,199}")
"""A file or folder beside report.json, and no path that leads away from there."""


def engines(
    directory: Path, *, trust: bool = False, store: Path | None = None
) -> dict[str, Engine]:
    """Finds what can be opened in a directory, by exporter; `pytorch` is its checkpoint.

    `directory` is a result, a checkpoint, or an engine that `export` made. Engines that hold
    machine code are opened only if `store` made them, or where `trust` vouches for them.

    Raises:
        CheckpointError: there is nothing, or a report names what is not there.
    """
    found: dict[str, Engine] = {}
    if any(directory.glob("*.safetensors")):
        found[PYTORCH] = Engine.pytorch(directory)
    found |= reported_engines(directory, trust, store)
    alone = {} if found else _standing_alone()
    for name in (name for name, file in alone.items() if is_regular(directory / file)):
        found[name] = Engine(name, directory)
        break
    if not found:
        raise CheckpointError(
            str(directory), "holds neither a checkpoint nor an engine",
            "name the `out/` of a run, a checkpoint's directory, or an exported engine's",
        )  # fmt: skip
    return found


def reported_engines(directory: Path, trust: bool, store: Path | None) -> dict[str, Engine]:
    """Finds the engines that a result's report names.

    Raises:
        CheckpointError: one of them is not there, or not beside the report.
    """
    found = {}
    for export in _exports(directory):
        path = directory / export.directory
        if not path.is_dir():
            raise CheckpointError(str(path), "is missing, but report.json names it", "export again")
        engine = Engine.of(BuildRecord.from_json(asdict(export)), path)
        if engine.runs_code and (trust or _made_here(store, path)):
            engine = replace(engine, trusted=True)
        found[export.exporter] = engine
    return found


def _standing_alone() -> dict[str, str]:
    """By exporter, the file by which its engines are known; those of most files first."""
    found = {name: ExporterFacts.of_name(name).alone for name in registry.names("exporters")}
    return {name: file for name, file in sorted(found.items(), reverse=True) if file}


def report_of(directory: Path) -> Report | None:
    """Reads a result's report; None where it has none."""
    file = directory / "report.json"
    return Report.load(file) if file.is_file() else None


def _made_here(store: Path | None, engine: Path) -> bool:
    return store is not None and store.is_dir() and Store(store, make=False).made("export", engine)


def _exports(directory: Path) -> list[ExportReading]:
    """Reads the build records from a result's report; nothing where it has none."""
    file, report = directory / "report.json", report_of(directory)
    found = report.exports if report else []
    for number, export in enumerate(found):
        for key, name in (("directory", export.directory), ("graph", export.graph)):
            if name and not _NAME.fullmatch(name):
                raise CheckpointError(
                    f"{file}  exports.{number}.{key}",
                    f"got {name!r:.80}, expected the name of something in the result's directory",
                    "do not use this result: a sound report names what lies beside it",
                )
    return found
