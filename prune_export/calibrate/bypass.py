"""Runs a loaded block without its attention, or without its MLP, as if their outputs were zero."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, Final

import torch

from prune_export.calibrate.skeleton import Skeleton

OUTPUTS: Final = {"attention": ("o",), "mlp": ("down", "expert.down")}
"""The roles of the matrices that write what a part of a block adds to the residual state."""

_LANDMARKS: Final = {"attention": ("o",), "mlp": ("down", "router")}
"""The roles of matrices by which a part is found; experts are fused in memory, their router not."""


@contextmanager
def bypassed(skeleton: Skeleton, layer: int, parts: Collection[str]) -> Iterator[None]:
    """Inside, these parts of a loaded block give zeros; where they are modules, at no cost."""
    with ExitStack() as undo:
        for part in parts:
            module, whole = _module(skeleton, layer, part)
            zeros = _zeros_and_none if part == "attention" and whole else _zeros
            if whole:
                # An instance's own `forward` hides that of its class.
                module.forward = partial(zeros, skeleton.arch.sizes["residual"])
                undo.callback(delattr, module, "forward")
            else:
                handle = module.register_forward_hook(lambda _m, _i, out: torch.zeros_like(out))
                undo.callback(handle.remove)
        yield


def _module(skeleton: Skeleton, layer: int, part: str) -> tuple[Any, bool]:
    """The module of a part and True; where the block has none (OPT's MLP), that of its output."""
    landmark = next(
        tensor for tensor in skeleton.arch.block(layer) if tensor.role in _LANDMARKS[part]
    )
    leaf, block = skeleton.module(landmark), skeleton.block(layer)
    for parent in block.modules():
        if parent is not block and any(child is leaf for child in parent.children()):
            return parent, True
    return leaf, False


def _zeros(width: int, *args: Any, **named: Any) -> torch.Tensor:
    states: torch.Tensor = args[0] if args else named["hidden_states"]
    assert states.shape[-1] == width
    return torch.zeros_like(states)


def _zeros_and_none(width: int, *args: Any, **named: Any) -> tuple[torch.Tensor, None]:
    return _zeros(width, *args, **named), None
