"""An engine that computes something else, or no numbers at all, is refused by every exporter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from prune_export.errors import StageError
from prune_export.exporters._shared.logit_check import PROMPT, refuse_other_logits

IDS = np.zeros((1, PROMPT + 1), np.int64)
EXPECTED = np.random.default_rng(0).normal(size=(1, PROMPT + 1, 7)).astype(np.float32)
SCALE = float(np.abs(EXPECTED).max())


class Replay:
    """An engine that gives logits that it was told, the last position's or all."""

    def __init__(self, logits: np.ndarray, *, last: bool = False) -> None:
        self.logits, self.last, self.seen = logits, last, 0

    def step(self, ids: np.ndarray) -> tuple[np.ndarray, float]:
        start, self.seen = self.seen, self.seen + ids.shape[1]
        return self.logits[:, self.seen - 1 if self.last else start : self.seen], 0.0


def checked(logits: np.ndarray, *, last: bool = False) -> float:
    engine: Any = Replay(logits, last=last)
    return refuse_other_logits(Path("model"), engine, IDS, EXPECTED, 1e-3)


@pytest.mark.parametrize("last", [True, False])
def test_the_error_is_a_fraction_of_the_largest_logit(*, last: bool) -> None:
    assert checked(EXPECTED, last=last) == 0.0
    assert checked(EXPECTED + 5e-4 * SCALE, last=last) == pytest.approx(5e-4, rel=1e-2)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1.0])
@pytest.mark.parametrize(("position", "where"), [(PROMPT - 1, "the prompt"), (PROMPT, "cached")])
def test_what_is_no_number_is_refused_too(value: float, position: int, where: str) -> None:
    logits = EXPECTED.copy()
    logits[0, position, 3] += value
    with pytest.raises(StageError, match=where):
        checked(logits, last=True)
