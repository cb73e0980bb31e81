"""The grid of a `search`: every combination of some depths and widths is a candidate."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import product
from typing import Annotated, Any, Final, Literal

from pydantic import Field

from prune_export.recipe.sources import Frozen

TO_TARGET: Final = "to_target"
_WIDTHS: Final = ("ffn", "heads", "kv_groups", "hidden", "experts")

Amount = Annotated[float, Field(ge=0, lt=1)] | Literal["to_target"]
Amounts = Annotated[tuple[Amount, ...], Field(min_length=1)]


class Grid(Frozen):
    """Combinations of blocks, heads, channels and hidden sizes; those near the target compete.

    `depth` and `width` are prune stages without their amounts. One list may hold `to_target`: that
    amount is then found, so that every combination of the others comes to the target. At most 1,000
    combinations are taken.
    """

    depth: Annotated[
        Mapping[str, Any] | None,
        Field(description="How blocks are removed, such as `{method: greedy_loss}`."),
    ] = None
    width: Annotated[
        Mapping[str, Any] | None,
        Field(description="How what is left is narrowed, such as `{method: minitron}`."),
    ] = None
    remove: Annotated[
        tuple[Annotated[int, Field(ge=0)], ...],
        Field(min_length=1, description="How many blocks go."),
    ] = (0,)
    ffn: Annotated[Amounts, Field(description="Fractions of the MLP channels that go.")] = (0.0,)
    heads: Annotated[Amounts, Field(description="Fractions of the query heads.")] = (0.0,)
    kv_groups: Annotated[Amounts, Field(description="Fractions of the key-value heads.")] = (0.0,)
    hidden: Annotated[Amounts, Field(description="Fractions of the hidden size.")] = (0.0,)
    experts: Annotated[Amounts, Field(description="Fractions of whole experts.")] = (0.0,)

    def model_post_init(self, context: Any) -> None:
        del context
        if any(self.remove) != (self.depth is not None):
            raise ValueError("expected `depth` and amounts of `remove`, or neither")
        asked = [name for name in _WIDTHS if any(getattr(self, name))]
        if bool(asked) != (self.width is not None):
            raise ValueError("expected `width` and amounts of what it narrows, or neither")
        found = [name for name in asked if TO_TARGET in getattr(self, name)]
        if len(found) > 1:
            raise ValueError(f"got `to_target` in `{found[0]}` and `{found[1]}`, expected it once")
        if not any(self.remove) and not asked:
            raise ValueError("expected amounts to remove")

    @property
    def sizes(self) -> tuple[int, ...]:
        """The lengths of the lists of amounts, without those of length 1."""
        lists = (self.remove, *(getattr(self, name) for name in _WIDTHS))
        return tuple(len(one) for one in lists if len(one) > 1)

    def items(self) -> tuple[tuple[Mapping[str, Any], ...], ...]:
        """Yields the prune stages of each combination that removes something."""
        return tuple(point for point in self._points() if point)

    def _points(self) -> Iterator[tuple[Mapping[str, Any], ...]]:
        lists = [getattr(self, name) for name in _WIDTHS]
        for remove, *amounts in product(self.remove, *lists):
            stages: list[Mapping[str, Any]] = []
            if remove and self.depth is not None:
                stages.append({**self.depth, "remove": remove})
            narrowed = {name: one for name, one in zip(_WIDTHS, amounts, strict=True) if one}
            if narrowed and self.width is not None:
                stages.append({**self.width, **narrowed})
            yield tuple(stages)


def labelled(method: str, body: Mapping[str, Any]) -> str:
    """Words a method with its amounts: `minitron ffn 0.25 hidden 0.1`."""
    named = ("remove", "sparsity", *_WIDTHS)
    amounts = (
        f"{name} {body[name]}"
        for name in named
        if name in body and (name != "sparsity" or body[name] != TO_TARGET)
    )
    return " ".join((method, *amounts)).replace(f" {TO_TARGET}", "")
