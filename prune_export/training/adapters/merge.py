"""Merges adapters into the weights: W' = W + (alpha / r) B A, one tensor at a time.

What no adapter touches is copied byte for byte, and zeros that are to be kept stay. A 4-bit base
offers two weights to add to. Added to the dequantized one, the result computes what was trained,
and every linear weight carries NF4's error for good. Added to the original one, the adapter meets
weights that it did not see in training, but better ones. Never is an adapter merged while the base
is 4-bit: quantizing the sum again loses the update.

Source: Hu et al., LoRA (2106.09685), equation 3; Dettmers et al., QLoRA (2305.14314), equation 5.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass

import torch

from prune_export.checkpoint import Checkpoint
from prune_export.checkpoint.header import TORCH
from prune_export.surgery import Overwrite

Factors = tuple[torch.Tensor, torch.Tensor]


def merged(
    source: Checkpoint,
    factors: Mapping[str, Factors],
    *,
    scaling: float,
    transposed: Collection[str],
    base: Mapping[str, Callable[[], torch.Tensor]],
    keep_zeros: Collection[str] = (),
) -> Iterator[Overwrite]:
    """Makes the edits that merge adapters into `source`.

    `factors` are A `[rank, in]` and B `[out, rank]` by stored weight, `transposed` the weights that
    are stored `[in, out]`, `base` what stands in for a stored weight (a dequantized one), and
    `keep_zeros` the weights that stay zero where they are.
    """
    for name in source.entries:
        if name in factors or name in base:
            yield Overwrite(
                name,
                _Merged(
                    source,
                    name,
                    factors.get(name),
                    scaling,
                    transposed=name in transposed,
                    base=base.get(name),
                    keeps_zeros=name in keep_zeros,
                ),
            )


@dataclass(frozen=True)
class _Merged:
    source: Checkpoint
    name: str
    factors: Factors | None
    scaling: float
    transposed: bool
    base: Callable[[], torch.Tensor] | None
    keeps_zeros: bool

    def __call__(self) -> torch.Tensor:
        value = self.base() if self.base else self.source.read(self.name).float()
        if self.factors:
            a, b = (factor.float() for factor in self.factors)
            delta = (b @ a).mul_(self.scaling)  # [out, in]
            value += delta.T if self.transposed else delta
        made = value.to(getattr(torch, TORCH[self.source.entries[self.name].dtype]))
        if not self.keeps_zeros:
            return made
        stored = self.source.read(self.name)
        return torch.where(stored == 0, stored, made)
