"""LayerDrop: skips whole blocks at random while a model is trained.

A model trained so can later do without some of its blocks (`method: every_other`). That holds for
models that were trained with it for long; a short healing makes the model a little less sensitive.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch


def skipped(blocks: int, share: float, seed: int) -> frozenset[int]:
    """Draws the blocks that a forward pass skips, each with probability `share`.

    One always runs: where all would be left out, the one with the highest number drawn does.

    Source: Fan et al., "Reducing Transformer Depth on Demand with Structured Dropout",
    arXiv:1909.11556, section 3.1, and fairseq's LayerDropModuleList: a block runs if a number drawn
    from [0, 1) is above `share`.
    """
    numbers = torch.rand(blocks, generator=torch.Generator().manual_seed(seed))
    runs = numbers > share
    runs[numbers.argmax()] = True
    return frozenset((~runs).nonzero().flatten().tolist())


@contextmanager
def left_out(
    model: torch.nn.Module,
    blocks: Sequence[torch.nn.Module],
    share: float,
    *,
    in_tuple: bool = False,
) -> Iterator[None]:
    """Makes forward passes in training skip some of `blocks` inside a `with`.

    With `in_tuple` the model takes the first of what a block returns (`Table.tuple_blocks`).

    Which ones follows from the seed that torch was last given, which the training sets for every
    micro-batch. What runs is not scaled up, and in evaluation all run.
    """
    now: set[int] = set()

    def draw(_model: torch.nn.Module, _args: object) -> None:
        now.clear()
        now.update(skipped(len(blocks), share, torch.initial_seed()))

    with ExitStack() as undo:
        if share:
            undo.callback(model.register_forward_pre_hook(draw).remove)
            for number, block in enumerate(blocks):
                # An instance's own `forward` hides that of its class.
                block.forward = partial(_forward, now, number, in_tuple, block, block.forward)
                undo.callback(delattr, block, "forward")
        yield


def _forward(
    now: set[int],
    number: int,
    in_tuple: bool,
    block: torch.nn.Module,
    forward: Callable[..., Any],
    *args: Any,
    **named: Any,
) -> Any:
    if block.training and number in now:
        states = args[0] if args else named["hidden_states"]
        return (states, None) if in_tuple else states
    return forward(*args, **named)
