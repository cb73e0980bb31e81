"""Writes the plans in docs/several-machines.md: `python docs/device_plans.py`.

Nothing in them depends on the machine that makes them. The shapes are those of the published
config.json of each model.
"""

from __future__ import annotations

import json
import re
import tempfile
from pathlib import Path
from typing import Any, Final

from prune_export.execution import Options, plan
from prune_export.machine import Machine
from prune_export.planning import Devices, Plan
from prune_export.planning.rows import columns_of, rows_of, sums_of
from prune_export.recipe import Recipe
from prune_export.units import GIB

PAGE: Final = Path(__file__).with_name("several-machines.md")

_LLAMA: Final[dict[str, Any]] = {
    "architectures": ["LlamaForCausalLM"], "attention_bias": False, "hidden_act": "silu",
    "max_position_embeddings": 131072, "mlp_bias": False, "model_type": "llama",
    "num_key_value_heads": 8, "rms_norm_eps": 1e-5, "rope_theta": 500000.0,
    "rope_scaling": {
        "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192, "rope_type": "llama3",
    },
    "tie_word_embeddings": False, "torch_dtype": "bfloat16", "vocab_size": 128256,
}  # fmt: skip
MODELS: Final = {
    "Llama-3.1-70B": _LLAMA | {
        "hidden_size": 8192, "intermediate_size": 28672, "num_attention_heads": 64,
        "num_hidden_layers": 80,
    },
    "Llama-3.1-405B": _LLAMA | {
        "hidden_size": 16384, "intermediate_size": 53248, "num_attention_heads": 128,
        "num_hidden_layers": 126,
    },
}  # fmt: skip
RECIPE: Final = """\
recipe: 1
data:
  calibration: {dataset: allenai/c4, config: en, split: train, samples: 256, length: 2048}
  healing: {dataset: allenai/c4, config: en, split: train, samples: 8000, length: 2048, seed: 1}
stages:
  - prune: {method: angular_distance, sparsity: 0.40}
  - heal: {method: METHOD, steps: 1000, batch: 64, objective: {distill: {cache: 128}}}
verify: {generation: false}
"""
CASES: Final = (
    ("Llama-3.1-70B", "qlora", 8, 80),
    ("Llama-3.1-70B", "lora", 8, 80),
    ("Llama-3.1-405B", "qlora", 64, 80),
    ("Llama-3.1-405B", "qlora", 64, 192),
)


def planned(model: str, method: str, count: int, gib: int) -> Plan:
    """The plan of the recipe for devices that are nowhere."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        (root / model).mkdir()
        (root / model / "config.json").write_text(json.dumps(MODELS[model]), encoding="utf-8")
        options = Options(
            root / "out", root / "store", Machine("cpu", 1024 * GIB, 0, 64),
            devices=Devices(count, bytes=gib * GIB),
        )  # fmt: skip
        recipe = Recipe.parse(RECIPE.replace("METHOD", method), root=root)
        return plan(recipe, str(root / model), options)


def shown(model: str, method: str, count: int, gib: int) -> str:
    """A plan as it stands on the page: prune, heal, and what is lacking."""
    found = planned(model, method, count, gib)
    names = columns_of(found)
    lines = [
        f"**{model}, `{method}`, {count} devices of {gib} GiB**", "",
        f"| {' | '.join(names)} |", "|" + "---|" * len(names),
        *(
            f"| {' | '.join(row)} |"
            for row, stage in zip(rows_of(found), found.stages, strict=True)
            if stage.kind in ("prune", "heal")
        ),
        "", sums_of(found)[0].upper() + sums_of(found)[1:] + ".",
    ]  # fmt: skip
    for error in found.lacking:
        lines += [f"Refused: {error.where}: {error.problem}; {error.fix}."]
    return "\n".join(lines)


def page(text: str) -> str:
    """The page with its plans made anew, between the two marks."""
    plans = "\n\n".join(shown(*case) for case in CASES)
    recipe = f"```yaml\n{RECIPE}```"
    made = f"<!-- plans -->\n\n{recipe}\n\n{plans}\n\n<!-- end of plans -->"
    return re.sub(r"<!-- plans -->.*<!-- end of plans -->", lambda _: made, text, flags=re.DOTALL)


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
