"""The commands `smaller` and `faster`: what is wanted of a model, in one line."""

from __future__ import annotations

import json as json_text
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Final, Literal

import typer

from prune_export.cli import options
from prune_export.cli.running import carry_out
from prune_export.errors import PlanError

_TARGET: Final = "stages.0.search.target"
_ENGINES: Final = "stages.0.search.engines"
_MUCH: Final = 0.33
"""The fraction taken away from which on the candidates of `smaller-40` are tried."""
_FAST: Final = 1.75
"""The speedup from which on the candidates of `faster-2x` are tried."""

_MARGIN: Final = 0.95
"""Of the speed asked for, what must be measured in the end: a search comes within 5 % of it."""

_BITS: Final = {"fp32": 32, "bf16": 16, "fp16": 16, "int8": 8, "int4": 4}

Model = Annotated[str, typer.Argument(metavar="MODEL", help="Hub id, directory or .gguf.")]
Out = Annotated[Path, typer.Option("--out", "-o", metavar="DIR", help="The result directory.")]
Precision = Annotated[
    Literal["fp32", "int8", "int4"] | None,
    typer.Option(help="The coarsest precision that may be chosen; any unless given."),
]
Runtime = Annotated[
    list[str] | None,
    typer.Option(metavar="EXPORTER", help="Only this runtime: `onnx`, `ort_genai`. Repeatable."),
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Only print the plan.")]


def smaller(
    model: Model,
    out: Out,
    by: Annotated[
        str, typer.Option(metavar="PERCENT", help="How much of its size to take away: `25%`.")
    ] = "25%",
    data: options.Data = None,
    time: options.Time = None,
    precision: Precision = None,
    runtime: Runtime = None,
    store: options.StoreDir = None,
    ram: options.Ram = None,
    threads: options.Threads = None,
    device: options.Device = None,
    dry_run: DryRun = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
) -> None:
    """Make a model smaller, by whatever is measured to cost the least quality.

    prune-export smaller ./SmolLM2-135M --by 25% --data notes.txt --out out/

    Ways to prune it compete with coarser numbers (int8, int4) and with both together.
    """
    taken = _fraction(by)
    _carry_out(
        "smaller-40" if taken >= _MUCH else "smaller-25",
        [f"{_TARGET}.parameters={1 - taken:.6g}"],
        model, out, data, time, precision, runtime, store, ram, threads, device,
        dry_run=dry_run, json=json, quiet=quiet,
    )  # fmt: skip


def faster(
    model: Model,
    out: Out,
    by: Annotated[
        str, typer.Option(metavar="TIMES", help="How many times as fast it shall decode: `1.5`.")
    ] = "1.5",
    data: options.Data = None,
    time: options.Time = None,
    precision: Precision = None,
    runtime: Runtime = None,
    store: options.StoreDir = None,
    ram: options.Ram = None,
    threads: options.Threads = None,
    device: options.Device = None,
    dry_run: DryRun = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
) -> None:
    """Make a model decode faster here, by whatever is measured to cost the least quality.

    prune-export faster ./SmolLM2-135M --by 1.5 --data notes.txt --out out/

    Ways to prune it compete with coarser numbers (int8, int4) and with both together.
    """
    wanted = _times(by)
    _carry_out(
        "faster-2x" if wanted >= _FAST else "faster-1.5x",
        [f"{_TARGET}.speedup={wanted:.6g}", f"verify.speed.at_least={wanted * _MARGIN:.6g}"],
        model, out, data, time, precision, runtime, store, ram, threads, device,
        dry_run=dry_run, json=json, quiet=quiet,
    )  # fmt: skip


def _carry_out(
    name: str,
    overrides: Sequence[str],
    model: str,
    out: Path,
    data: Sequence[Path] | None,
    time: str | None,
    precision: str | None,
    runtime: Sequence[str] | None,
    store: Path | None,
    ram: str | None,
    threads: int | None,
    device: str | None,
    *,
    dry_run: bool,
    json: bool,
    quiet: bool,
) -> None:
    from prune_export.execution import Options, with_data
    from prune_export.recipe import Recipe

    written = Recipe.load(name)
    limited = _limited(written, precision, runtime or ())
    recipe = Recipe.load(written.name, overrides=[*overrides, *limited])
    recipe, named = with_data(recipe, model, data or (), own=True)
    chosen = Options(
        out=out,
        store=options.store_directory(store),
        machine=options.machine(ram, threads, device),
        seconds=options.seconds(time),
        command=options.command_line(),
    )
    carry_out(recipe, named, chosen, dry_run=dry_run, json=json, quiet=quiet)


def _limited(recipe: object, precision: str | None, runtimes: Sequence[str]) -> list[str]:
    """The overrides that leave only those engines of a recipe that precision and runtime allow.

    The first engine stays: all others are measured against it.
    """
    from prune_export.recipe.engines import QUANTIZE

    stage = recipe.stages[0]  # type: ignore[attr-defined]
    engines = [dict(one) for one in getattr(stage.entry, "engines", ())]
    if not engines or not (precision or runtimes):
        return []
    names = {name for one in engines for name in one if name != QUANTIZE}
    for name in runtimes:
        if name not in names:
            raise PlanError(
                f"--runtime {name}",
                f"is none of those that are tried here: {', '.join(sorted(names))}",
                "name one of them, or write a recipe with the exporter that you want",
            )
    left = [
        one
        for one in engines[1:]
        for name, keys in one.items()
        if name != QUANTIZE
        and (not runtimes or name in runtimes)
        and (precision is None or _bits(keys) >= _BITS[precision])
    ]
    return [f"{_ENGINES}={json_text.dumps([engines[0], *left])}"]


def _bits(keys: object) -> int:
    found = keys.get("precision", "fp32") if isinstance(keys, dict) else "fp32"
    return _BITS.get(str(found), 32)


def _fraction(by: str) -> float:
    """Reads `25%`, `25` or `0.25`.

    Raises:
        PlanError: it is no part of a whole.
    """
    number = _number(by.strip().removesuffix("%"))
    found = number / 100 if number is not None and ("%" in by or number >= 1) else number
    if found is None or not 0.02 <= found <= 0.95:
        raise PlanError(
            f"--by {by}",
            "is not how much of a model can be taken away, expected 2% to 95%",
            "write for example `--by 25%`: a quarter less",
        )
    return found


def _times(by: str) -> float:
    """Reads `1.5`, `1.5x` or `50%`.

    Raises:
        PlanError: it is not faster, or impossibly fast.
    """
    text = by.strip()
    number = _number(text.removesuffix("%").removesuffix("x").removesuffix("×"))
    found = 1 + number / 100 if number is not None and text.endswith("%") else number
    if found is None or not 1.02 <= found <= 20:
        raise PlanError(
            f"--by {by}",
            "is not how many times as fast a model can be made, expected 1.02 to 20",
            "write for example `--by 1.5`: half as much again",
        )
    return found


def _number(text: str) -> float | None:
    return float(text) if re.fullmatch(r"\d+(\.\d+)?|\.\d+", text.strip()) else None
