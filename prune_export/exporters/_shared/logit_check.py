"""Holds an engine's logits against PyTorch's, over a prompt and one step with its cache."""

from __future__ import annotations

from pathlib import Path
from typing import Final

import numpy as np

from prune_export.contracts import Runner
from prune_export.errors import StageError
from prune_export.numeric.logits import largest_error

PROMPT: Final = 5
"""Tokens before the cached step."""


def refuse_other_logits(
    engine: Path, runner: Runner, ids: np.ndarray, expected: np.ndarray, tolerance: float
) -> float:
    """The largest logit error, as a fraction of the largest logit.

    `ids` is `[1, PROMPT + 1]`, and `expected` PyTorch's logits `[1, PROMPT + 1, vocab]` of them.

    Raises:
        StageError: it is above `tolerance`, or not a number.
    """
    prompt, _ = runner.step(ids[:, :PROMPT])
    step, _ = runner.step(ids[:, PROMPT:])
    scale = float(np.abs(expected).max())
    found = (
        ("the prompt", prompt, expected[:, PROMPT - prompt.shape[1] : PROMPT]),
        ("a cached step", step, expected[:, PROMPT:]),
    )
    worst = 0.0
    for what, got, wanted in found:
        error = largest_error(wanted, got) / scale
        if not error <= tolerance:  # so put, it is true of what is not a number
            raise StageError(
                f"{engine}  {what}",
                f"logits differ from PyTorch's by {error:.2g} of the largest one, "
                f"expected at most {tolerance:g}",
                "this is a bug of the exporter or the runtime: report it with the model's config",
            )
        worst = max(worst, error)
    return worst
