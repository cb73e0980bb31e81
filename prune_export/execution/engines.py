"""Exports engines, through the store."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from prune_export.calibrate import (
    TokenSet,
)
from prune_export.contracts import BuildRecord, TimesMachine, Work
from prune_export.errors import StageError
from prune_export.execution.context import RunContext
from prune_export.recipe import Export
from prune_export.store import Artifact, Key


def export_engine(
    context: RunContext,
    export: Export,
    source: Path,
    source_id: str,
    *,
    of: str = "",
    tokens: TokenSet | None = None,
) -> Artifact:
    """Exports a checkpoint to an engine; the artifact's record is its `BuildRecord`.

    `tokens` reach exporters that calibrate, and are part of what their engines depend on.
    """
    read = tokens if export.calibrates else None
    parameters = export.parameters()
    if isinstance(export.entry, TimesMachine) and export.entry.times_machine:
        parameters["timed on"] = context.machine.timing_identity()
    key = Key(
        "export",
        export.name,
        export.entry.VERSION,
        parameters,
        (source_id,),
        read.fingerprint if read else None,
    )

    def build(files: Path, work: Work) -> Mapping[str, Any]:
        work = replace(work, tokens=read)
        record: BuildRecord = export.entry.export(source, files, work)
        if record.exporter != export.name:
            raise StageError(
                f"export: {export.name}",
                f"its record says that `{record.exporter}` made it, and by that name it would "
                "be opened again",
                f'write `BuildRecord(exporter="{export.name}", …)`, the name of the entry point',
            )
        return record.to_json()

    return context.make(key, f"export: {export.name}{of}", build)
