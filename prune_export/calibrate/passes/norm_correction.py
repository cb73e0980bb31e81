"""What the sites of a block would be given if nothing in it were edited, from the windows' heads.

In the true order a matrix sees what the edited ones before it give. Part of that is noise that the
edits put in, which makes inputs look more important than they are for what the block should give.
Their norms are corrected by how the first tokens of all windows differ without edits and with them.
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
    """Gathers something of a site's inputs, and of what they were without edits in the block."""

    def see_unedited(self, states: torch.Tensor) -> None:
        """Sees inputs `[samples, HEAD or fewer, in]` without edits; then `see` sees all windows."""


class CorrectedNorms(InputNorms):
    """Sums of squares by input, as they would be if no matrix of the block were edited."""

    def __init__(self, width: int, device: str) -> None:
        super().__init__(width, device)
        self._without, self._with = InputNorms(width, device), InputNorms(width, device)

    @property
    def sums(self) -> torch.Tensor:
        """`[in]`."""
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
    """Nothing more is wanted of these windows."""


def show_unedited(
    layerwise: LayerwiseModel,
    layer: int,
    call: Call,
    sites: Mapping[nn.Module, SeesUnedited],
    prefixes: Iterable[torch.Tensor],
) -> None:
    """Shows what arrives at modules of a block as it is now.

    `heads` are states `[samples, HEAD, residual]`, and `call` is how the block takes that length.
    """
    left: set[nn.Module] = set()

    def arrive(gathers: SeesUnedited, module: nn.Module, args: tuple[Any, ...]) -> None:
        # OPT flattens windows before its MLP.
        gathers.see_unedited(args[0].reshape(len(prefix), -1, args[0].shape[-1]))
        left.discard(module)
        if not left:
            raise _AllSeen

    with ExitStack() as hooks:
        for module, gathers in sites.items():
            hooks.callback(module.register_forward_pre_hook(partial(arrive, gathers)).remove)
        for prefix in prefixes:
            left.update(sites)
            try:
                layerwise.run(layer, prefix, call)
            except _AllSeen:
                continue
