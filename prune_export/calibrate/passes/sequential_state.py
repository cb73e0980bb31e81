"""What a sequential pass is given and holds: the editor, the model, and its hidden states."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import torch

from prune_export.arch import Arch
from prune_export.calibrate.passes.dense_reference import DenseReference
from prune_export.calibrate.passes.norm_correction import PREFIX_TOKENS
from prune_export.calibrate.streaming.driver import batches
from prune_export.calibrate.streaming.layerwise_model import LayerwiseModel
from prune_export.calibrate.streaming.linear_groups import Accumulator, LinearGroup, Weights
from prune_export.calibrate.streaming.offload import Lane

Order = Literal["sequential", "block"]
"""Whether a linear layer's inputs come from the edited layers of its block, or the dense ones."""


@dataclass(frozen=True)
class Edited:
    """The edit of a linear group: new matrices `[out, in]` by stored name, and its log (JSON).

    `beside` are tensors to keep that are no weights, such as scales, by names of the editor's own.
    """

    weights: Mapping[str, torch.Tensor] = field(default_factory=dict)
    log: Mapping[str, Any] = field(default_factory=dict)
    beside: Mapping[str, torch.Tensor] = field(default_factory=dict)


class Editor(Protocol):
    """Edits linear groups one after another; keeps nothing from one block to the next."""

    @property
    def key(self) -> str:
        """JSON that identifies the editor: a killed pass goes on only with an equal one."""

    def watch(self, group: LinearGroup, width: int, device: str) -> Accumulator | None:
        """Makes the accumulator of a group's inputs `[…, width]`; None leaves it unedited."""

    def edit(self, group: LinearGroup, weights: Mapping[str, torch.Tensor], seen: Any) -> Edited:
        """Edits float32 copies `[out, in]` by stored name; `seen` is the accumulator of `watch`."""


@dataclass(frozen=True)
class SequentialState:
    """The parts of a sequential pass that each block is edited with.

    `lane` holds the hidden states between two blocks, and `dense` those of the unedited model where
    they are asked for. With `suspends`, forward passes wait inside a block until all windows have
    arrived; else the block is computed again. Edited matrices are written to `folder`.
    """

    arch: Arch
    editor: Editor
    order: Order
    ids: torch.Tensor
    batch: int
    layerwise: LayerwiseModel
    weights: Weights
    lane: Lane
    dense: DenseReference | None
    suspends: bool
    folder: Path

    def batches(self) -> Iterator[tuple[int, int]]:
        """Yields the first and last window (exclusive) of each batch that a block is run on."""
        return batches(len(self.ids), self.batch)

    def prefixes(self) -> Iterator[torch.Tensor]:
        """Yields the states of each window's first tokens, `[samples, PREFIX_TOKENS, residual]`."""
        rows = max(1, self.batch * self.ids.shape[1] // PREFIX_TOKENS)
        held: list[torch.Tensor] = []
        for start, stop in self.batches():
            first = self.lane.states.prefixes(start, stop, PREFIX_TOKENS)
            held.append(first.to(self.layerwise.device))
            if stop == len(self.ids) or sum(map(len, held)) >= rows:
                yield torch.cat(held)
                held = []

    def swap(self) -> None:
        """Makes the outputs of the block that was edited the inputs of the next one."""
        self.lane.swap()
        if self.dense:
            self.dense.swap()
