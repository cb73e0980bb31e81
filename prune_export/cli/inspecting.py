"""The work of `inspect`: finds model and text, measures, draws, prints."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from prune_export.checkpoint import Checkpoint, resolve_model
from prune_export.cli import console
from prune_export.deriving.cache import ensure_family
from prune_export.errors import PlanError
from prune_export.execution.asked import config_of
from prune_export.execution.context import RunContext
from prune_export.execution.inputs import make_tokens, open_base
from prune_export.inspect import SOURCE, Inspection, draw, inspect_model
from prune_export.machine import Machine
from prune_export.progress import Progress
from prune_export.recipe import LocalText
from prune_export.store import Store
from prune_export.system.places import judged_picture
from prune_export.system.temporary import Temporary


def inspected(
    model: str,
    data: Sequence[Path],
    *,
    samples: int,
    length: int,
    seed: int,
    picture: Path,
    store: Path,
    machine: Machine,
    ignore_keys: tuple[str, ...],
    progress: Progress,
    command: str,
) -> Inspection:
    """Measures a model over text files and draws the picture.

    Raises:
        PlanError: no such file, too little text, or a picture that cannot be written.
        CheckpointError: the model is broken.
    """
    judged_picture(picture, SOURCE)
    files = [file.resolve() for file in data]
    for file in files:
        if not file.is_file():
            raise PlanError(f"--data {file}", "no such file", "give .txt, .jsonl or .parquet files")
    context = RunContext(Store(store), machine, progress, ignore_keys=ignore_keys, command=command)
    path, revision = resolve_model(model)
    ensure_family(config_of(path), store)
    base = open_base(context, model, path, revision)
    root = Path(os.path.commonpath([file.parent for file in files]))
    names = tuple(str(file.relative_to(root)) for file in files)
    source = LocalText(files=names, samples=samples, length=length, seed=seed, packing="packed")
    _, tokens = make_tokens(context, "inspection", source, root, base)
    with Temporary() as scratch:
        found = inspect_model(Checkpoint.open(base.path), tokens, machine, progress,
                              scratch=scratch, name=Path(model).name,
                              ignore_keys=ignore_keys)  # fmt: skip
    draw(found, picture)
    return found


def shown(found: Inspection, picture: Path, *, as_json: bool) -> None:
    """Prints the best run of each size and the influence of each block."""
    if as_json:
        console.print_json(found.to_json())
        return
    rows = []
    for run in found.best_runs:
        margin = "" if run.margin is None else f"{run.margin:.4f} (block {run.runner_up})"
        blocks = f"{run.first} to {run.first + run.remove - 1}"
        rows.append((str(run.remove), blocks, f"{run.distance:.4f}", margin))
    columns = ["remove", "blocks", "distance (π)", "next best is further by"]
    console.table(f"{found.model}: best runs by angular distance", columns, rows)
    console.output.put()
    ranked = sorted(range(found.layers), key=found.block_influence.__getitem__)
    scores = [(str(block), f"{found.block_influence[block]:.4f}") for block in ranked]
    console.table("Block influence, least first", ["block", "1 - mean cosine"], scores)
    console.output.put(f"\npicture  {picture}")
