"""Refits a projection before each place where layers were removed, in one calibration pass.

The dense model's states and those of the cut one pass through the blocks. Where a block stands
before a seam, the dense states go on to the goal first; then one projection of the block is changed
so that what leaves the block is what they are there. Later seams see what earlier changes give.
Some windows are held out: no change is fitted to them, and behind the last block the next-token
loss on them says whether the cut model is better with the changes than without.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

import torch
from torch import nn

from prune_export.arch import Arch
from prune_export.calibrate.context import CalibrationContext
from prune_export.calibrate.passes.dense_reference import (
    ResidualTracker,
    added_times,
    inverse_mean_square,
)
from prune_export.calibrate.passes.seam_fit import Mended, Moments, mended
from prune_export.calibrate.passes.seams import Seam, steps
from prune_export.calibrate.streaming.block_loader import loaded
from prune_export.calibrate.streaming.checkpointing import Saves
from prune_export.calibrate.streaming.driver import PassDriver, batches
from prune_export.calibrate.streaming.layerwise_model import Call
from prune_export.calibrate.streaming.linear_groups import Weights, inputs_of
from prune_export.calibrate.streaming.offload import Buffer, Lane
from prune_export.checkpoint import Checkpoint
from prune_export.checkpoint.header import TORCH
from prune_export.progress import Progress, Task

SEAM_STATES: Final = 3
"""Arrays of states that are held at most: the dense model's, the cut one's, and a goal inside of a
block. What is held out of them goes through the cut model a second time, without the changes."""

_HELD_OUT: Final = 8
"""Every eighth window is held out; of fewer, the last one."""

_LOSS: Final = "loss.json"


@dataclass(frozen=True)
class CutModel:
    """A pruned model: the blocks that are removed, and tensors that have other values.

    `values` are by stored name; `key` says what they are, for a killed pass to know them again.
    """

    dropped: frozenset[int]
    values: Mapping[str, Callable[[], torch.Tensor]]
    key: str = ""


@dataclass(frozen=True, eq=False)
class Repaired:
    """The result: refitted tensors in files, a log of each seam, and held-out losses in nats.

    `loss` are those of the cut model before and after, None where no window is held out.
    """

    folder: Path
    logs: tuple[Mapping[str, Any], ...]
    names: Mapping[str, Path]
    loss: tuple[float, float] | None
    tokens: int
    held_out_tokens: int

    def read(self, name: str) -> torch.Tensor:
        """A refitted tensor, as it is to be stored."""
        from safetensors import safe_open

        with safe_open(self.names[name], framework="pt") as file:
            found: torch.Tensor = file.get_tensor(name)
        return found


def repair(
    checkpoint: Checkpoint,
    seams: Collection[Seam],
    cut: CutModel,
    context: CalibrationContext,
    *,
    arch: Arch | None = None,
) -> Repaired:
    """Refits the projection before each of `seams`, from the first to the last.

    With `context.scratch`, a pass that is killed goes on from there, and ends in the same bytes.

    Raises:
        PlanError: the windows are longer than the model's positions, or hold ids it doesn't know.
        ValueError: of a model for which `added_times` is None, or no seam has a projection before.
    """
    driver = PassDriver.of(checkpoint, context, arch)
    own = ["seams-1", repr(tuple(seams)), sorted(cut.dropped), sorted(cut.values), cut.key]
    made_in = driver.folder("seams", *own)
    folder, length = made_in.path, context.tokens.length
    with ExitStack() as stack:
        stack.enter_context(driver.computing())
        made = _Pass(driver, tuple(seams), cut, Saves(folder), stack)
        made.run(context.told)
    logs, names = [], {}
    for number, step in enumerate(made.steps):
        if step.mends:
            log = json.loads((folder / f"{number}.json").read_text(encoding="utf-8"))
            names.update(dict.fromkeys(log.pop("tensors"), folder / f"{number}.safetensors"))
            logs.append(log)
    heard = None
    if made.held:
        before, after = json.loads((folder / _LOSS).read_text(encoding="utf-8"))
        heard = before, after
    counts = made.fitted * length, made.held * length
    repaired = Repaired(folder, tuple(logs), names, heard, *counts)
    made_in.live_as_long_as(repaired)
    return repaired


def held_out(samples: int) -> list[int]:
    """Chooses the windows on which nothing is fitted."""
    found = list(range(_HELD_OUT - 1, samples, _HELD_OUT))
    return found or ([samples - 1] if samples > 1 else [])


class _Pass:
    """One pass: hidden states of the dense model, of the cut one, and of that with refits."""

    def __init__(
        self,
        driver: PassDriver,
        seams: tuple[Seam, ...],
        cut: CutModel,
        saves: Saves,
        stack: ExitStack,
    ) -> None:
        arch, tokens = driver.arch, driver.context.tokens
        times = added_times(arch)
        if times is None:
            raise ValueError(f"{arch.family}: outputs are not simply added to the states")
        if all(seam.group is None for seam in seams):
            raise ValueError("no seam has a projection before it that could be refitted")
        self.arch, self.cut, self.saves, self.times = arch, cut, saves, times
        out = held_out(tokens.samples)
        fitted = [row for row in range(tokens.samples) if row not in set(out)]
        self.fitted, self.held = len(fitted), len(out)
        self.ids = tokens.ids[fitted + out]
        changed = {arch.by_name[name].layer or 0 for name in cut.values}
        groups = [seam.group for seam in seams if seam.group is not None]
        first = min({*cut.dropped, *changed, *(group.layer for group in groups)})
        self.steps = steps(arch.layers, cut.dropped, seams, first)
        self.last_fit = max(n for n, step in enumerate(self.steps) if step.mends)
        if not self.held:
            self.steps = self.steps[: self.last_fit + 1]
        self.layerwise = driver.layerwise()
        self.weights = Weights(self.layerwise)
        length, residual = tokens.length, arch.sizes["residual"]
        self.batch = driver.batch()
        self.inside = {seam.goal.layer for seam in seams if seam.goal.part == "attention"}
        arrays = 2 * tokens.samples + self.held + (tokens.samples if self.inside else 0)
        held_on = driver.place_of(arrays * length * residual * driver.dtype.itemsize)
        self.offloaded = held_on is None
        shape, dtype = (length, residual), driver.dtype

        def buffer(rows: int, name: str) -> Buffer:
            path = saves.folder / f"{name}.spool" if self.offloaded else None
            made = Buffer(max(rows, 1), shape, dtype, path=path, device=held_on or "cpu")
            return stack.enter_context(made)

        everywhere = partial(buffer, tokens.samples)
        self.dense = Lane(everywhere, "dense", offloaded=self.offloaded)
        self.edited = Lane(everywhere, "edited", offloaded=self.offloaded)
        self.plain = Lane(partial(buffer, self.held), "plain", offloaded=self.offloaded)
        self.goal = everywhere("goal") if self.inside else None
        self.saves.layout = tuple(sorted(self._in_memory()))

    def run(self, progress: Progress) -> None:
        """Runs from the last save to the end."""
        with progress.task("Refitting at the seams", len(self.steps)) as task:
            done = self.saves.done()
            task.advance(done)
            if done == len(self.steps):
                return
            if done:
                self._resume(done)
            self.layerwise.look_up(self.ids.flatten())
            calls = self.layerwise.calls(self.ids)
            if not done:
                for start, stop in self._batches(0, len(self.ids)):
                    self.dense.states.write(start, self.layerwise.enter(self.ids[start:stop]))
            self.layerwise.forget_rows()
            layers = [step.layer for step in self.steps]
            for number, _ in enumerate(loaded(self.layerwise, layers[done:]), done):
                self._take(number, calls[layers[number]], task)
                ended = number + 1 == len(self.steps)
                if ended and self.held:
                    self._hear()
                if ended or self.offloaded or self.saves.due():
                    self.saves.save(number + 1, {} if ended else self._in_memory(), {})

    def _take(self, number: int, call: Call, task: Task) -> None:
        """Takes one step."""
        step = self.steps[number]
        if step.forks:
            self._fork()
        if step.dense:
            self._advance_dense(step.layer, call)
        if step.edited:
            self._put_values(step.layer)
            if self.held:
                self._advance(self.plain, step.layer, call, 0, self.held)
            if step.mends:
                self._mend(number, step.mends, call)
            start = 0 if number < self.last_fit else self.fitted
            self._advance(self.edited, step.layer, call, start, len(self.ids))
        task.advance()

    def _fork(self) -> None:
        """Gives the pruned model hidden states of its own from here on."""
        for start, stop in self._batches(0, len(self.ids)):
            states = self.dense.states.read(start, stop)
            self.edited.states.write(start, states)
            if start >= self.fitted:
                self.plain.states.write(start - self.fitted, states)

    def _advance_dense(self, layer: int, call: Call) -> None:
        """Runs a block on the dense model's states; keeps those that are a seam's target."""
        with ExitStack() as hooks:
            entered = None
            if layer in self.inside:
                entered = ResidualTracker(self.layerwise, layer, self.times, hooks)
            for start, stop in self._batches(0, len(self.ids)):
                inputs = self.dense.states.read(start, stop).to(self.layerwise.device)
                if entered is not None:
                    entered.begin(start, inputs)
                outputs = self.layerwise.run(layer, inputs, call)
                if entered is not None and self.goal is not None:
                    self.goal.write(start, entered.states(start))
                    entered.forget(start)
                self.dense.spare.write(start, outputs)
        self.dense.swap()

    def _advance(self, lane: Lane, layer: int, call: Call, start: int, stop: int) -> None:
        for first, last in self._batches(start, stop):
            inputs = lane.states.read(first, last).to(self.layerwise.device)
            lane.spare.write(first, self.layerwise.run(layer, inputs, call))
        lane.swap()

    def _put_values(self, layer: int) -> None:
        """Writes the pruned model's values into a loaded block."""
        block = self.arch.block(layer)
        if not any(tensor.name in self.cut.values for tensor in block):
            return
        read = self.layerwise.checkpoint.read_finite
        stored = {
            tensor.name: self.cut.values.get(tensor.name, partial(read, tensor.name))()
            for tensor in block
        }
        self.layerwise.load(layer, self.layerwise.converted(stored))

    def _mend(self, number: int, seam: Seam, call: Call) -> None:
        """Refits the projection before a seam, whose block is loaded, and stores it."""
        from safetensors.torch import save_file

        assert seam.group is not None
        (tensor,) = seam.group.tensors
        module = self.layerwise.module(tensor)
        bias = getattr(module, "bias", None)
        moments = self._moments(seam, module, call)
        weight = self.weights.read(tensor)
        old_bias = None if bias is None else bias.detach().clone()
        found = mended(weight, moments)
        stored = dict[str, torch.Tensor]()
        if found.change is not None:
            stored[tensor.name] = self.weights.write(tensor, weight + found.change)
            if bias is not None and found.bias is not None:
                name = f"{tensor.name.removesuffix('weight')}bias"
                own = getattr(torch, TORCH[self.layerwise.checkpoint.entries[name].dtype])
                stored[name] = (bias.float() + found.bias).to(own).cpu()
                bias.data.copy_(stored[name])
        if not all(bool(value.isfinite().all()) for value in stored.values()):
            # Too large for the dtype: as it was.
            self.weights.write(tensor, weight)
            if bias is not None:
                bias.data.copy_(old_bias)
            stored, found = {}, Mended(None, None, None, found.before, found.before)
        folder = self.saves.folder
        save_file({k: v.contiguous() for k, v in stored.items()}, folder / f"{number}.safetensors")
        log = {
            "projection": tensor.name,
            "block": tensor.layer,
            "removed": [_named(unit.layer, unit.part) for unit in seam.removed],
            "ridge": found.ridge,
            "state_error": [found.before, found.after],
            "tensors": list(stored),
        }
        (folder / f"{number}.json").write_text(json.dumps(log), encoding="utf-8")

    def _moments(self, seam: Seam, module: nn.Module, call: Call) -> Moments:
        """Accumulates the inputs of a projection and what its block's outputs lack."""
        assert seam.group is not None
        width = inputs_of(self.arch, seam.group.tensors[0])
        caught: list[torch.Tensor] = []
        moments = Moments(
            width,
            self.arch.sizes["residual"],
            self.layerwise.device,
            bias=getattr(module, "bias", None) is not None,
            held_tokens=self.held * self.ids.shape[1],
        )
        goals = self.goal if seam.goal.part == "attention" else self.dense.states
        assert goals is not None
        with ExitStack() as hooks:
            hear = module.register_forward_pre_hook(lambda _module, args: caught.append(args[0]))
            hooks.callback(hear.remove)
            for start, stop in self._batches(0, len(self.ids)):
                inputs = self.edited.states.read(start, stop).to(self.layerwise.device)
                outputs = self.layerwise.run(seam.group.layer, inputs, call).float()
                goal = goals.read(start, stop).to(self.layerwise.device).float()
                weights = inverse_mean_square(goal).flatten()
                lacks = ((goal - outputs) / self.times).flatten(0, 1)
                states = caught.pop().reshape(-1, width)
                see = moments.see if start < self.fitted else moments.hold
                see(states, lacks, weights)
        return moments

    def _hear(self) -> None:
        """Computes the pruned model's next-token loss on the held-out windows, before and after."""
        self.layerwise.load_head()
        ids = self.ids[self.fitted :]
        losses = []
        for lane, offset in ((self.plain, 0), (self.edited, self.fitted)):
            total = sum(
                self.layerwise.loss(
                    lane.states.read(offset + start, offset + stop), ids[start:stop]
                )
                for start, stop in self._batches(0, self.held)
            )
            losses.append(total / (self.held * (ids.shape[1] - 1)))
        (self.saves.folder / _LOSS).write_text(json.dumps(losses), encoding="utf-8")

    def _resume(self, done: int) -> None:
        self.saves.restore(self._in_memory())
        if self.offloaded:
            if sum(step.dense for step in self.steps[:done]) % 2:
                self.dense.swap()
            if sum(step.edited for step in self.steps[:done]) % 2:
                self.edited.swap()
                self.plain.swap()

    def _in_memory(self) -> dict[str, Buffer]:
        if self.offloaded:
            return {}
        lanes = {lane.name: lane.states for lane in (self.dense, self.edited, self.plain)}
        return lanes | ({"goal": self.goal} if self.goal is not None else {})

    def _batches(self, start: int, stop: int) -> Iterator[tuple[int, int]]:
        """Windows at once from `start` on; none of them both fitted and held out."""
        middle = max(start, min(self.fitted, stop))
        yield from batches(middle, self.batch, start)
        yield from batches(stop, self.batch, middle)


def _named(layer: int, part: str) -> int | list[Any]:
    """As a method's log says it: a block's number, or that and the part."""
    return layer if part == "block" else [layer, part]
