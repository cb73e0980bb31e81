"""Compiles a causal language model as one step: ids and KV cache in, logits and cache out."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import torch
from torch import nn

from prune_export.errors import PlanError
from prune_export.exporters._shared.quiet import quiet
from prune_export.exporters.aoti.sparse import call_by_dispatcher

Cache = list[tuple[torch.Tensor, torch.Tensor]]

EXAMPLE: Final = {"batch": 2, "new": 3, "past": 6}
"""Sizes that are traced: none is 0 or 1, which torch.export would fix, and 8 does not divide
`new + past`. CUDA's attention pads a mask that is not aligned; were this one aligned, every length
would be taken to be.
"""


class Step(nn.Module):
    """A module that runs `model` with its KV cache as plain tensors.

    With `last`, it gives the last position's logits only.
    """

    def __init__(self, model: Any, *, last: bool) -> None:
        super().__init__()
        self.model, self.last = model, last

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        position_ids: torch.Tensor,
        past: Cache,
    ) -> tuple[torch.Tensor, Cache]:
        from transformers import DynamicCache

        found = self.model(
            input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids,
            past_key_values=DynamicCache(past), use_cache=True,
            logits_to_keep=1 if self.last else 0,
        )  # fmt: skip
        return found.logits, [(layer.keys, layer.values) for layer in found.past_key_values.layers]


def cache_sizes(model: Any) -> list[tuple[int, int]]:
    """Finds (heads, head size) of each layer's KV cache, by a step of one token."""
    device = next(model.parameters()).device
    with torch.no_grad():
        found = model(input_ids=torch.zeros(1, 1, dtype=torch.long, device=device), use_cache=True)
    return [(layer.keys.shape[1], layer.keys.shape[3]) for layer in found.past_key_values.layers]


def empty_cache(sizes: list[tuple[int, int]], batch: int, length: int, like: torch.Tensor) -> Cache:
    """Makes a KV cache of zeros, with the dtype and device of `like`."""
    return [
        (like.new_zeros(batch, heads, length, size), like.new_zeros(batch, heads, length, size))
        for heads, size in sizes
    ]


def compiled(model: Any, sizes: list[tuple[int, int]], out: Path, *, last: bool) -> None:
    """Exports `model` for any batch, prompt and past length, and compiles it into `out`.

    Raises:
        PlanError: torch.export cannot follow this model's code.
    """
    weight = next(model.parameters())
    batch, new, past = EXAMPLE.values()
    ids = torch.zeros(batch, new, dtype=torch.long, device=weight.device)
    mask = torch.ones(batch, past + new, dtype=torch.long, device=weight.device)
    positions = torch.arange(past, past + new, device=weight.device).repeat(batch, 1)
    free = torch.export.Dim.DYNAMIC
    pair = ({0: free, 2: free}, {0: free, 2: free})
    shapes = {
        "input_ids": {0: free, 1: free},
        "attention_mask": {0: free, 1: free},
        "position_ids": {0: free, 1: free},
        "past": [pair for _ in sizes],
    }
    given = (ids, mask, positions, empty_cache(sizes, batch, past, weight.detach()))
    with torch.no_grad():
        try:
            with quiet():
                program = torch.export.export(
                    Step(model, last=last), given, dynamic_shapes=shapes, strict=False
                )
        except Exception as error:  # torch's own classes share no base
            first = next((line for line in str(error).splitlines() if line.strip()), "")
            raise PlanError(
                "aoti", f"torch.export cannot follow this model's code: {first:.200}",
                "export this model with another exporter",
            ) from error  # fmt: skip
        call_by_dispatcher()
        torch._inductor.aoti_compile_and_package(program, package_path=str(out))
