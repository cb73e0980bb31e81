"""Refits at the seams of depth cuts of SmolLM2-135M: perplexity, and what they cost.

    python benchmarks/demo_data.py .demo
    python benchmarks/seam_refit.py .demo --save

Blocks are listed, so that nothing but the refit is measured: 6, 9 and 12 of 30 go in one run (the
least by angular distance), and 6 by twos, which makes three seams. Each is cut without and with the
refit, on 32, 64 and 128 calibration windows of 256 tokens. Perplexity is measured on the
demonstration's windows (12 of 1,024 tokens). Seconds are processor seconds of the whole decision,
and of one pass that only carries the same windows through the dense model.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from math import exp
from pathlib import Path
from typing import Any, Final

import torch

from prune_export.calibrate import (
    BlockInfluence,
    CalibrationContext,
    ModelView,
    TokenSet,
    gather,
    token_set,
)
from prune_export.checkpoint import Checkpoint, import_gguf
from prune_export.machine import Machine
from prune_export.methods.depth.deepest import Deepest
from prune_export.progress import Silent
from prune_export.recipe import LocalText
from prune_export.surgery import rewrite

CUTS: Final = {
    "6 in a run": tuple(range(13, 19)),
    "9 in a run": tuple(range(14, 23)),
    "12 in a run": tuple(range(12, 24)),
    "6 by twos": (9, 10, 14, 15, 19, 20),
}
WINDOWS: Final = (32, 64, 128)


def main() -> None:
    asked = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    asked.add_argument("demo", type=Path, help="what demo_data.py laid out")
    asked.add_argument("--windows", type=int, nargs="*", default=WINDOWS)
    asked.add_argument("--cuts", nargs="*", default=list(CUTS), choices=list(CUTS))
    asked.add_argument("--save", action="store_true", help="keep the result in benchmarks/results")
    given = asked.parse_args()
    with tempfile.TemporaryDirectory(prefix="seam-refit-") as place:
        payload = measure(given.demo, Path(place), given.windows, given.cuts)
    if given.save:
        from _result import save

        print(save("seam-refit-smollm2-135m", payload))
    print(json.dumps(payload, indent=2))


def measure(demo: Path, place: Path, windows: list[int], cuts: list[str]) -> dict[str, Any]:
    dense = place / "dense"
    dense.mkdir()
    import_gguf(demo / "SmolLM2-135M-Instruct.Q4_1.gguf", dense, Silent())
    held = token_set(LocalText(files=("evaluation.jsonl",), samples=12, length=1024), dense, demo)
    most = LocalText(files=("calibration.jsonl",), samples=max(windows), length=256)
    text = token_set(most, dense, demo, exclude=frozenset(held.documents))
    machine = Machine("cpu", 8 << 30, 0, 1)
    torch.set_num_threads(1)
    checkpoint = Checkpoint.open(dense)
    rows: list[dict[str, Any]] = []
    forward = {}
    for count in windows:
        tokens = TokenSet.of(text.ids[:count])
        start = time.process_time()
        gather(checkpoint, [BlockInfluence()], CalibrationContext(tokens, machine))
        forward[count * 256] = time.process_time() - start
    result = {
        "model": "SmolLM2-135M-Instruct, Q4_1 dequantized",
        "evaluation_tokens": held.ids.numel(),
        "dense_perplexity": perplexity(dense, held.ids),
        "forward_seconds": forward,
        "cuts": rows,
    }
    for name in cuts:
        for count in (0, *windows):
            row = one(checkpoint, text, CUTS[name], count, machine, place / "cut")
            rows.append({"cut": name, "removed": list(CUTS[name]), **row})
            rows[-1]["perplexity"] = perplexity(place / "cut", held.ids)
            print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    return result


def one(
    checkpoint: Checkpoint,
    text: TokenSet,
    layers: tuple[int, ...],
    count: int,
    machine: Machine,
    out: Path,
) -> dict[str, Any]:
    """Writes a cut model, refitted on so many windows, or as it was cut on none."""
    method = Deepest(layers=layers, refit="auto" if count else False)
    tokens = TokenSet.of(text.ids[: max(count, 2)])
    view = ModelView(checkpoint.arch(), checkpoint, {}, CalibrationContext(tokens, machine))
    start = time.process_time()
    decision = method.decide(view)
    seconds = time.process_time() - start
    rewrite(checkpoint, checkpoint.arch(), decision.edits, out, ram_bytes=1 << 30)
    return {"tokens": count * 256, "cpu_seconds": seconds, "refit": decision.log.get("refit")}


def perplexity(path: Path, ids: torch.Tensor) -> float:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    total = 0.0
    with torch.no_grad():
        for window in ids:
            logits = model(window[None], use_cache=False).logits[0, :-1]
            total += float(torch.nn.functional.cross_entropy(logits, window[1:], reduction="sum"))
    return exp(total / (len(ids) * (ids.shape[1] - 1)))


if __name__ == "__main__":
    main()
