"""What is removed of a block, and how: whole blocks go, parts of them are silenced.

A block's attention or MLP alone can't be left out of a stock transformers model, but the matrix
that writes its output can be zero: it then adds nothing to the residual state, also where a norm
follows it, and also beside a parallel branch. Exporters leave out what multiplies by zero.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from functools import partial
from typing import Annotated, Any, Final, Literal

import torch
from pydantic import Field

from prune_export.arch import Arch
from prune_export.calibrate import Unit
from prune_export.checkpoint import Checkpoint
from prune_export.checkpoint.header import TORCH
from prune_export.contracts import Decision
from prune_export.methods import _depth
from prune_export.surgery import Overwrite

Of = Annotated[
    Literal["block", "attention", "mlp"],
    Field(
        description="What is removed: whole `block`s, or of a block its `attention` or its `mlp` "
        "alone. Those stay in the files as zeros, so that any transformers loads them; exported "
        "engines leave them out."
    ),
]

_OUTPUTS: Final = {
    "attention": ("o", "o.bias"),
    "mlp": ("down", "down.bias", "expert.down"),
}
"""The roles of what writes a part's output."""


def decision(arch: Arch, checkpoint: Checkpoint, units: Collection[Unit], **log: Any) -> Decision:
    """The edits that remove these units, all of one kind; the log names them."""
    blocks = [unit.layer for unit in units if unit.part == "block"]
    if blocks:
        return _depth.decision(arch, blocks, **log)
    zeroed = [[unit.layer, unit.part] for unit in sorted(units)]
    edits = tuple(edit for unit in sorted(units) for edit in _silencing(arch, checkpoint, unit))
    return Decision(edits, {"zeroed": zeroed, "kept": list(range(arch.layers)), **log})


def _silencing(arch: Arch, checkpoint: Checkpoint, unit: Unit) -> Iterator[Overwrite]:
    for tensor in arch.block(unit.layer):
        if tensor.role in _OUTPUTS[unit.part]:
            dtype = getattr(torch, TORCH[checkpoint.entries[tensor.name].dtype])
            yield Overwrite(tensor.name, partial(torch.zeros, arch.shape(tensor), dtype=dtype))
