"""The command `compare`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer

from prune_export.cli import console, options
from prune_export.errors import PlanError

if TYPE_CHECKING:
    import numpy as np

    from prune_export.calibrate import TokenSet
    from prune_export.machine import Machine
    from prune_export.progress import Progress
    from prune_export.recipe.stages import Workload
    from prune_export.report.comparison import Comparison
    from prune_export.verify import Engine

_ALL: Final = "all"
_PYTORCH: Final = "pytorch"


def compare(
    places: Annotated[
        list[Path],
        typer.Argument(
            metavar="DIR...",
            help="Checkpoints and results; the first is what others stand against.",
        ),
    ],
    engine: Annotated[
        list[str] | None,
        typer.Option(
            metavar="EXPORTER",
            help="`pytorch`, an exporter that every directory holds, or `all` that each holds. "
            "Repeatable.",
        ),
    ] = None,
    data: Annotated[
        list[Path] | None,
        typer.Option("--data", "-d", metavar="FILE", help="Text for perplexity. Repeatable."),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", "-o", metavar="DIR", help="Write comparison.html and comparison.png there."
        ),
    ] = None,
    reported: Annotated[
        bool,
        typer.Option(
            "--from-reports", help="Measure nothing: compare what the results' reports say."
        ),
    ] = False,
    prompt: Annotated[int, typer.Option(min=1, metavar="N", help="Prompt tokens.")] = 128,
    new: Annotated[int, typer.Option(min=1, metavar="N", help="New tokens.")] = 32,
    batch: Annotated[int, typer.Option(min=1, metavar="N", help="Sequences at once.")] = 1,
    minutes: Annotated[
        float, typer.Option(min=0.05, metavar="N", help="Time limit of timing each of the others.")
    ] = 2.0,
    no_speed: Annotated[
        bool, typer.Option("--no-speed", help="Time nothing: quality and bytes alone.")
    ] = False,
    trust_engine: options.TrustEngine = False,
    store: options.StoreDir = None,
    ram: options.Ram = None,
    threads: options.Threads = None,
    device: options.Device = None,
    json: options.Json = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
) -> None:
    """Compare models and engines in quality, speed and bytes: one table, one Pareto figure.

    prune-export compare ./Llama-3.1-8B out/ --data corpus.jsonl
    prune-export compare out-a/ out-b/ out-c/ --engine all --data corpus.jsonl --out compared/
    prune-export compare out-a/ out-b/ --from-reports --out compared/

    Each is timed in turns with the first; a difference counts only beyond the noise floor.
    """
    from prune_export.recipe.stages import Workload
    from prune_export.report.comparison import COLUMNS, from_reports, write_comparison

    if out is not None and out.exists() and not out.is_dir():
        raise PlanError(f"--out {out}", "is a file, expected a directory", "name another place")
    if reported:
        found = from_reports(places)
    else:
        found = compared(
            places, engine or [_PYTORCH], data or [], workload=Workload(batch, prompt, new),
            minutes=0.0 if no_speed else minutes, trust=trust_engine,
            store=options.store_directory(store), machine=options.machine(ram, threads, device),
            progress=console.progress(quiet=quiet or json),
        )  # fmt: skip
    written = write_comparison(found, out) if out is not None else []
    if json:
        console.print_json(found.to_json())
        return
    console.table("", COLUMNS, found.rows, left=[0, 1, 7])
    for text in found.caveats:
        console.output.put(f"note: {text}")
    for path in written:
        console.output.put(str(path))


@dataclass(frozen=True)
class _Candidate:
    """An engine to measure, and how the table calls it; `place` is its directory's."""

    label: str
    runtime: str
    place: Path
    engine: Engine
    bytes: int


