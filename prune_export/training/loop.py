"""The training loop: peft's adapters, torch's AdamW, and a resume that is exact.

Every number that a step draws is a function of the seed, the step and the place in it: the order of
the windows, dropout, the learning rate. A run that goes on from step 400 therefore takes the same
400th step as one that was never killed, whatever drew random numbers in between. Several processes
share a step's micro-batches; their gradients are added up, and each then takes the same step.

Differs: transformers' Trainer keeps the generators' states, shuffles ahead and writes checkpoints
in several files; each of these can end a killed run in other bytes.
"""

from __future__ import annotations

import hashlib
import math
import random
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Final, Protocol

import numpy as np
import torch

from prune_export.contracts import Work
from prune_export.errors import StageError
from prune_export.system.processes import Team
from prune_export.training.attention import PlainAttention, makes_scores
from prune_export.training.losses.loss import next_token_loss, predictions
from prune_export.training.on_policy import is_on_policy, said_by_student
from prune_export.training.settings import Training
from prune_export.training.state import State
from prune_export.training.teacher import NextToken, Objective

_LEAST_PAUSE_SECONDS: Final = 30.0
_PAUSE_TO_SAVE: Final = 50
"""A run spends at most a fiftieth of its time on saving itself."""


@dataclass(frozen=True)
class Run:
    """The choices that the settings leave open; made once, and kept through a resume."""

    device: str
    threads: int
    compute_dtype: str
    micro_batch: int
    gradient_checkpointing: bool
    held_out: int
    kept: int | None = None
    """Tokens of which a teacher's answers are kept; None where it runs beside, or there is none."""

    @property
    def dtype(self) -> torch.dtype:
        """`compute_dtype` as torch knows it."""
        return torch.float32 if self.compute_dtype == "float32" else torch.bfloat16

    def plain_attention(self, length: int) -> bool:
        """Whether attention over windows of `length` is made of plain products.

        Not where activations are recomputed: that is in the backward pass, outside of what this
        surrounds.
        """
        return makes_scores(self.device, self.dtype.itemsize, length) and (
            not self.gradient_checkpointing
        )


class Student(Protocol):
    """A model in training; `masks` are False where parameters stay zero, by their names."""

    @property
    def model(self) -> torch.nn.Module: ...
    @property
    def masks(self) -> Mapping[str, torch.Tensor]: ...
    def trained(self) -> dict[str, torch.nn.Parameter]: ...


