"""Trains a whole small model under a mask: one round of finding a lottery ticket.

Everything a step draws is a function of the seed and the step, so a training that is killed goes on
from its last save and ends in the same bytes.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch

from prune_export.arch import Arch, Tensor
from prune_export.calibrate import as_matrix
from prune_export.calibrate.streaming.layerwise_model import LayerwiseModel
from prune_export.calibrate.streaming.linear_groups import part_of
from prune_export.checkpoint import Checkpoint
from prune_export.checkpoint.loading import load_model
from prune_export.errors import StageError
from prune_export.progress import Task

TOKENS: Final = 2048
"""Tokens that are in memory at once; of longer windows, one window."""

_SAVE_SECONDS: Final = 30.0


@dataclass(frozen=True)
class Schedule:
    """A training's length and learning rate: a linear warm-up, then a cosine."""

    steps: int
    batch: int
    learning_rate: float
    seed: int

    def rate(self, step: int) -> float:
        """The learning rate of a step, counted from 0; a rewound training goes on from its step."""
        warmup = self.steps // 10
        if step < warmup:
            return self.learning_rate * (step + 1) / (warmup + 1)
        gone = (step - warmup) / (self.steps - warmup)
        return self.learning_rate * 0.5 * (1 + math.cos(math.pi * gone))


class Student:
    """A model in float32 in memory, its matrices by stored name, and their masks."""

    def __init__(self, checkpoint: Checkpoint, arch: Arch, device: str) -> None:
        self.arch, self.device = arch, device
        with _no_bars():
            self.model: Any = load_model(checkpoint.path, dtype=torch.float32).to(device)
        names = LayerwiseModel(checkpoint, arch, dtype=torch.float32, device="cpu").name_in_memory
        own = dict(self.model.named_buffers())  # some families store buffers
        own |= dict(self.model.named_parameters(remove_duplicate=False))
        self.places = {tensor.name: own[names(tensor)] for tensor in arch.stored()}
        self.masks: dict[str, torch.Tensor] = {}
        """By stored matrix, bool `[out, in]`: False where it is zero and stays zero."""

    def matrix(self, tensor: Tensor) -> torch.Tensor:
        """A stored matrix `[out, in]`, in the model's own memory."""
        return as_matrix(tensor, part_of(tensor, self.places[tensor.name].data))

    def state(self) -> dict[str, torch.Tensor]:
        """A copy of all parameters."""
        return {name: p.detach().cpu().clone() for name, p in self.model.named_parameters()}

    def load(self, state: Mapping[str, torch.Tensor]) -> None:
        """Loads all parameters, and masks them."""
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                parameter.copy_(state[name])
        self.apply()

    def redraw(self, seed: int) -> None:
        """Initializes all parameters at random, as for a model that was never trained."""
        from transformers import AutoModelForCausalLM

        with torch.random.fork_rng():
            torch.manual_seed(seed)
            fresh = AutoModelForCausalLM.from_config(
                self.model.config, dtype=torch.float32, trust_remote_code=False
            )
        self.load(dict(fresh.named_parameters()))

    def apply(self) -> None:
        """Zeroes the weights that the masks do not keep."""
        for name, mask in self.masks.items():
            self.matrix(self.arch.by_name[name]).masked_fill_(~mask, 0)

    def stop(self) -> None:
        """Removes the gradients of weights that the masks do not keep."""
        for name, mask in self.masks.items():
            tensor = self.arch.by_name[name]
            whole = self.places[name].grad
            if whole is not None:
                as_matrix(tensor, part_of(tensor, whole)).masked_fill_(~mask, 0)

    def loss(self, ids: torch.Tensor) -> torch.Tensor:
        """The mean next-token loss of windows."""
        ids = ids.to(self.device)
        logits = self.model(input_ids=ids, use_cache=False).logits[:, :-1].float()
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())

    @torch.no_grad()
    def measured(self, windows: torch.Tensor) -> float:
        """Evaluates the mean loss over windows, one at a time, without training."""
        self.model.eval()
        return sum(float(self.loss(window[None])) for window in windows) / len(windows)


