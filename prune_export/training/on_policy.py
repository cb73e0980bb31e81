"""On-policy distillation: the student learns from its teacher about what it says itself.

In a share of the steps the last tokens of each window give way to what the student says after its
first ones, and these alone count. Which steps, and what is said in them, are functions of the seed,
the step and the window, so that a run that goes on says the same.

Source: Agarwal et al., On-Policy Distillation of Language Models (2306.13649), algorithm 1.
Differs: prompts are the beginnings of windows, so that all have one length.
"""

from __future__ import annotations

from typing import Any

import torch

from prune_export.errors import StageError
from prune_export.sampling import Dice, Sampling, picked, seed_of
from prune_export.training.settings import Training


def is_on_policy(settings: Training, step: int) -> bool:
    """Whether the student speaks itself in a step, counted from 0."""
    share = settings.distill.on_policy if settings.distill else 0.0
    return (
        bool(share) and float(Dice([seed_of(settings.seed, "on policy", step)]).roll([0])) < share
    )


def said_by_student(
    model: Any,
    windows: torch.Tensor,
    settings: Training,
    step: int,
    *,
    rows: int,
    device: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """A step's windows `[batch, length]` as the student has gone on with, and which tokens count.

    `rows` windows are worked on at once.

    Raises:
        StageError: the windows are no longer than what is to be said.
    """
    how = settings.distill
    assert how is not None
    if windows.shape[1] <= how.new_tokens:
        raise StageError(
            "healing  objective.distill.new_tokens",
            f"is {how.new_tokens}, and windows have {windows.shape[1]} tokens, which begin with a "
            "prompt",
            "write fewer, or a larger `length`",
        )
    drawing, ends, was = Sampling(how.sampling_temperature), _ends(model), model.training
    seeds = [seed_of(settings.seed, "said", step, place) for place in range(len(windows))]
    model.eval()
    parts = [
        _continued(
            model, windows[start : start + rows].to(device), how.new_tokens, drawing,
            Dice(seeds[start : start + rows]), ends,
        )
        for start in range(0, len(windows), rows)
    ]  # fmt: skip
    model.train(was)
    ids, marks = (torch.cat([part[one] for part in parts]).to(windows.device) for one in (0, 1))
    return ids, marks


@torch.no_grad()
def _continued(
    model: Any,
    windows: torch.Tensor,
    new: int,
    drawing: Sampling,
    dice: Dice,
    ends: frozenset[int],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Windows `[rows, length]` whose last `new` tokens the model says, and marks of those.

    After an end-of-text token nothing counts, and that token is repeated.
    """
    rows, length = windows.shape
    ids, marks = windows.clone(), torch.zeros_like(windows, dtype=torch.bool)
    over = torch.zeros(rows, dtype=torch.bool, device=windows.device)
    stops = torch.tensor(sorted(ends), dtype=torch.int64, device=windows.device)
    fed, cache = ids[:, : length - new], None
    for at in range(length - new, length):
        given = model(input_ids=fed, past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache = given.past_key_values
        token = picked(given.logits[:, -1].float(), dice.roll(range(rows)), drawing)
        ids[:, at] = torch.where(over, ids[:, at - 1], token)
        marks[:, at] = ~over
        over |= torch.isin(token, stops)
        if over.all():
            ids[:, at + 1 :] = ids[:, at : at + 1]
            break
        fed = ids[:, at : at + 1]
    return ids, marks


def _ends(model: Any) -> frozenset[int]:
    """The tokens that end a text, as the model's configurations have them."""
    found: set[int] = set()
    for config in (model.config, getattr(model, "generation_config", None)):
        ends = getattr(config, "eos_token_id", None)
        found |= set(ends if isinstance(ends, list | tuple) else [] if ends is None else [ends])
    return frozenset(int(one) for one in found)