def train(
    trainee: Student,
    windows: torch.Tensor,
    settings: Training,
    run: Run,
    state: State,
    *,
    work: Work,
    key: str,
    counted: torch.Tensor | None = None,
    objective: Objective | None = None,
) -> State:
    """Trains from `state` to the last step, saving it on the way under `key`.

    `windows` is int64 `[samples, length]`, trained on in full, or on the tokens that `counted` bool
    of the same shape marks. Without an `objective` it is the next token. In a team's other
    processes, which neither decide nor save, `state` is the leader's.

    Raises:
        StageError: the loss is not finite any more, or another process is gone.
    """
    goal, team = objective or NextToken(), work.team
    parameters = {**trainee.trained(), **goal.parameters()}
    attention = PlainAttention if run.plain_attention(windows.shape[1]) else nullcontext
    if state.step:
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(state.tensors[name])
    state = _leaders(state, parameters, team)
    if state.step == settings.steps:
        return state
    adam = torch.optim.AdamW(
        parameters.values(),
        lr=settings.learning_rate,
        weight_decay=settings.weight_decay,
        # One pass over memory instead of ten: for 85 million numbers 0.04 s instead of 0.30.
        fused=run.device == "cpu",
    )
    if state.step:
        for name, parameter in parameters.items():
            adam.state[parameter] = {
                "step": torch.tensor(float(state.step)),
                "exp_avg": state.tensors[f"{name}|mean"].to(parameter.device),
                "exp_avg_sq": state.tensors[f"{name}|square"].to(parameter.device),
            }
    model = trainee.model.train()
    losses, spent, learnt = list(state.losses), state.seconds, state.tokens
    began, first = time.monotonic(), state.step
    pause = _Pause(settings.save_every, began)
    with work.progress.task("healing", settings.steps) as task:
        task.advance(first)
        for step in range(first, settings.steps):
            rate = settings.rate(step)
            for group in adam.param_groups:
                group["lr"] = rate
            loss = 0.0
            picked = _picked(step, len(windows), settings)
            batch, marks = windows[picked], None if counted is None else counted[picked]
            if is_on_policy(settings, step):
                batch, marks = said_by_student(
                    model, batch, settings, step, rows=run.micro_batch, device=run.device
                )
                team.share([batch, marks])  # what the leader's says, however others round
            total = predictions(batch, marks)
            for place, (ids, own) in enumerate(_split(batch, marks, run.micro_batch, run.device)):
                if place % team.size != team.rank:
                    continue
                at = picked[place * run.micro_batch :][: len(ids)]
                with attention():
                    answers = goal.answers(ids, at)
                    _seed(settings.seed, "step", step, place)
                    logits = model(input_ids=ids, use_cache=False).logits
                share = len(ids) / settings.batch if own is None else predictions(ids, own) / total
                part = goal.loss(logits, ids, own, answers) * share
                del logits, answers
                torch.autograd.backward(part)
                loss += part.item()
            for parameter in parameters.values():
                # That of a block which every micro-batch left out.
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
            loss = _added(loss, parameters, team)
            refuse_diverged(loss, step + 1, settings)
            for name, kept in trainee.masks.items():
                # Before they are clipped: what cannot move has no part in how far the rest does.
                parameters[name].grad.masked_fill_(~kept, 0)  # type: ignore[union-attr]
            torch.nn.utils.clip_grad_norm_(list(parameters.values()), settings.max_grad_norm)
            adam.step()
            adam.zero_grad()
            for name, kept in trainee.masks.items():
                parameters[name].data.masked_fill_(~kept, 0)
            losses.append((step + 1, loss, rate))
            learnt += total
            now = time.monotonic()
            elapsed = now - began
            if team.leads and (pause.over(step + 1, now) or step + 1 == settings.steps):
                state = State(
                    step=step + 1,
                    tensors=_snapshot(parameters, adam),
                    losses=tuple(losses),
                    held_out=state.held_out,
                    seconds=spent + elapsed,
                    tokens=learnt,
                )
                state.save(work.scratch, key)
                pause = pause.after(now, time.monotonic())
            task.note(f"loss {_recent(losses):.3f}")
            task.advance()
    return state


def _leaders(state: State, parameters: Mapping[str, torch.nn.Parameter], team: Team) -> State:
    """The leader's state, in all processes; `parameters` have its values then."""
    if team.size == 1:
        return state
    step = team.told(state.step)
    with torch.no_grad():
        team.share([parameter.data for parameter in parameters.values()])
    if not step:
        return state
    moments = {
        f"{name}|{moment}": (
            state.tensors[f"{name}|{moment}"].to(parameter.device)
            if team.leads
            else torch.empty_like(parameter)
        )
        for name, parameter in parameters.items()
        for moment in ("mean", "square")
    }
    team.share(list(moments.values()))
    return replace(state, step=step, tensors={**state.tensors, **moments})


def _added(loss: float, parameters: Mapping[str, torch.nn.Parameter], team: Team) -> float:
    """The step's loss; `parameters` have its gradients then. Each process has a part of both."""
    if team.size == 1:
        return loss
    whole = torch.tensor([loss], dtype=torch.float64)
    team.total([whole])
    team.total([parameter.grad for parameter in parameters.values() if parameter.grad is not None])
    return float(whole)