def compared(
    places: Sequence[Path],
    engines: Sequence[str],
    data: Sequence[Path],
    *,
    workload: Workload,
    minutes: float,
    trust: bool,
    store: Path,
    machine: Machine,
    progress: Progress,
) -> Comparison:
    """Measures every engine against the first one, and the perplexity of each.

    With 0 `minutes` nothing is timed.

    Raises:
        PlanError: a directory lacks an engine, a model takes no such request, tokenizers differ
            where perplexities are to be compared, or there is one engine alone.
    """
    from prune_export.machine import describe
    from prune_export.report.comparison import Comparison, Entry, as_reference, with_speed
    from prune_export.verify import (
        Effort,
        measure_perplexity,
        measure_speed,
        tokens_without_text,
    )

    candidates = _candidates(places, engines, trust, store, workload)
    text = _same_text(data, candidates, progress) if data else None
    ids: np.ndarray = text.ids.numpy() if text is not None else tokens_without_text()
    entries = [
        Entry(
            one.label, one.runtime, bytes=one.bytes,
            perplexity=measure_perplexity(one.label, one.engine, text, machine, progress=progress)
            if text is not None
            else None,
        )
        for one in candidates
    ]  # fmt: skip
    others = [
        with_speed(
            entry,
            measure_speed(
                candidates[0].engine, one.engine, [workload], ids, machine, name=one.label,
                effort=Effort(seconds=minutes * 60), progress=progress,
            ),
        )
        if minutes
        else entry
        for one, entry in zip(candidates[1:], entries[1:], strict=True)
    ]  # fmt: skip
    caveats = [] if text is not None else ["without `--data` no quality was measured"]
    return Comparison(
        (as_reference(entries[0], others), *others), tuple(caveats), describe()
    )  # fmt: skip


def _candidates(
    places: Sequence[Path], engines: Sequence[str], trust: bool, store: Path, workload: Workload
) -> list[_Candidate]:
    """Every engine that is asked for, the first one's first."""
    from prune_export.checkpoint import Checkpoint
    from prune_export.planning.positions import refuse_long_request
    from prune_export.report.comparison import labels_of, runtime_text, weight_file_bytes
    from prune_export.results.opening import reported_engines
    from prune_export.verify import Engine

    found: list[_Candidate] = []
    for place, label in zip(places, labels_of(places), strict=True):
        checkpoint = Checkpoint.open(place)
        plain = Engine.pytorch(place, weight_bytes=checkpoint.nbytes)
        held = {_PYTORCH: plain, **reported_engines(place, trust, store)}
        wanted = list(held) if _ALL in engines else list(dict.fromkeys(engines))
        for name in wanted:
            if name not in held:
                raise PlanError(
                    f"--engine {name}",
                    f"{place} holds {', '.join(list(held)[1:]) or 'no engines'}",
                    "compare with `--engine pytorch`, or export it",
                )
            one = held[name]
            refuse_long_request(
                "--prompt and --new", workload.prompt, workload.new, plain.positions, one.longest
            )
            size = checkpoint.nbytes if name == _PYTORCH else weight_file_bytes(one.path)
            full = label if len(wanted) == 1 else f"{label}/{name}"
            found.append(
                _Candidate(full, runtime_text(name, dict(one.parameters)), place, one, size)
            )
    if len(found) < 2:
        raise PlanError(
            "compare", f"found only {found[0].label if found else 'nothing'}",
            "name a second directory, or `--engine all`",
        )  # fmt: skip
    return found


def _same_text(
    data: Sequence[Path], candidates: Sequence[_Candidate], progress: Progress
) -> TokenSet:
    """The text as tokens of the first model, which must be everybody's.

    Raises:
        PlanError: another model's tokenizer makes other tokens of it.
    """
    from prune_export.cli.engines import text_of
    from prune_export.verify import Engine

    length = min([512, *(p for one in candidates if (p := Engine.pytorch(one.place).positions))])
    first = candidates[0].place
    text = text_of(data, first, 16, length, progress)
    for place in dict.fromkeys(one.place for one in candidates[1:]):
        if _tokenizer(place) != _tokenizer(first):
            theirs = text_of(data, place, 16, length, progress).ids
            if theirs.shape != text.ids.shape or not bool((theirs == text.ids).all()):
                raise PlanError(
                    f"compare {place}",
                    f"its tokenizer makes other tokens of this text than that of {first}, so "
                    "perplexities per token cannot be compared",
                    "leave out `--data` to compare speed and bytes alone",
                )
    return text


def _tokenizer(place: Path) -> bytes | None:
    file = place / "tokenizer.json"
    return file.read_bytes() if file.is_file() else None
