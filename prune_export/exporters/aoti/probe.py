"""Times a sparse kernel in a process of its own: `python -m prune_export.exporters.aoti.probe`.

The request is JSON on standard input; each shape is answered at once with a JSON line, so that what
was timed before a fault is not lost.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from statistics import median
from time import perf_counter
from typing import Any, Final

import torch

from prune_export.exporters.aoti.sparse import Kernel, Timing, product

_ROUNDS: Final = 15
_TOLERANCE: Final = 2e-2


def timed(
    kernel: Kernel, outputs: int, inputs: int, dtype: torch.dtype, tokens: int, device: str
) -> Timing:
    """Measures the median time of a product with a random 2:4 weight, and checks its result."""
    torch.manual_seed(0)
    weight = torch.randn(outputs, inputs, dtype=dtype, device=device)
    weight.view(outputs, -1, 4)[..., 2:] = 0
    x = torch.randn(tokens, inputs, dtype=dtype, device=device)
    try:
        run = product(weight, kernel)
        error = _error(run(x), product(weight, "dense")(x))
    except RuntimeError as fault:
        return Timing(kernel, outputs, inputs, None, str(fault).strip().splitlines()[0])
    if error > _TOLERANCE:
        return Timing(kernel, outputs, inputs, None, f"is wrong by {error:.2g} of the largest")
    return Timing(kernel, outputs, inputs, median(_seconds(run, x) for _ in range(_ROUNDS)))


def _error(got: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((got - wanted).abs().max() / wanted.abs().max())


def _seconds(run: Any, x: torch.Tensor) -> float:
    repeats = 10 if x.is_cuda else 1
    _wait(x)
    start = perf_counter()
    for _ in range(repeats):
        run(x)
    _wait(x)
    return (perf_counter() - start) / repeats


def _wait(x: torch.Tensor) -> None:
    if x.is_cuda:
        torch.cuda.synchronize(x.device)


def main() -> None:
    """Answers the request on standard input, a JSON line a shape."""
    asked = json.load(sys.stdin)
    dtype = getattr(torch, asked["dtype"])
    with torch.no_grad():
        for outputs, inputs in asked["shapes"]:
            found = timed(asked["kernel"], outputs, inputs, dtype, asked["tokens"], asked["device"])
            sys.stdout.write(json.dumps(asdict(found)) + "\n")
            sys.stdout.flush()


if __name__ == "__main__":
    main()
