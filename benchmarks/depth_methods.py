"""Perplexity without healing after each depth method, at several depths.

    python benchmarks/depth_methods.py --model MODEL --data DIR --work DIR               all of it
    python benchmarks/depth_methods.py … --only greedy_loss perplexity                   a part

`--data` holds calibration.jsonl and evaluation.jsonl (`benchmarks/demo_data.py` makes them). What
is found stays in `--work`, one file a method, so parts may run one after the other; when all are
there, or with `--record`, the result is kept. Every method sees the same calibration windows; all
are measured on the same evaluation windows, in bfloat16 where the hardware has it (about 0.1 % of
the perplexity).
Processor seconds are those of the decision alone, reading the model included; they depend on what
else the machine does.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from prune_export import registry
from prune_export.calibrate import (
    Ablations,
    CalibrationContext,
    ExtraPass,
    ModelView,
    TokenSet,
    Unit,
    native_dtype,
    token_set,
)
from prune_export.checkpoint import Checkpoint
from prune_export.machine import Machine
from prune_export.recipe.sources import LocalText
from prune_export.surgery import Drop, rewrite

PLAIN = ["angular_distance", "block_influence", "deepest", "every_other", "perplexity", "taylor"]
METHODS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    **{name: (name, {}) for name in PLAIN},
    "greedy_loss": ("greedy_loss", {}),
    "greedy_loss, not revised": ("greedy_loss", {"revise": False}),
    "greedy_loss, beam of 3": ("greedy_loss", {"beam": 3}),
    **{
        f"laco, {merge}, {target}": ("laco", {"merge": merge, "target": target})
        for merge in ("rdsc", "last", "drop")
        for target in ("segments", "budget", "bisection")
    },
}


def main() -> None:
    options = _options()
    options.work.mkdir(parents=True, exist_ok=True)
    for name in options.only or METHODS:
        file = _file(options, name)
        if not file.exists():
            file.write_text(json.dumps(_measured(options, name)), encoding="utf-8")
        rows = json.loads(file.read_text(encoding="utf-8"))
        print(f"{name:28}" + "".join(f"{row['perplexity']:10.2f}" for row in rows["rows"]))
    there = [name for name in METHODS if _file(options, name).exists()]
    if options.record or len(there) == len(METHODS):
        from _result import save

        found = {name: json.loads(_file(options, name).read_text()) for name in there}
        settings = {
            "calibration": [options.samples, options.length],
            "evaluation": [options.windows, options.window],
            "compute_dtype": str(native_dtype(_machine(options))).removeprefix("torch."),
            "model": options.model.name,
        }
        print(save("depth-methods", {**settings, "methods": found}))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--only", nargs="*", choices=list(METHODS))
    parser.add_argument("--record", action="store_true", help="keep what is there as the result")
    parser.add_argument("--removed", type=int, nargs="*", default=[3, 6, 9, 12])
    parser.add_argument("--samples", type=int, default=32, help="calibration windows")
    parser.add_argument("--length", type=int, default=256, help="tokens of each")
    parser.add_argument("--windows", type=int, default=12, help="evaluation windows")
    parser.add_argument("--window", type=int, default=1024, help="tokens of each")
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args()


def _file(options: argparse.Namespace, name: str) -> Path:
    return Path(options.work / (name.replace(", ", "-").replace(" ", "_") + ".json"))


def _machine(options: argparse.Namespace) -> Machine:
    return Machine.detect(device="cpu", threads=options.threads)


def _tokens(options: argparse.Namespace, name: str, samples: int, length: int) -> TokenSet:
    source = LocalText(files=(f"{name}.jsonl",), samples=samples, length=length)
    return token_set(source, options.model, options.data)


def _measured(options: argparse.Namespace, name: str) -> dict[str, Any]:
    """The perplexities of one method, and what its decisions took."""
    entry, keys = METHODS[name]
    checkpoint, machine = Checkpoint.open(options.model), _machine(options)
    tokens = _tokens(options, "calibration", options.samples, options.length)
    scratch = options.work / "scratch"
    scratch.mkdir(exist_ok=True)
    view = ModelView(
        checkpoint.arch(), checkpoint, {}, CalibrationContext(tokens, machine, scratch)
    )
    make: Callable[..., Any] = registry.find("methods", entry)
    rows: list[dict[str, Any]] = []
    if entry == "greedy_loss":
        # One search finds the best model of each size on its way.
        began = time.process_time()
        log = _decide(make(remove=max(options.removed), **keys), view).log
        seconds = time.process_time() - began
        sets = [log["best"][count][1] for count in options.removed]
        rows = [{"dropped": dropped} for dropped in sets]
        rows[-1] |= {"processor_seconds": seconds, "passes": log["passes"], "steps": log["steps"]}
        _evaluate_dropped(options, checkpoint, rows)
        return {"rows": rows, "dense": _dense(options, checkpoint)}
    for count in options.removed:
        began = time.process_time()
        decision = _decide(make(remove=count, **keys), view)
        seconds = time.process_time() - began
        row = {"dropped": decision.log["dropped"], "processor_seconds": seconds}
        edits = list(decision.edits)
        if any(not isinstance(edit, Drop) for edit in edits):
            row |= {key: decision.log[key] for key in ("folds", "similarity", "threshold")}
            out = options.work / "folded"
            shutil.rmtree(out, ignore_errors=True)
            after = rewrite(checkpoint, view.arch, edits, out, ram_bytes=machine.ram_bytes)
            row["perplexity"] = _dense(options, after)
        else:
            _evaluate_dropped(options, checkpoint, [row])
        rows.append(row)
    return {"rows": rows, "dense": _dense(options, checkpoint)}


def _decide(method: Any, view: ModelView) -> Any:
    asked = method.statistics(view.arch)
    first = [statistic for statistic in asked if not isinstance(statistic, ExtraPass)]
    results = view.gather(first) if first else {}
    return method.decide(ModelView(view.arch, view.checkpoint, results, view.context))


def _evaluate_dropped(
    options: argparse.Namespace, checkpoint: Checkpoint, rows: list[dict[str, Any]]
) -> None:
    models = [[Unit(layer) for layer in row["dropped"]] for row in rows]
    for row, loss in zip(rows, _losses(options, checkpoint, models), strict=True):
        row["perplexity"] = math.exp(loss)


def _dense(options: argparse.Namespace, checkpoint: Checkpoint) -> float:
    return math.exp(_losses(options, checkpoint, [[]])[0])


def _losses(
    options: argparse.Namespace, checkpoint: Checkpoint, models: list[list[Unit]]
) -> list[float]:
    tokens = _tokens(options, "evaluation", options.windows, options.window)
    machine = _machine(options)
    scratch = options.work / "evaluated" if checkpoint.path == options.model else None
    if scratch is not None:
        scratch.mkdir(exist_ok=True)
    dtype = native_dtype(machine)
    with Ablations(
        checkpoint, CalibrationContext(tokens, machine, scratch=scratch), dtype=dtype
    ) as measured:
        return measured.losses(models)


if __name__ == "__main__":
    main()
