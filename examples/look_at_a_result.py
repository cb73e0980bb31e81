"""Loads a result and says where it comes from: python examples/look_at_a_result.py OUT."""

import sys

from prune_export import load


def main(out: str) -> None:
    """Prints the model's size and its provenance."""
    made = load(out)  # stock transformers, no remote code
    print(f"{sum(weight.numel() for weight in made.model.parameters()):,} parameters")
    if made.provenance is None:
        print("no lock: not a result of prune-export, or it was taken out of its directory")
        return
    print(f"made from {made.provenance.base}")
    for stage in made.provenance.recipe().stages:
        print(f"  by {stage.name}")
    for place, artifact in made.provenance.artifacts.items():
        print(f"  {place}: {artifact}")
    print("changed since:", ", ".join(made.provenance.changed()) or "nothing")


if __name__ == "__main__":
    main(*sys.argv[1:])
