"""Picks tokens from logits, each text by random numbers of its own.

A text is a function of its seed, whatever is drawn beside it (but for how floats round), so that a
run that goes on, in other batches or on other processes, draws what it would have drawn.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:  # the process that times an engine imports this file, and needs no torch
    import torch

READ_BYTES_A_SECOND: Final = 8e9
"""How fast a plain machine reads the weights for a step; on a GPU it is far more."""

STEP_SECONDS: Final = 0.0006
"""What a step takes a block beside that: Python, and kernels that are started."""


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn: `temperature` 0 takes the likeliest, `top_p` 1 draws from all."""

    temperature: float = 1.0
    top_p: float = 1.0


def seed_of(*parts: int | str) -> int:
    """Makes a seed from what tells one draw from others."""
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:7])


class Dice:
    """The random numbers of some texts, one generator each; every token takes one number."""

    def __init__(self, seeds: Sequence[int]) -> None:
        import torch

        self._generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def roll(self, rows: Sequence[int]) -> torch.Tensor:
        """The next number in [0, 1) of each of the texts `rows`, float64 `[rows]`."""
        import torch

        numbers = [
            torch.rand((), dtype=torch.float64, generator=self._generators[row]) for row in rows
        ]
        return torch.stack(numbers)


def picked(logits: torch.Tensor, numbers: torch.Tensor, how: Sampling) -> torch.Tensor:
    """Picks a token id int64 `[rows]` from logits `[rows, vocab]` by numbers in [0, 1) `[rows]`.

    The distribution's cumulative sum is looked up, so that each token takes one number. `top_p`
    leaves the likeliest tokens that together have so much.

    Source: Holtzman et al., The Curious Case of Neural Text Degeneration (1904.09751), section 3.1.
    """
    import torch

    if how.temperature == 0:
        return logits.argmax(dim=-1)
    p = torch.softmax(logits.double() / how.temperature, dim=-1)
    if how.top_p < 1:
        ranked, order = p.sort(dim=-1, descending=True)
        before = ranked.cumsum(dim=-1) - ranked
        p = p.scatter(1, order, ranked.masked_fill(before >= how.top_p, 0))
    sums = p.cumsum(dim=-1)
    wanted = (numbers.to(sums.device) * sums[:, -1]).unsqueeze(1)
    found = torch.searchsorted(sums, wanted, right=True).squeeze(1)
    # A number just below the whole may fall past the end, where nothing is likely at all.
    last = (p > 0).long().cumsum(dim=-1).argmax(dim=-1)
    return torch.minimum(found, last)
