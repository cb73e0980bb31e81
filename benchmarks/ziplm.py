"""Asks ZipLM for a decoding speed and measures the engine that comes out: within 5 % is wanted.

    python benchmarks/ziplm.py MODEL DATA [--speedup 1.5 --store STORE --each]

DATA holds calibration.jsonl and evaluation.jsonl (`make demo` makes them). A whole run: engines of
a few widths are built and timed, widths chosen, the cut compensated, the engine built, and measured
against the dense one in fresh processes. With `--each` every block gets widths of its own. Killed,
the same command goes on from STORE. Exit code 1 when the speed is not within 5 % of the one asked.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import _result

from prune_export.execution import Options, run
from prune_export.machine import Machine
from prune_export.recipe import Recipe

RECIPE = """
recipe: 1
description: ZipLM to a measured speed.
data:
  calibration: {files: [calibration.jsonl], samples: 32, length: 256}
  evaluation: {files: [evaluation.jsonl], samples: 12, length: 512}
stages:
  - prune:
      method: ziplm
      target: {speedup: %(speedup)s, engine: onnx, workload: {batch: 1, prompt: 128, new: 32}}
      uniform: %(uniform)s
export:
  - onnx: {precision: fp32}
verify:
  generation: false
  parity: %(parity)s
  quality: {perplexity: evaluation, engines: false}
  speed: {workloads: [{batch: 1, prompt: 128, new: 32}], minutes: 1.5}
"""


def main() -> int:
    options = _options()
    with tempfile.TemporaryDirectory(prefix="ziplm-") as folder:
        text = RECIPE % {
            "speedup": options.speedup,
            "uniform": str(not options.each).lower(),
            "parity": str(options.parity).lower(),
        }
        file = Path(folder) / "ziplm.yaml"
        file.write_text(text, encoding="utf-8")
        recipe = Recipe.load(str(file), data_root=options.data)
        machine = Machine.detect(threads=options.threads)
        store = options.store or Path(folder) / "store"
        made = run(recipe, str(options.model), Options(Path(folder) / "out", store, machine))
    speeds = {one.phase: one for one in made.verification.speed}
    decode = speeds["decode"]
    off = decode.ratio / options.speedup - 1
    log = made.report["stages"][0]["log"]
    result = {
        "model": options.model.name,
        "asked": options.speedup,
        "decode": [decode.ratio, decode.low, decode.high],
        "prefill": [speeds["prefill"].ratio, speeds["prefill"].low, speeds["prefill"].high],
        "off": off,
        "perplexity": {one.name: one.value for one in made.verification.perplexity},
        "parameters": [made.report["base"]["parameters"], made.report["result"]["parameters"]],
        "ziplm": {key: log[key] for key in ("costs", "tried", "rounds", "sizes")},
        "threads": options.threads,
        "recipe": text,
    }
    print(json.dumps({key: result[key] for key in ("asked", "decode", "off", "perplexity")}))
    print(_result.save("ziplm-each" if options.each else "ziplm", result))
    return int(abs(off) > 0.05)


def _options() -> Any:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("--speedup", type=float, default=1.5)
    parser.add_argument("--store", type=Path)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--each", action="store_true", help="widths of its own for each block")
    parser.add_argument("--parity", action="store_true")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
