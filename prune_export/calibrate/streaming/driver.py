"""What every calibration pass does first: refuses windows that do not fit, and chooses a dtype."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import Final

import torch

from prune_export.arch import Arch
from prune_export.calibrate.data.token_set import TokenSet
from prune_export.checkpoint import Checkpoint
from prune_export.errors import PlanError
from prune_export.machine import Machine

BATCH_TOKENS: Final[Mapping[str, int]] = {"cpu": 2048, "cuda": 16384}
"""Tokens that go through a block at once: enough for full speed, little to hold."""


def check(arch: Arch, tokens: TokenSet) -> None:
    """Refuses windows that do not fit the model.

    Raises:
        PlanError: they are longer than its positions, or hold ids that it does not know.
    """
    positions = arch.config.get("max_position_embeddings") or arch.config.get("n_positions")
    if positions and tokens.length > int(positions):
        raise PlanError(
            "data  length",
            f"got {tokens.length}, but the model has {positions} positions",
            f"write `length: {positions}` or less",
        )
    refuse_unknown(arch, tokens)


def refuse_unknown(arch: Arch, tokens: TokenSet) -> None:
    """Refuses tokens for which the model has no embedding.

    Raises:
        PlanError: there is one.
    """
    last = int(tokens.ids.max()) if tokens.ids.numel() else -1
    if last >= arch.sizes["vocab"]:
        raise PlanError(
            "data",
            f"holds token id {last}, but the model knows {arch.sizes['vocab']} ids",
            "make the tokens with this model's tokenizer; if a token was added to it, resize the "
            "embedding",
        )


def compute_dtype(checkpoint: Checkpoint, machine: Machine) -> torch.dtype:
    """Chooses the dtype that a pass computes in."""
    bfloat16 = machine.device == "cuda" and checkpoint.dtype == "bfloat16"
    return torch.bfloat16 if bfloat16 else torch.float32


def block_bytes(arch: Arch, dtype: torch.dtype) -> int:
    """The size of the largest block in bytes."""
    return max(
        sum(prod(arch.shape(tensor)) for tensor in arch.block(layer)) * dtype.itemsize
        for layer in range(arch.layers)
    )
