"""Structured methods brought to the same sizes: perplexity before and after a heal, and speed.

    python benchmarks/structured.py MODEL --data DIR --targets 0.8 0.6
    python benchmarks/structured.py MODEL --data DIR --targets 0.8 --heal-steps 100 --speed --save \
        --methods minitron "[minitron: {hidden: 0.1}, minitron: {ffn: to_target}]"

DIR holds calibration.jsonl, healing.jsonl and evaluation.jsonl (`benchmarks/demo_data.py` makes
them). A method is one of the names below, or a YAML list of prune stages like a search's
candidates; `to_target` in it is solved for, so that all come to the same number of parameters.
Every model and every measurement is kept in the store: a run that is killed, or asked for more,
goes on, and the last call with all methods gives the whole table. One row a method and target;
what a method refuses is a row too. `--add-to` takes over the rows of an earlier result, of the same
settings, that are not measured again; speeds, which are of shapes, are theirs too where a row of
as many parameters has one.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import onnx
import yaml
from _result import save
from pydantic import TypeAdapter

from prune_export import registry
from prune_export.calibrate import TokenSet
from prune_export.checkpoint import Checkpoint
from prune_export.errors import PruneExportError
from prune_export.execution.context import RunContext
from prune_export.execution.engines import export_engine
from prune_export.execution.inputs import Base, make_tokens, open_base
from prune_export.execution.measure import engine_speed, perplexity_of
from prune_export.execution.stages import run_heal, run_prune
from prune_export.machine import Machine
from prune_export.progress import Silent
from prune_export.recipe import Export, LocalText, Stage, Template
from prune_export.recipe.stages import Workload
from prune_export.store import Artifact, Store

METHODS = {
    "deepest": "deepest: {sparsity: to_target}",
    "angular_distance": "angular_distance: {sparsity: to_target}",
    "block_influence": "block_influence: {sparsity: to_target}",
    "every_other": "every_other: {sparsity: to_target}",
    "perplexity": "perplexity: {sparsity: to_target}",
    "laco": "laco: {sparsity: to_target, merge: drop}",
    "greedy_loss": "greedy_loss: {sparsity: to_target}",
    "taylor": "taylor: {sparsity: to_target, protect_first: 1, protect_last: 1}",
    "slicegpt": "slicegpt: {sparsity: to_target}",
    "minitron": "minitron: {ffn: to_target, heads: 0.333}",
    "minitron ffn": "minitron: {ffn: to_target}",
    "minitron groups": "minitron: {ffn: to_target, kv_groups: 0.333}",
    "minitron hidden": "minitron: {hidden: to_target}",
    "minitron plain": "minitron: {ffn: to_target, heads: 0.333, compensate: false}",
    "structured_wanda": "structured_wanda: {ffn: to_target, heads: 0.333}",
    "structured_wanda plain": "structured_wanda: {ffn: to_target, heads: 0.333, compensate: false}",
    "structured_magnitude": "structured_magnitude: {ffn: to_target, heads: 0.333}",
    "structured_magnitude plain": (
        "structured_magnitude: {ffn: to_target, heads: 0.333, compensate: false}"
    ),
    "structured_gblm": "structured_gblm: {ffn: to_target, heads: 0.333}",
    "structured_gblm plain": "structured_gblm: {ffn: to_target, heads: 0.333, compensate: false}",
    "llm_pruner": "llm_pruner: {ffn: to_target, heads: 0.333}",
    "llm_pruner plain": "llm_pruner: {ffn: to_target, heads: 0.333, compensate: false}",
}


def main() -> None:
    asked = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    asked.add_argument("model", type=Path)
    asked.add_argument(
        "--data", type=Path, required=True, help="directory of the three JSONL files"
    )
    asked.add_argument("--store", type=Path, default=Path("store"))
    asked.add_argument("--methods", nargs="*", default=list(METHODS))
    asked.add_argument("--targets", nargs="*", type=float, default=[0.8, 0.6])
    asked.add_argument("--samples", type=int, default=64, help="calibration windows")
    asked.add_argument("--length", type=int, default=256, help="tokens in a calibration window")
    asked.add_argument("--windows", type=int, default=12, help="evaluation windows of 1024 tokens")
    asked.add_argument("--heal-steps", type=int, default=0)
    asked.add_argument("--speed", action="store_true", help="time ONNX engines against dense")
    asked.add_argument("--threads", type=int, default=2)
    asked.add_argument("--add-to", type=Path, help="an earlier result of the same settings")
    asked.add_argument("--name", default="structured")
    asked.add_argument("--save", action="store_true", help="keep the result in benchmarks/results")
    given = asked.parse_args()
    table = _Table.of(given)
    payload = table.measure(given)
    if given.add_to:
        payload = joined(json.loads(given.add_to.read_text(encoding="utf-8")), payload)
    if given.save:
        print(save(given.name, payload))


def joined(earlier: dict[str, Any], payload: dict[str, Any]) -> dict[str, Any]:
    """The payload with an earlier one's rows before its own, the rows measured anew left out."""
    rows = payload["rows"]
    for key, own in payload.items():
        if key != "rows" and own != earlier[key]:
            raise SystemExit(f"--add-to: {key}: got {earlier[key]}, expected {own}; leave it out")
    before, after = (run["rows"][0]["pruned"] for run in (earlier, payload))
    if abs(before / after - 1) > 1e-5:
        raise SystemExit(
            f"--add-to: dense perplexity: got {before}, expected {after}; leave it out"
        )
    anew = {(row["method"], row.get("target")) for row in rows}
    kept = [row for row in earlier["rows"] if (row["method"], row.get("target")) not in anew]
    speeds = {row["parameters"]: row["speedup"] for row in rows if "speedup" in row}
    for row in kept:
        if row.get("parameters") in speeds:
            row.setdefault("speedup", speeds[row["parameters"]])
    return {**payload, "rows": [rows[0], *kept, *rows[1:]], "rows_of": earlier["date"]}


