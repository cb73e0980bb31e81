"""Exports engines, through the store."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from prune_export.calibrate import (
    TokenSet,
)
from prune_export.checkpoint import Checkpoint
from prune_export.contracts import BuildRecord, TimesMachine, Work
from prune_export.errors import StageError
from prune_export.execution.context import RunContext
from prune_export.recipe import Export
from prune_export.store import Artifact, Key
from prune_export.surgery import write_text_alone

_TEXT_VERSION: Final = "1"


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

    `tokens` reach exporters that calibrate, and are part of what their engines depend on. Of a
    model of images and text the engine holds the language model alone.
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
        record: BuildRecord = export.entry.export(plain, files, work)
        if record.exporter != export.name:
            raise StageError(
                f"export: {export.name}",
                f"its record says that `{record.exporter}` made it, and by that name it would "
                "be opened again",
                f'write `BuildRecord(exporter="{export.name}", …)`, the name of the entry point',
            )
        return record.to_json()

    plain = source if context.store.get(key.id) else _plain(context, source, source_id)
    return context.make(key, f"export: {export.name}{of}", build)


def _plain(context: RunContext, source: Path, source_id: str) -> Path:
    """A plain checkpoint of the language model: the one given, or taken out of a larger model."""
    opened = Checkpoint.open(source)
    if opened.wrapped is None:
        return source

    def build(files: Path, work: Work) -> Mapping[str, Any]:
        write_text_alone(opened, files, work.progress)
        return {}

    key = Key("import", "text_alone", _TEXT_VERSION, {}, (source_id,))
    return context.make(key, "take out the language model", build).path
