"""PyTorch's sparse kernels against dense products, by shape, type and number of tokens.

    python benchmarks/gpu/sparse_kernels.py [--tokens 1,16,256,4096] [--device cuda] [--name NAME]

Shapes are those of the linear layers of SmolLM2-135M and Llama-3.1-8B. Each kernel runs in a
process of its own, as on some GPUs one faults; what does not run is kept with its reason.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from _result import save

from prune_export.exporters.aoti.sparse import chosen, probed

SHAPES = {
    "SmolLM2-135M": [(576, 576), (192, 576), (1536, 576), (576, 1536)],
    "Llama-3.1-8B": [(4096, 4096), (1024, 4096), (14336, 4096), (4096, 14336)],
}
"""(outputs, inputs) of q and o, k and v, gate and up, down."""


def measured(tokens: list[int], dtypes: list[str], device: str) -> list[dict[str, Any]]:
    """A row for each model, type and number of tokens: every timing, and what would be chosen."""
    rows = []
    for model, shapes in SHAPES.items():
        for dtype in dtypes:
            for count in tokens:
                timings = probed(shapes, dtype, count, device)
                best = {f"{o}x{i}": found for (o, i), found in chosen(timings).items()}
                rows.append({"model": model, "dtype": dtype, "tokens": count, "chosen": best,
                             "timings": [asdict(one) for one in timings]})  # fmt: skip
                won = ", ".join(f"{s} {k} {g:.2f}x" for s, (k, g) in best.items())
                print(f"{model} {dtype} {count} tokens: {won or 'no speedup'}", flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", default="1,16,64,256,1024,4096")
    parser.add_argument("--dtypes", default="float16,bfloat16")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--name", default="sparse-kernels")
    given = parser.parse_args()
    tokens = [int(count) for count in given.tokens.split(",")]
    rows = measured(tokens, given.dtypes.split(","), given.device)
    print(save(given.name, {"device": given.device, "rows": rows}))


if __name__ == "__main__":
    main()