@dataclass(frozen=True)
class _Pause:
    """The interval between two saves: a number of steps, or else long beside a save's time."""

    every: int | None
    since: float
    least: float = _LEAST_PAUSE_SECONDS

    def over(self, step: int, now: float) -> bool:
        return step % self.every == 0 if self.every else now - self.since >= self.least

    def after(self, began: float, ended: float) -> _Pause:
        least = max(_LEAST_PAUSE_SECONDS, _PAUSE_TO_SAVE * (ended - began))
        return _Pause(self.every, ended, least)


def refuse_diverged(loss: float, step: int, settings: Training) -> None:
    """Refuses a loss that is not finite, seen in or after a step.

    Raises:
        StageError: it is not finite.
    """
    if not math.isfinite(loss):
        raise StageError(
            f"healing  step {step}",
            f"the loss became {loss}, expected a finite number",
            f"lower `learning_rate` (it is {settings.learning_rate:g}), or lengthen `warmup`",
        )


def held_out_loss(
    model: torch.nn.Module,
    windows: torch.Tensor,
    micro_batch: int,
    device: str,
    counted: torch.Tensor | None = None,
) -> float:
    """Computes the mean held-out loss (nats a token) over windows, or over `counted` tokens."""
    model.eval()
    total = 0.0
    with torch.no_grad():
        for ids, own in _split(windows, counted, micro_batch, device):
            logits = model(input_ids=ids, use_cache=False).logits
            each = len(ids) if own is None else predictions(ids, own)
            total += next_token_loss(logits, ids, own).item() * each
    return total / (len(windows) if counted is None else predictions(windows, counted))


@contextmanager
def own_randomness(threads: int) -> Iterator[None]:
    """Lets a run set seeds and threads inside a `with`, and restores both."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    on_gpu = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
        if on_gpu:
            torch.cuda.set_rng_state_all(on_gpu)


def _snapshot(
    parameters: Mapping[str, torch.nn.Parameter], adam: torch.optim.AdamW
) -> dict[str, torch.Tensor]:
    """Copies the adapters and AdamW's moments."""
    tensors: dict[str, torch.Tensor] = {}
    for name, parameter in parameters.items():
        tensors[name] = parameter
        tensors[f"{name}|mean"] = adam.state[parameter]["exp_avg"]
        tensors[f"{name}|square"] = adam.state[parameter]["exp_avg_sq"]
    return tensors


def _picked(step: int, samples: int, settings: Training) -> torch.Tensor:
    """Draws the windows of a step: each epoch visits all of them in an order of its own."""
    first = step * settings.batch
    places = range(first, first + settings.batch)
    orders = {
        epoch: _order(settings.seed, epoch, samples) for epoch in {p // samples for p in places}
    }
    return torch.stack([orders[place // samples][place % samples] for place in places])


def _split(
    windows: torch.Tensor, counted: torch.Tensor | None, count: int, device: str
) -> Iterator[tuple[torch.Tensor, torch.Tensor | None]]:
    for start in range(0, len(windows), count):
        own = None if counted is None else counted[start : start + count].to(device)
        yield windows[start : start + count].to(device), own


def trained_tokens(windows: torch.Tensor, counted: torch.Tensor | None, settings: Training) -> int:
    """Counts the tokens that all steps train on."""
    if counted is None:
        return settings.steps * settings.batch * windows.shape[1]
    each = counted[:, 1:].sum(dim=1)
    picks = (_picked(step, len(windows), settings) for step in range(settings.steps))
    return sum(int(each[picked].sum()) for picked in picks)


@lru_cache(maxsize=4)
def _order(seed: int, epoch: int, samples: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(_mixed(seed, "epoch", epoch))
    return torch.randperm(samples, generator=generator)


def _seed(*parts: int | str) -> None:
    """Seeds every generator that a forward pass could draw from."""
    mixed = _mixed(*parts)
    random.seed(mixed)
    np.random.seed(mixed % 2**32)
    torch.manual_seed(mixed)


def _mixed(*parts: int | str) -> int:
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:7])


def _recent(losses: Sequence[tuple[int, float, float]], count: int = 10) -> float:
    last = losses[-count:]
    return sum(loss for _, loss, _ in last) / len(last)
