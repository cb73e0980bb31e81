"""Tracks which attentions and MLPs are zeroed (ablated), as far as is known without weights.

A stage that chooses by data is known to have zeroed so many, in some of the blocks it might choose
from. So counts are lower bounds: enough to refuse what cannot be, never to refuse what can.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Places:
    """The blocks whose part is zero: the `sure` ones, and `others` more, all in `among`."""

    sure: frozenset[int] = frozenset()
    others: int = 0
    among: frozenset[int] = frozenset()

    def least_in(self, layers: Collection[int]) -> int:
        """A lower bound on the number of these blocks in which the part is zero."""
        elsewhere = self.among - set(layers)
        return len(self.sure & set(layers)) + max(0, self.others - len(elsewhere))

    def listed(self, layers: Collection[int]) -> Places:
        """After it is zeroed in the listed blocks, in some of which it may be already."""
        others = max(0, self.others - len(self.among & set(layers)))
        return Places(self.sure | set(layers), others, self.among - set(layers))

    def chosen(self, count: int, layers: Collection[int]) -> Places:
        """After it is zeroed in `count` more of these blocks."""
        return Places(self.sure, self.others + count, self.among | (set(layers) - self.sure))

    def without(self, kept: Collection[int]) -> Places:
        """After all blocks but these (ascending) are removed, and the rest renumbered."""
        numbers = {layer: number for number, layer in enumerate(kept)}
        sure, among = (
            frozenset(numbers[layer] for layer in layers if layer in numbers)
            for layers in (self.sure, self.among)
        )
        return Places(sure, max(0, self.others - len(self.among) + len(among)), among)

    def without_some(self, count: int, left: int) -> Places:
        """After `count` unknown blocks are removed, and `left` remain."""
        others = max(0, len(self.sure) + self.others - count)
        return Places(frozenset(), others, frozenset(range(left)))


@dataclass(frozen=True)
class Ablated:
    """The blocks whose attention, and those whose MLP, is zero; none are known at first."""

    parts: Mapping[str, Places] = field(default_factory=dict)

    def of(self, part: str) -> Places:
        """The blocks whose `part` is zero."""
        return self.parts.get(part, Places())

    def replaced(self, part: str, places: Places) -> Ablated:
        """The same with other blocks for one part."""
        return Ablated({**self.parts, part: places})

    def without(self, kept: Collection[int]) -> Ablated:
        """After all blocks but these are removed."""
        return Ablated({part: places.without(kept) for part, places in self.parts.items()})

    def without_some(self, count: int, left: int) -> Ablated:
        """After `count` unknown blocks are removed, and `left` remain."""
        found = {part: places.without_some(count, left) for part, places in self.parts.items()}
        return Ablated(found)
