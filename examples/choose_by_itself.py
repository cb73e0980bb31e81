"""Lets methods compete at one size: python examples/choose_by_itself.py MODEL DATA OUT."""

import sys
from pathlib import Path

from prune_export import Machine, Options, Recipe, run

RECIPE = """
recipe: 1
data:
  calibration: {files: [calibration.jsonl], samples: 8, length: 64}
  ranking: {files: [evaluation.jsonl], samples: 8, length: 64}
  healing: {files: [healing.jsonl], samples: 16, length: 64}
stages:
  - search:
      target: {parameters: 0.75, tolerance: 0.2}     # three quarters of the parameters
      candidates:
        - prune: {method: block_influence, sparsity: to_target}
        - prune: {method: structured_wanda, ffn: to_target}
      validation: ranking                            # each is healed briefly, then ranked on this
      heal: {method: lora, rank: 4, steps: 2, batch: 2, learning_rate: 1.0e-3}
verify:
  generation: false
"""


def main(model: str, data: str, out: str) -> None:
    """Runs the search and prints who took part, and who won."""
    recipe = Recipe.parse(RECIPE, root=Path(data))
    options = Options(out=Path(out), store=Path(f"{out}.store"), machine=Machine.detect())
    (search,) = run(recipe, model, options).report["searches"]
    for candidate in search["candidates"]:
        size = f"{candidate['parameters_left']:.0%} of the parameters"
        print(f"{candidate['label']}: {size}, perplexity {candidate['healed']:.2f}", end="")
        print(" ← chosen" if candidate["note"] == "chosen" else "")


if __name__ == "__main__":
    main(*sys.argv[1:])