def train(
    student: Student,
    windows: torch.Tensor,
    schedule: Schedule,
    first: int,
    last: int,
    *,
    file: Path,
    task: Task,
) -> None:
    """Trains from step `first` to `last` (excluded); goes on from the save in `file`.

    Weight decay is AdamW's. What no mask keeps has no gradient, and is made zero again after
    each step.

    Raises:
        StageError: the loss is not finite any more.
    """
    adam = torch.optim.AdamW(student.model.parameters(), lr=schedule.learning_rate)
    done = _restored(student, adam, file, first)
    task.advance(done - first)
    saved = time.monotonic()
    for step in range(done, last):
        for group in adam.param_groups:
            group["lr"] = schedule.rate(step)
        loss = 0.0
        with drawn(schedule.seed, step):
            student.model.train()
            batch, rows = _batch(windows, step, schedule), max(1, TOKENS // windows.shape[1])
            for ids in (batch[at : at + rows] for at in range(0, len(batch), rows)):
                part = student.loss(ids) * (len(ids) / schedule.batch)
                part.backward()  # type: ignore[no-untyped-call]
                loss += float(part.detach())
        if not math.isfinite(loss):
            raise StageError(
                f"iterative_magnitude  step {step + 1}",
                f"the loss became {loss}, expected a finite number",
                f"lower `learning_rate` (it is {schedule.learning_rate:g})",
            )
        student.stop()
        torch.nn.utils.clip_grad_norm_(student.model.parameters(), 1.0)
        adam.step()
        adam.zero_grad()
        student.apply()
        task.note(f"loss {loss:.3f}")
        task.advance()
        if time.monotonic() - saved > _SAVE_SECONDS and step + 1 < last:
            _save(student, adam, file, step + 1)
            saved = time.monotonic()
    if done < last or not file.exists():
        _save(student, None, file, last)


def _restored(student: Student, adam: torch.optim.AdamW, file: Path, first: int) -> int:
    """Restores a save; gives the step that it is after, or `first`."""
    from safetensors import safe_open

    if not file.exists():
        return first
    with safe_open(file, framework="pt") as saved:
        found = {name: saved.get_tensor(name) for name in saved.keys()}  # noqa: SIM118
        step = int(saved.metadata()["step"])
    student.load(found)
    for name, parameter in student.model.named_parameters():
        if f"{name}|mean" in found:
            adam.state[parameter] = {
                "step": torch.tensor(float(step - first)),
                "exp_avg": found[f"{name}|mean"].to(parameter.device),
                "exp_avg_sq": found[f"{name}|square"].to(parameter.device),
            }
    return step


def _save(student: Student, adam: torch.optim.AdamW | None, file: Path, step: int) -> None:
    """Saves a training over its last save; AdamW's moments only while it goes on."""
    from safetensors.torch import save_file

    tensors = student.state()
    if adam is not None:
        for name, parameter in student.model.named_parameters():
            own = adam.state.get(parameter)
            if own:
                tensors[f"{name}|mean"] = own["exp_avg"].cpu().contiguous()
                tensors[f"{name}|square"] = own["exp_avg_sq"].cpu().contiguous()
    partial = file.with_suffix(".partial")
    save_file(tensors, partial, metadata={"step": str(step)})
    partial.replace(file)


def _batch(windows: torch.Tensor, step: int, schedule: Schedule) -> torch.Tensor:
    """Draws the windows of a step: each epoch visits all of them in an order of its own."""
    places = range(step * schedule.batch, (step + 1) * schedule.batch)
    count = len(windows)
    orders = {}
    for epoch in {place // count for place in places}:
        random = torch.Generator().manual_seed(_mixed(schedule.seed, "epoch", epoch))
        orders[epoch] = torch.randperm(count, generator=random)
    return torch.stack([windows[orders[place // count][place % count]] for place in places])


@contextmanager
def _no_bars() -> Iterator[None]:
    """Keeps transformers' bars off the terminal."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


@contextmanager
def drawn(*parts: int | str) -> Iterator[None]:
    """Seeds torch inside a `with`; the caller's generators are left as they were."""
    with torch.random.fork_rng():
        torch.manual_seed(_mixed(*parts))
        yield


def _mixed(*parts: int | str) -> int:
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:7])
