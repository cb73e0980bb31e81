"""Compares a model with itself 30 times and counts the differences that are claimed: 0 is wanted.

    python benchmarks/noise_floor.py MODEL --out results.json [--exporter onnx --count 30]

MODEL is a model directory. It is exported once by `--exporter` (its default parameters), or timed
in PyTorch where that is `pytorch`; dense and "pruned" are then the same files, in processes of
their own, as in a real verification. Each comparison gives two verdicts, prefill and decode, and
any that is not "no speedup" is a false claim. Exit code 1 when there is one.

What this tests is the rule in `prune_export/verify/compare.py` on a real machine: run it where the
figures of a report are to be trusted, also while something else runs there.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path

import numpy as np
from pydantic import TypeAdapter

from prune_export import registry
from prune_export.contracts import Exporter, Work
from prune_export.machine import Machine, describe
from prune_export.progress import Silent
from prune_export.recipe.stages import Workload
from prune_export.verify.engine import PYTORCH, Engine
from prune_export.verify.results import Speed
from prune_export.verify.speed import Effort, measure_speed


def main() -> int:
    options = _options()
    machine = Machine.detect(device=options.device, threads=options.threads)
    workload = Workload(options.batch, options.prompt, options.new)
    effort = Effort(
        seconds=options.seconds, most_launches=options.launches, launches=options.launches
    )
    vocabulary = json.loads((options.model / "config.json").read_text())["vocab_size"]
    ids = np.random.default_rng(0).integers(0, vocabulary, options.batch * 2048)
    found: list[Speed] = []
    with ExitStack() as stack:
        engine = _engine(options.model, options.exporter, machine, stack)
        for comparison in range(options.count):
            speeds = measure_speed(
                engine, engine, [workload], ids, machine, effort=effort, seed=comparison
            )
            found += speeds
            shown = "  ".join(
                f"{s.phase} {s.ratio:.3f} [{s.low:.3f}, {s.high:.3f}]"
                f" floor {s.floor_high - 1:.1%}: {s.verdict}"
                for s in speeds
            )
            print(f"{comparison + 1:3d}/{options.count}  {shown}", flush=True)
    claims = sum(speed.verdict != "no speedup" for speed in found)
    print(f"{claims} differences claimed in {options.count} comparisons ({len(found)} verdicts)")
    if options.out:
        _write(options.out, options, found, claims)
    return int(claims > 0)


def _engine(model: Path, exporter: str, machine: Machine, stack: ExitStack) -> Engine:
    if exporter == PYTORCH:
        return Engine.pytorch(model, logits="last")
    out = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="noise-floor-")))
    (out / "engine").mkdir()
    (out / "scratch").mkdir()
    kind = registry.find("exporters", exporter)
    entry: Exporter = TypeAdapter(kind).validate_python({})
    record = entry.export(model, out / "engine", Work(machine, Silent(), out / "scratch"))
    return Engine.of(record, out / "engine")


def _write(out: Path, options: argparse.Namespace, found: list[Speed], claims: int) -> None:
    asked = {key: str(value) for key, value in vars(options).items() if key != "out"}
    result = {
        "benchmark": "noise_floor",
        "options": asked | {"model": options.model.name},
        "machine": describe(),
        "comparisons": options.count,
        "verdicts": len(found),
        "claims": claims,
        "widest_floor": max(speed.floor_high for speed in found),
        "speeds": [asdict(speed) for speed in found],
    }
    out.write_text(json.dumps(result, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--exporter", default="onnx")
    parser.add_argument("--count", type=int, default=30)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--new", type=int, default=16)
    parser.add_argument("--seconds", type=float, default=60, help="for each comparison")
    parser.add_argument("--launches", type=int, default=5)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--device", choices=["cpu", "cuda"])
    parser.add_argument("--out", type=Path)
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
