"""Makes checkpoints of given shapes, whose weights do not matter: engines of them are timed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Final

from prune_export.arch import Arch
from prune_export.checkpoint import Checkpoint
from prune_export.contracts import Work
from prune_export.execution.context import RunContext
from prune_export.store import Artifact, Key
from prune_export.surgery import Edit, rewrite

_VERSION: Final = "1"


def checkpoint_of_shapes(
    context: RunContext,
    name: str,
    parameters: Mapping[str, Any],
    path: Path,
    source_id: str,
    arch: Arch,
    edits: Iterable[Edit],
    *,
    title: str,
) -> Artifact:
    """Cuts the checkpoint at `path`, by edits that no score has chosen, into the store.

    `name` and `parameters` (JSON) say in its key what the shapes are.
    """
    key = Key("shapes", name, _VERSION, dict(parameters), (source_id,))

    def build(files: Path, work: Work) -> Mapping[str, Any]:
        rewrite(
            Checkpoint.open(path),
            arch,
            edits,
            files,
            ram_bytes=work.machine.ram_bytes,
            progress=work.progress,
        )
        return {}

    return context.make(key, title, build)
