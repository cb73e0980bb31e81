"""Prunes a model and measures what it cost: python examples/prune_and_measure.py MODEL DATA OUT."""

import sys
from pathlib import Path

from prune_export import Machine, Options, Recipe, plan, run

RECIPE = """
recipe: 1
data:
  calibration: {files: [calibration.jsonl], samples: 16, length: 128}
  evaluation: {files: [evaluation.jsonl], samples: 8, length: 128}
stages:
  - prune: {method: block_influence, remove: 2}
verify:
  generation: false
  quality: {perplexity: evaluation}
"""


def main(model: str, data: str, out: str) -> None:
    """Plans, runs, and prints the measurements."""
    recipe = Recipe.parse(RECIPE, root=Path(data))
    options = Options(out=Path(out), store=Path(f"{out}.store"), machine=Machine.detect())

    planned = plan(recipe, model, options)  # reads no weights; raises what cannot work
    before, after = planned.archs[0], planned.archs[-1]
    print(
        f"{before.layers} → {after.layers} blocks, {planned.peak_ram_bytes / 2**20:.0f} MiB of RAM"
    )

    result = run(recipe, model, options)
    for measured in result.verification.perplexity:
        print(f"perplexity of {measured.name}: {measured.value:.2f}")
    print(f"report: {result.out / 'report.html'}")


if __name__ == "__main__":
    main(*sys.argv[1:])
