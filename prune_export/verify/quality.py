"""Measures the perplexity of a checkpoint or an engine, by one protocol.

Source: the protocol of Wanda and SparseGPT: the text is tokenised once and cut
into non-overlapping windows; perplexity = exp(sum(loss * length) / (windows * length)). Windows
are of equal length, so this is exp of the mean of the windows' mean losses. The window's first
token is given and not predicted. State the length with the number: a dense Llama-2-7B has 5.47 at
2048 tokens and 5.12 at 4096. What a window begins with is part of its tokens: models that were
trained with BOS are judged too badly without (`prefix` of the data). Where only what an assistant
says counts, a window's loss is the mean over that, and windows count alike.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from prune_export.errors import VerifyError
from prune_export.machine import Machine
from prune_export.progress import Progress, Silent
from prune_export.verify.engine import PYTORCH, Engine
from prune_export.verify.results import Perplexity
from prune_export.verify.session import Session

if TYPE_CHECKING:
    from prune_export.calibrate import TokenSet


def measure_perplexity(
    name: str,
    engine: Engine,
    tokens: TokenSet,
    machine: Machine,
    *,
    windows: int | None = None,
    progress: Progress | None = None,
) -> Perplexity:
    """Measures `engine`'s perplexity over the first `windows` windows of `tokens`, by default all.

    For a checkpoint, `engine` is `Engine.pytorch(path)`, computed in float32; where that is larger
    than the memory, one block at a time is. For an engine the tokens go through its own cache, so
    that the number is that of what will be served; an engine that only returns the last position's
    logits takes some times longer (`drive.window_losses`).

    Raises:
        VerifyError: there is no window of at least 2 tokens, or a loss is not finite.
    """
    from prune_export.verify.pytorch import fits_in_memory
    from prune_export.verify.streamed import streamed_losses

    ids = tokens.ids[:windows].numpy()
    counted = None if tokens.counted is None else tokens.counted[:windows].numpy()
    if not len(ids) or ids.shape[1] < 2:
        raise VerifyError(
            f"perplexity of {name}",
            f"got tokens {ids.shape}, expected at least one window of at least 2",
            "give more evaluation text, or a shorter `length`",
        )
    with (progress or Silent()).task(f"perplexity of {name}", len(ids)) as task:
        if engine.exporter == PYTORCH and not fits_in_memory(engine.path, machine):
            losses = streamed_losses(engine.path, ids, machine, task, counted)
        else:
            with Session(engine, machine) as session:
                losses = session.losses(ids, task, counted)
    found = perplexity(name, losses, int(ids.shape[1]))
    if counted is None:
        return found
    return replace(found, tokens=int(counted[:, 1:].sum()))


def perplexity(name: str, losses: list[float], length: int) -> Perplexity:
    """Makes the result from each window's mean loss in nats.

    Raises:
        VerifyError: a loss is not finite.
    """
    bad = [at for at, loss in enumerate(losses) if not math.isfinite(loss)]
    if bad:
        raise VerifyError(
            f"perplexity of {name}",
            f"the loss of window {bad[0]} is {losses[bad[0]]}, expected a finite number",
            "its weights or activations overflow: check them, or use float32 or bfloat16",
        )
    return Perplexity(
        name=name,
        value=float(np.exp(np.mean(losses))),
        windows=len(losses),
        length=length,
        tokens=len(losses) * (length - 1),
        losses=losses,
    )