@dataclasses.dataclass(frozen=True)
class _Table:
    context: RunContext
    base: Base
    calibration: tuple[Artifact, TokenSet]
    healing: tuple[Artifact, TokenSet]
    evaluation: tuple[Artifact, TokenSet]
    speeds: dict[str, float] = dataclasses.field(default_factory=dict)

    @staticmethod
    def of(given: argparse.Namespace) -> _Table:
        machine = Machine.detect(device="cpu", threads=given.threads)
        context = RunContext(Store(given.store), machine, Silent())
        base = open_base(context, given.model.name, given.model, None)

        def tokens(name: str, length: int, samples: int | None = None, **own: Any) -> Any:
            source = LocalText(files=(f"{name}.jsonl",), samples=samples, length=length, **own)
            return make_tokens(context, name, source, given.data, base)

        return _Table(
            context,
            base,
            tokens("calibration", given.length, given.samples),
            tokens("healing", 512),
            tokens("evaluation", 1024, given.windows, packing="stream"),
        )

    def measure(self, given: argparse.Namespace) -> dict[str, Any]:
        dense = Artifact(self.base.id, self.base.path, {}, 0.0)
        arch = Checkpoint.open(self.base.path).arch()
        rows = [{"method": "dense", "pruned": self._perplexity("dense", dense)}]
        told(rows[0])
        for target in given.targets:
            for name in given.methods:
                row: dict[str, Any] = {"method": name, "target": target}
                try:
                    row |= self._row(given, name, target, arch, dense)
                except PruneExportError as error:
                    row["refused"] = f"{error.where}: {error.problem}"
                rows.append(row)
                told(row)
        return {
            "model": self.base.name,
            "dense_parameters": arch.parameters(),
            "calibration": {"samples": given.samples, "length": given.length},
            "evaluation": {"samples": given.windows, "length": 1024},
            "heal_steps": given.heal_steps,
            "rows": rows,
        }

    def _row(
        self, given: argparse.Namespace, name: str, target: float, arch: Any, dense: Artifact
    ) -> dict[str, Any]:
        template = Template(tuple(_items(METHODS.get(name, name))))
        candidate = template.to_size(arch, round(target * arch.parameters()))
        before, seconds = dense, 0.0
        for stage in candidate.stages:
            before = run_prune(self.context, stage, before.path, before.id, self.calibration)
            seconds += before.seconds
        row: dict[str, Any] = {
            "stages": [{"method": stage.name, **stage.parameters()} for stage in candidate.stages],
            "parameters": before.record["parameters"],
            "parameters_left": before.record["parameters"] / arch.parameters(),
            "prune_seconds": seconds,
            "pruned": self._perplexity(name, before),
        }
        if given.heal_steps:
            healed = self._heal(given.heal_steps, before)
            row["healed"] = self._perplexity(f"{name}, healed", healed)
        if given.speed:
            row["speedup"] = self._speedup(dense, before)
        return row

    def _speedup(self, dense: Artifact, before: Artifact) -> float:
        """Against dense; engines of one shape are timed once, as their products are the same."""
        export = Export("onnx", registry.find("exporters", "onnx")())
        engines = [export_engine(self.context, export, a.path, a.id) for a in (dense, before)]
        shape = _shape(engines[1].path)
        if shape not in self.speeds:
            workload = Workload(batch=1, prompt=128, new=32)
            self.speeds[shape] = engine_speed(self.context, engines[0], engines[1], workload)
        return self.speeds[shape]

    def _heal(self, steps: int, before: Artifact) -> Artifact:
        keys = {"rank": 16, "targets": "all", "steps": steps, "batch": 2, "learning_rate": 2e-3}
        entry = TypeAdapter(registry.find("heal", "lora")).validate_python(keys)
        stage = Stage("heal", "lora", entry, "healing")
        return run_heal(self.context, stage, before.path, before.id, self.healing)

    def _perplexity(self, name: str, artifact: Artifact) -> float:
        return perplexity_of(self.context, name, artifact, self.evaluation[1])


def _shape(engine: Path) -> str:
    """The sizes of a graph's weights, whatever block they stand in."""
    (graph,) = engine.glob("*.onnx")
    model = onnx.load(graph, load_external_data=False).graph
    return str(sorted(tuple(tensor.dims) for tensor in model.initializer))


def _items(text: str) -> Any:
    """(method, keys, data) of each stage of a candidate."""
    body = yaml.safe_load(text)
    for stage in body if isinstance(body, list) else [body]:
        ((method, keys),) = stage.items()
        yield method, dict(keys or {}), "calibration"


def told(row: dict[str, Any]) -> None:
    print(json.dumps({k: v for k, v in row.items() if k != "stages"}), file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
