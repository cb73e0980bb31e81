"""Corrects activation norms for the noise that earlier edits in the same block put into them.

In sequential order a linear layer sees inputs that come from already pruned layers of its block.
Part of them is pruning noise, which makes inputs look more important than they are. The norms are
corrected by the ratio, on the first tokens of all windows, of the inputs before and after pruning.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from functools import partial
from typing import Any, Final, Protocol, runtime_checkable

import torch
from torch import nn

from prune_export.calibrate.streaming.layerwise_model import Call, LayerwiseModel
from prune_export.calibrate.streaming.linear_groups import Accumulator, InputNorms

PREFIX_TOKENS: Final = 64
"""Tokens of each window that are computed without edits: a short way into many texts (ADR 0019)."""

_USUAL: Final = 0.1
"""Share of what a channel has on average that is added to both sides of a ratio: a channel that is
rarely active is in the heads only by chance."""


@runtime_checkable
class SeesUnedited(Accumulator, Protocol):
    """Accumulates a statistic of a linear group's inputs, and of these inputs before any edit."""

    def see_unedited(self, states: torch.Tensor) -> None:
        """Adds inputs `[samples, PREFIX_TOKENS or fewer, in]` from before any edit of the block.

        Called before `see`, which then adds those of all windows.
        """


class CorrectedNorms(InputNorms):
    """Squared input norms (Wanda), corrected to what they would be in the unedited block."""

    def __init__(self, width: int, device: str) -> None:
        super().__init__(width, device)
        self._without, self._with = InputNorms(width, device), InputNorms(width, device)

    @property
    def sums(self) -> torch.Tensor:
        """The corrected sums of squares `[in]`."""
        found = super().sums
        if not self._without.tokens:
            return found
        usual = found * (_USUAL * self._without.tokens / self.tokens)
        wanted, given = self._without.sums + usual, self._with.sums + usual
        return torch.where(given > 0, found * wanted / given, found)

    def see_unedited(self, states: torch.Tensor) -> None:
        self._without.see(states)

    def see(self, states: torch.Tensor) -> None:
        super().see(states)
        if self._without.tokens:
            self._with.see(states[:, :PREFIX_TOKENS])


class _AllSeen(Exception):
    """Ends a forward pass early: all inputs that were asked for have been seen."""


def show_unedited(
    layerwise: LayerwiseModel,
    layer: int,
    call: Call,
    groups: Mapping[nn.Module, SeesUnedited],
    prefixes: Iterable[torch.Tensor],
) -> None:
    """Records the inputs of linear groups of a block before any of them is edited.

    `prefixes` are hidden states `[samples, PREFIX_TOKENS, residual]`; `call` holds the block's
    other arguments (masks, positions) for that length.
    """
    left: set[nn.Module] = set()

    def arrive(gathers: SeesUnedited, module: nn.Module, args: tuple[Any, ...]) -> None:
        # OPT flattens windows before its MLP.
        gathers.see_unedited(args[0].reshape(len(prefix), -1, args[0].shape[-1]))
        left.discard(module)
        if not left:
            raise _AllSeen

    with ExitStack() as hooks:
        for module, gathers in groups.items():
            hooks.callback(module.register_forward_pre_hook(partial(arrive, gathers)).remove)
        for prefix in prefixes:
            left.update(groups)
            try:
                layerwise.run(layer, prefix, call)
            except _AllSeen:
                continue
