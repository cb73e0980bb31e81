"""The work of `export` and `verify` on single checkpoints and engines."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from prune_export import registry
from prune_export.calibrate import TokenSet, token_set
from prune_export.checkpoint import Checkpoint, resolve_model
from prune_export.cli import console
from prune_export.contracts import BuildRecord
from prune_export.deriving.cache import ensure_family
from prune_export.errors import PlanError
from prune_export.execution.asked import config_of
from prune_export.execution.context import RunContext
from prune_export.execution.engines import export_engine
from prune_export.execution.inputs import open_base
from prune_export.execution.result import Result, alone, mend
from prune_export.machine import Machine, describe
from prune_export.planning.positions import refuse_long_text
from prune_export.progress import Progress
from prune_export.recipe import Export, LocalText, Recipe
from prune_export.report.sparse import kernels_text, stray_text, weights_text
from prune_export.results.opening import report_of, reported_engines
from prune_export.store import Store
from prune_export.system.places import judged
from prune_export.verify import (
    Engine,
    measure_generation,
    measure_parity,
    measure_perplexity,
    measure_placement,
    measure_reload,
    measure_sparsity,
    not_from_rounding,
    tokens_without_text,
)
from prune_export.verify.results import Verification


def exported(
    checkpoint: str,
    to: str,
    sets: Sequence[str],
    out: Path,
    *,
    store: Path,
    machine: Machine,
    ignore_keys: tuple[str, ...],
    progress: Progress,
    command: str,
) -> dict[str, Any]:
    """Makes an engine and copies it to `out`; gives its build record.

    Raises:
        PlanError: an unknown exporter, a model that it cannot take, or an `out` that is not empty.
        StageError: something came in the way of the engine as it was put there.
    """
    registry.find("exporters", to)
    judged(out, {"the store": store}, again=False)
    export = _export(to, sets)
    context = RunContext(Store(store), machine, progress, ignore_keys=ignore_keys, command=command)
    path, revision = resolve_model(checkpoint)
    ensure_family(config_of(path), store)
    real = judged(out, {"the store": store, "the model": path}, again=False)
    mend(real)
    base = open_base(context, checkpoint, path, revision)
    export.entry.check(Checkpoint.open(base.path).arch(ignore_keys), machine)
    made = export_engine(context, export, base.path, base.id)
    with alone(real):
        result = Result(real, again=False)
        result.add(made)
        result.finish()
    return dict(made.record)


def _export(to: str, sets: Sequence[str]) -> Export:
    overrides = [f"export.0.{to}.{assignment}" for assignment in sets]
    recipe = Recipe.parse(f"recipe: 1\nexport:\n  - {to}: {{}}\n", name=to, overrides=overrides)
    return recipe.export[0]


def verified(
    directory: Path,
    data: Sequence[Path],
    *,
    samples: int,
    length: int,
    trust: bool,
    store: Path,
    machine: Machine,
    progress: Progress,
) -> Verification:
    """Measures a result directory again.

    Raises:
        CheckpointError: the directory is not a result, or its checkpoint is broken.
        PlanError: the windows of text are longer than the model takes.
    """
    opened = Checkpoint.open(directory)
    ensure_family(opened, store)
    config = opened.full_config()
    if data:
        refuse_long_text("--length", length, config)
    engines = reported_engines(directory, trust, store)
    text = text_of(data, directory, samples, length, progress) if data else None
    reference = Engine.pytorch(directory)
    found = Verification(
        reload=measure_reload(directory, machine, progress=progress), machine=describe()
    )
    ids = text.ids.numpy() if text is not None else tokens_without_text()
    for name, engine in list(engines.items()):
        if why := engine.why_not(machine):
            found.unverified[name] = why
            del engines[name]
            continue
        found.parity.append(measure_parity(engine, reference, ids, machine, progress=progress))
        found.placement.extend(measure_placement(engine, machine, progress=progress))
    report = report_of(directory)
    made = any("mask_digest" in stage.log for stage in report.stages) if report else False
    for export in report.exports if report else ():
        record = BuildRecord.from_json(asdict(export))
        sparse = measure_sparsity(record, directory / export.directory)
        found.sparsity.extend(not_from_rounding(sparse, record, zeros_made=made))
    found.generation.append(
        measure_generation("result", reference, directory, machine, progress=progress)
    )
    if text is not None:
        for name, engine in {"result": reference, **engines}.items():
            found.perplexity.append(
                measure_perplexity(name, engine, text, machine, progress=progress)
            )
    return found


def show_verification(found: Verification) -> None:
    """Prints what was measured, a table a kind."""
    state = "loads" if found.reload.ok else f"missing {found.reload.missing}, unexpected "
    state += "" if found.reload.ok else str(found.reload.unexpected)
    console.output.put(f"reload  {state} ({found.reload.model_type})")
    rows: list[tuple[str, ...]]
    for name, why in found.unverified.items():
        console.output.put(f"engine  {name} was not verified: {why}")
    if found.parity:
        rows = [
            (one.engine, "agrees" if one.ok else "DIFFERS", f"{one.max_logit_error:.2e}",
             f"{one.mean_kl:.2e}", f"{one.greedy_equal} of {one.greedy_total}")
            for one in found.parity
        ]  # fmt: skip
        columns = ["engine", "with PyTorch", "largest logit error", "mean KL", "greedy tokens"]
        console.table("", columns, rows)
    if found.perplexity:
        rows = [(p.name, f"{p.value:.2f}", f"{p.windows} x {p.length}") for p in found.perplexity]
        console.table("", ["perplexity of", "value", "windows"], rows)
    if found.generation:
        rows = [(g.name, str(g.prompts), str(g.empty), str(g.repetitive), str(g.broken))
                for g in found.generation]  # fmt: skip
        console.table("", ["generation of", "prompts", "empty", "repetitive", "broken"], rows)
    for placed in found.placement:
        nodes = ", ".join(f"{name} {count}" for name, count in placed.providers.items())
        console.output.put(f"nodes   {placed.engine}: {nodes}")
        if not placed.ok:
            console.output.put(f"        FAILED: {stray_text(placed)}")
    if found.sparsity:
        rows = [(one.engine, weights_text(one), kernels_text(one)) for one in found.sparsity]
        console.table("", ["sparsity of", "weights", "kernels"], rows)
    if found.speed:
        rows = [
            (f"{one.engine} {one.phase}", f"{one.ratio:.2f}x", f"{one.low:.2f} to {one.high:.2f}",
             f"{one.floor_low:.2f} to {one.floor_high:.2f}", one.verdict)
            for one in found.speed
        ]  # fmt: skip
        console.table("", ["speed of", "ratio", "95 % interval", "noise floor", "verdict"], rows)


def text_of(
    data: Sequence[Path], tokenizer: Path, samples: int, length: int, progress: Progress
) -> TokenSet:
    """Text files as windows of tokens, one stream cut into pieces of `length`.

    Raises:
        PlanError: no such file.
    """
    files = [file.resolve() for file in data]
    for file in files:
        if not file.is_file():
            raise PlanError(f"--data {file}", "no such file", "give .txt, .jsonl or .parquet files")
    root = Path(os.path.commonpath([file.parent for file in files]))
    names = tuple(str(file.relative_to(root)) for file in files)
    source = LocalText(files=names, samples=samples, length=length, packing="stream")
    return token_set(source, tokenizer, root, progress=progress)
