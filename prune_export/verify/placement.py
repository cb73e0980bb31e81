"""Finds which execution provider runs each node of an engine, so that no fallback is silent."""

from __future__ import annotations

from prune_export.machine import Machine
from prune_export.progress import Progress, Silent
from prune_export.verify.engine import Engine
from prune_export.verify.results import Placed
from prune_export.verify.session import Session


def measure_placement(
    engine: Engine, machine: Machine, *, progress: Progress | None = None
) -> list[Placed]:
    """Measures which providers run `engine`'s nodes; empty where its runtime has none.

    Raises:
        StageError: the engine does not open, or its provider is not there at all.
    """
    with (progress or Silent()).task(f"nodes of {engine.exporter}", 1) as task:
        with Session(engine, machine) as session:
            found = session.placement()
        task.advance()
    if found is None:
        return []
    providers = {name: int(count) for name, count in found["providers"].items()}
    return [Placed(engine.exporter, found["asked"], providers, list(found["strayed"]))]
