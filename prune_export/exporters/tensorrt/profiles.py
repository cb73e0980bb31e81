"""Optimization profiles of an engine: one for prompts, one for decoding."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Final

from pydantic import Field

from prune_export.errors import PlanError

PREFILL: Final = 0
DECODE: Final = 1
_PAST: Final = re.compile(r"past_key_values\.\d+\.(key|value)")

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Span:
    """A range of sizes, from 1 to `most`; kernels are tuned for `best`."""

    best: Annotated[int, Field(ge=1, description="Size that kernels are chosen for.")]
    most: Annotated[int, Field(ge=1, description="Largest size that is accepted.")]

    def __post_init__(self) -> None:
        if self.best > self.most:
            raise PlanError(
                "tensorrt",
                f"got best {self.best} and most {self.most}, expected best to be at most `most`",
                f"write `{{best: {self.most}, most: {self.most}}}`",
            )


@dataclass(frozen=True)
class Sizes:
    """The most sequences, prompt tokens at once, and tokens in all that an engine takes."""

    batch: Span
    prompt: Span
    context: Span

    def profiles(self, inputs: Mapping[str, Sequence[int]]) -> list[dict[str, tuple[Shape, ...]]]:
        """Makes the profiles: each input's least, best and largest shape.

        `inputs` has the graph's shapes, with -1 where they are dynamic. A prompt may follow a
        past, as when a text is fed in pieces; the first decoding step follows at least one token.
        """
        last = self.context.most - 1
        prefill = ((1, self.prompt.best, self.prompt.most), (0, 0, last))
        decode = ((1, 1, 1), (min(1, last), min(self.context.best, last), last))
        return [
            {name: self._shapes(name, shape, *lengths) for name, shape in inputs.items()}
            for lengths in (prefill, decode)
        ]

    def _shapes(
        self, name: str, shape: Sequence[int], new: Shape, past: Shape
    ) -> tuple[Shape, ...]:
        batch = (1, self.batch.best, self.batch.most)
        total = tuple(more + before for more, before in zip(new, past, strict=True))
        if _PAST.fullmatch(name):
            return tuple(
                (batch[at], shape[1], past[at], shape[3]) for at in range(3)
            )  # heads and their size are the model's
        length = total if name == "attention_mask" else new
        return tuple((batch[at], length[at]) for at in range(3))
