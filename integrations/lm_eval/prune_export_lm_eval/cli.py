"""The command `lm-eval`."""

from __future__ import annotations

import json as json_of
from pathlib import Path
from typing import Annotated

import typer


def lm_eval(
    directory: Annotated[
        Path, typer.Argument(metavar="DIR", help="A result, a checkpoint, or an exported engine.")
    ],
    tasks: Annotated[
        list[str], typer.Option("--tasks", "-t", metavar="NAME", help="A task. Repeatable.")
    ],
    engine: Annotated[
        str,
        typer.Option(metavar="EXPORTER", help="`pytorch`, or an exporter whose engine is there."),
    ] = "pytorch",
    limit: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Documents of each task; all by default.")
    ] = None,
    include: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Your own task files; they may hold code that is run."),
    ] = None,
    trust_engine: Annotated[
        bool, typer.Option("--trust-engine", help="Open an engine that holds machine code.")
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Evaluate an engine itself with lm-evaluation-harness: any task, any engine.

    prune-export lm-eval out/ --engine ort_genai --tasks arc_easy --limit 100
    """
    from prune_export.errors import MissingExtra

    try:
        from lm_eval import simple_evaluate
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise MissingExtra.of("lm-eval", "lm-eval", "eval") from error
    from prune_export_lm_eval.model import EngineLM

    model = EngineLM(str(directory), engine=engine, trust_engine=trust_engine)
    done = simple_evaluate(
        model=model, tasks=tasks, limit=limit, bootstrap_iters=0, log_samples=False,
        task_manager=TaskManager(include_path=str(include) if include else None),
    )  # fmt: skip
    results = done["results"]
    if json:
        typer.echo(json_of.dumps(results, default=str))
        return
    for task, values in results.items():
        for metric, value in values.items():
            if isinstance(value, float) and not metric.endswith("_stderr,none"):
                typer.echo(f"{task}  {metric.removesuffix(',none')}  {value:.4f}")
