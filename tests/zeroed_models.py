"""Saved tiny models in which structure is zeroed by hand, as pruning in single blocks stores it."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

from prune_export.arch import Arch, Tensor


class Zeroed:
    """A checkpoint at `path`, its tensors at hand; `save` writes them back."""

    def __init__(self, path: Path) -> None:
        self.file = path / "model.safetensors"
        self.arch = Arch.from_config(AutoConfig.from_pretrained(path).to_dict())
        self.tensors = load_file(self.file)

    def save(self) -> None:
        save_file(self.tensors, self.file, metadata={"format": "pt"})

    def tensor(self, role: str, layer: int, expert: int | None = None) -> Tensor:
        (found,) = (t for t in self.arch.block(layer) if (t.role, t.expert) == (role, expert))
        return found

    def channels(self, layer: int, gone: Iterable[int], expert: int | None = None) -> None:
        """Zeroes columns of a down projection."""
        self._zero(self.tensor("down" if expert is None else "expert.down", layer, expert), gone)

    def heads(self, layer: int, gone: Iterable[tuple[int, int]]) -> None:
        """Zeroes what the output projection reads of heads (group, head in it)."""
        groups, dim = self.arch.sizes.get(f"group.{layer}", 1), self.arch.sizes["dim"]
        firsts = ((kv * groups + head) * dim for kv, head in gone)
        places = [place for first in firsts for place in range(first, first + dim)]
        self._zero(self.tensor("o", layer), places)

    def whole(self, layer: int, role: str, *, bias: bool) -> None:
        """Zeroes a whole projection, and with `bias` its bias."""
        for tensor in self.arch.block(layer):
            if tensor.role == role or (bias and tensor.role == f"{role}.bias"):
                self.tensors[tensor.name].zero_()

    def _zero(self, tensor: Tensor, places: Iterable[int]) -> None:
        along = next(at for at, dim in enumerate(tensor.dims.of) if ("residual",) not in dim)
        self.tensors[tensor.name].index_fill_(
            along, torch.tensor(list(places), dtype=torch.long), 0.0
        )
