"""Every bundled recipe, end to end, on the demonstration's model and text, as a user runs it.

    python benchmarks/demo_data.py .demo
    python benchmarks/recipes.py --data .demo --work DIR [--only wanda-50 laco ...] [--save]

Each recipe is given to `prune-export run` with its own methods, amounts, exporters and checks. What
is made smaller is the text (a local file for each hub dataset) and the training: so many steps of
two windows of 512 tokens, where the recipes ask for thousands. TensorRT engines are built ahead of
time by TensorRT-RTX where there is no GPU, and nothing is timed. One row a recipe, from its
report.json. Runs are kept in `--work`: one that is killed goes on, and `--save` writes all rows.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from _result import save
from demo_data import MODEL

RECIPES = Path(__file__).parents[1] / "recipes"

TEXT = {
    "calibration": {"files": ["calibration.jsonl"], "samples": 64, "length": 256},
    "healing": {"files": ["healing.jsonl"], "length": 512, "seed": 1},
    "ranking": {"files": ["healing.jsonl"], "samples": 12, "length": 512, "seed": 2},
    "evaluation": {"files": ["evaluation.jsonl"], "samples": 12, "length": 1024},
}
SHORT = {
    "calibration": {**TEXT["calibration"], "samples": 16},
    "healing": TEXT["healing"],
    "ranking": {**TEXT["ranking"], "samples": 4, "length": 256},
    "evaluation": {**TEXT["evaluation"], "samples": 4, "length": 512},
}
"""What `--short` reads: enough to run all, too little for its perplexities to mean anything."""

HEAL = {"rank": 16, "batch": 2, "learning_rate": 2e-3}
WORKLOAD = {"batch": 1, "prompt": 128, "new": 32}


def main() -> None:
    asked = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    asked.add_argument("--data", type=Path, required=True, help="what demo_data.py wrote")
    asked.add_argument("--work", type=Path, required=True, help="where all is kept")
    asked.add_argument("--only", nargs="*", help="names of recipes")
    asked.add_argument("--steps", type=int, default=60, help="of the heal")
    asked.add_argument("--search-steps", type=int, default=20, help="of each candidate's heal")
    asked.add_argument("--minutes", type=float, default=0.5, help="of timing, an engine")
    asked.add_argument("--threads", type=int, default=2)
    asked.add_argument("--short", action="store_true", help="hardly any text, and no generation")
    asked.add_argument("--save", action="store_true", help="keep all rows in benchmarks/results")
    given = asked.parse_args()
    names = given.only or [path.stem for path in sorted(RECIPES.glob("*.yaml"))]
    for name in names:
        row = given.work / "rows" / f"{name}.json"
        if not row.exists():
            made = _run(name, given)
            row.parent.mkdir(parents=True, exist_ok=True)
            row.write_text(json.dumps(made, indent=1))
        print(json.dumps(_short(json.loads(row.read_text()))), flush=True)
    if given.save:
        rows = [json.loads(path.read_text()) for path in sorted(given.work.glob("rows/*.json"))]
        settings = {"text": TEXT, "heal": HEAL, "workload": WORKLOAD, "threads": given.threads}
        print(save("recipes", {"model": MODEL, **settings, "rows": rows}))


def _overrides(recipe: dict[str, Any], given: argparse.Namespace) -> Iterator[tuple[str, Any]]:
    """What is set otherwise than the recipe says."""
    for name in recipe["data"]:
        if given.short and name in SHORT and "generated" not in recipe["data"][name]:
            yield f"data.{name}", SHORT[name]
        elif "dataset" in recipe["data"][name]:
            yield f"data.{name}", TEXT[name]
    if given.short:
        yield "verify.generation", False
    for index, stage in enumerate(recipe["stages"]):
        ((kind, keys),) = stage.items()
        heal, at, steps = keys, f"stages.{index}.heal", given.steps
        if kind == "search":
            heal, at, steps = keys.get("heal"), f"stages.{index}.search.heal", given.search_steps
        elif kind != "heal":
            continue
        if heal is not None:
            yield at, {**heal, **HEAL, "steps": steps}
    on_gpu = False
    for index, export in enumerate(recipe.get("export", [])):
        if "tensorrt" in export and not _has_gpu():
            on_gpu = True
            yield f"export.{index}.tensorrt.flavor", "rtx"
            yield f"export.{index}.tensorrt.compute_capability", "sm89"
    speed = recipe.get("verify", {}).get("speed")
    if speed and on_gpu:
        yield "verify.speed", None
    elif speed:
        yield "verify.speed.workloads", [WORKLOAD]
        yield "verify.speed.minutes", given.minutes


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def _run(name: str, given: argparse.Namespace) -> dict[str, Any]:
    recipe = yaml.safe_load((RECIPES / f"{name}.yaml").read_text(encoding="utf-8"))
    sets = dict(_overrides(recipe, given))
    out = given.work / "out" / name
    command = [sys.executable, "-m", "prune_export", "run", str(RECIPES / f"{name}.yaml")]
    command += ["--model", str(given.data / MODEL), "--data-root", str(given.data)]
    command += ["--store", str(given.work / "store"), "--out", str(out)]
    command += ["--threads", str(given.threads)]
    for key, value in sets.items():
        command += ["--set", f"{key}={json.dumps(value)}"]
    log = given.work / "logs" / f"{name}.txt"
    log.parent.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    with log.open("w") as file:
        done = subprocess.run(
            command, stdout=file, stderr=subprocess.STDOUT, env=os.environ | {"HF_HUB_OFFLINE": "1"}
        )
    if not (out / "report.json").exists():
        raise SystemExit(f"{name}: code {done.returncode}, and no report; see {log}")
    report = json.loads((out / "report.json").read_text())
    return {
        "recipe": name,
        "exit_code": done.returncode,
        "minutes": (time.monotonic() - began) / 60,
        "set": sets,
        **_of_report(report),
    }


def _of_report(report: dict[str, Any]) -> dict[str, Any]:
    verified = report["verification"]
    return {
        "estimates": report.get("estimates", []),
        "parameters": [report["base"]["parameters"], report["result"]["parameters"]],
        "stages": [
            {key: stage[key] for key in ("kind", "name", "seconds", "parameters_after")}
            for stage in report["stages"]
        ],
        "perplexity": {one["name"]: one["value"] for one in verified["perplexity"]},
        "repetitive": {one["name"]: one["repetitive"] for one in verified["generation"]},
        "speed": [
            {
                key: one[key]
                for key in ("engine", "phase", "ratio", "low", "high", "bound", "verdict")
            }
            for one in verified["speed"]
        ],
        "sparsity": verified["sparsity"],
        "gates": verified["gates"],
        "exports": [
            {key: one.get(key) for key in ("exporter", "seconds", "weight_bytes", "notes")}
            for one in report["exports"]
        ],
        "searches": report["searches"],
    }


def _short(row: dict[str, Any]) -> dict[str, Any]:
    before, after = row["parameters"]
    return {
        "recipe": row["recipe"],
        "exit_code": row["exit_code"],
        "minutes": round(row["minutes"], 1),
        "parameters_left": round(after / before, 4),
        "perplexity": {name: round(value, 2) for name, value in row["perplexity"].items()},
        "decode": {one["engine"]: round(one["ratio"], 3) for one in row["speed"]
                   if one["phase"] == "decode"},
    }  # fmt: skip


if __name__ == "__main__":
    main()
