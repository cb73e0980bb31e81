"""Gathers activation statistics in one pass of the calibration windows, with one block in memory.

Every statistic of a method is gathered in one pass. The states of all windows wait between two
blocks, in memory or, where they exceed the budget, in a file. The pass computes in float32 on a
CPU, in which it is fastest and exact, as only one block is ever held; on a GPU in the checkpoint's
own dtype, but float16 as float32: some models' states exceed what float16 can say.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from math import prod
from typing import Any

import torch

from prune_export.arch import Arch
from prune_export.calibrate.context import CalibrationContext
from prune_export.calibrate.statistics.api import (
    Collector,
    Listener,
    Reader,
    Scope,
    Statistic,
    Stepper,
)
from prune_export.calibrate.streaming.block_loader import loaded
from prune_export.calibrate.streaming.checkpointing import Saves
from prune_export.calibrate.streaming.driver import PassDriver, batches
from prune_export.calibrate.streaming.layerwise_model import Call, LayerwiseModel
from prune_export.calibrate.streaming.offload import Buffer
from prune_export.calibrate.streaming.skip import Steps, Unit, after, skipped
from prune_export.checkpoint import Checkpoint
from prune_export.progress import Progress, Task


def gather(
    checkpoint: Checkpoint,
    statistics: Sequence[Statistic],
    context: CalibrationContext,
    *,
    arch: Arch | None = None,
) -> dict[Statistic, Any]:
    """Gathers `statistics` over the windows in one forward pass; gives the result of each.

    With `context.scratch`, a pass that is killed goes on from there, and ends in the same result
    bit for bit. Without, large states are kept in a temporary directory.

    Raises:
        PlanError: the windows are longer than the model's positions, or hold ids it doesn't know.
    """
    wanted = tuple(dict.fromkeys(statistics))
    driver = PassDriver.of(checkpoint, context, arch)
    if not wanted:
        return {}
    with ExitStack() as stack:
        folder = driver.folder("pass", *map(repr, wanted))
        stack.callback(folder.close)
        stack.enter_context(driver.computing())
        a_pass = _Pass(driver, wanted, Saves(folder.path), stack)
        a_pass.run(context.told)
        return {
            statistic: collector.result()
            for stream in a_pass.streams
            for statistic, collector in stream.collectors.items()
        }


@dataclass
class _Stream:
    """The hidden states between two blocks: of the whole model, and of variants without one unit.

    `lanes` are the variants: None is the whole model, a unit the model without that.
    """

    ids: torch.Tensor
    collectors: Mapping[Statistic, Collector]
    lanes: tuple[Unit | None, ...]
    states: Buffer
    spare: Buffer | None
    batch: int
    calls: list[Call] = field(default_factory=list)

    def enter(self, layerwise: LayerwiseModel) -> None:
        """Fills the states with the input of the first block."""
        for start, stop in self._batches():
            self.states.write(start, layerwise.enter(self.ids[start:stop]))

    def advance(self, layerwise: LayerwiseModel, layer: int, task: Task) -> None:
        """Replaces the states by a block's outputs."""
        target = self.spare or self.states
        count = len(self.ids)
        call = self.calls[layer]
        # Where a lane parts from the whole model, whose states are still those that enter.
        for lane, without in enumerate(self.lanes):
            if without is None or without.layer != layer:
                continue
            for start, stop in self._batches():
                states = self.states.read(start, stop)
                if without.part != "block":
                    with skipped(layerwise, layer, (without.part,)):
                        states = layerwise.run(layer, states.to(layerwise.device), call)
                    task.advance(states.shape[0] * states.shape[1])
                target.write(lane * count + start, states)
        for lane, without in enumerate(self.lanes):
            if without is not None and without.layer >= layer:
                continue
            for start, stop in self._batches():
                inputs = self.states.read(lane * count + start, lane * count + stop)
                inputs = inputs.to(layerwise.device)
                if without is None:
                    outputs = self._seen(layerwise, layer, start, inputs)
                else:
                    outputs = layerwise.run(layer, inputs, call)
                target.write(lane * count + start, outputs)
                task.advance(inputs.shape[0] * inputs.shape[1])
        if self.spare is not None:
            self.states, self.spare = self.spare, self.states

    def _seen(
        self, layerwise: LayerwiseModel, layer: int, start: int, inputs: torch.Tensor
    ) -> torch.Tensor:
        """Runs a block of the whole model, and gives its inputs and outputs to the collectors."""
        call = self.calls[layer]
        steppers = [one for one in self.collectors.values() if isinstance(one, Stepper)]
        steps = Steps(layerwise, layer, call) if steppers else None
        with ExitStack() as hooks:
            self._listen(layerwise, layer, hooks)
            outputs = steps.run(inputs) if steps else layerwise.run(layer, inputs, call)
        for collector in self.collectors.values():
            collector.see(layer, start, inputs, outputs)
        for stepper in steppers:
            if steps:
                stepper.step(layer, *steps.of(stepper.part, inputs, outputs))
        return outputs

    def _listen(self, layerwise: LayerwiseModel, layer: int, hooks: ExitStack) -> None:
        """Hooks the modules whose inputs a collector asked for."""
        for collector in self.collectors.values():
            if not isinstance(collector, Listener):
                continue
            for tensor in layerwise.arch.block(layer):
                if tensor.role in collector.roles:
                    hear = partial(_arrived, collector, layer, tensor.role)
                    handle = layerwise.module(tensor).register_forward_pre_hook(hear)
                    hooks.callback(handle.remove)

    def finish(self, layerwise: LayerwiseModel) -> None:
        """Gives the collectors the losses of all lanes."""
        count = len(self.ids)
        losses: dict[Unit | None, float] = {}
        for lane, without in enumerate(self.lanes):
            total = sum(
                layerwise.loss(
                    self.states.read(lane * count + start, lane * count + stop),
                    self.ids[start:stop],
                )
                for start, stop in self._batches()
            )
            losses[without] = total / (count * (self.ids.shape[1] - 1))
        own = {unit: loss for unit, loss in losses.items() if unit is not None}
        for statistic, collector in self.collectors.items():
            if statistic.skipped:
                collector.hear(losses[None], own)

    @property
    def readers(self) -> list[Reader]:
        """The collectors that read predictions."""
        return [one for one in self.collectors.values() if isinstance(one, Reader)]

    def tell(self, layerwise: LayerwiseModel) -> None:
        """Lets the readers read what the whole model predicts."""
        for start, stop in self._batches():
            for number, at, logits in layerwise.predictions(self.states.read(start, stop)):
                for reader in self.readers:
                    reader.read(start + number, at, logits)

    def forget(self) -> None:
        """Removes the files of the states, if there are any."""
        for buffer in (self.states, self.spare):
            if buffer is not None and buffer.path is not None:
                buffer.path.unlink()

    def work(self, layers: int) -> int:
        """The number of tokens times blocks to compute, for progress."""
        blocks = sum(layers if lane is None else after(lane, layers) for lane in self.lanes)
        return blocks * self.ids.numel()

    def _batches(self) -> Iterator[tuple[int, int]]:
        return batches(len(self.ids), self.batch)


def _arrived(
    collector: Listener, layer: int, role: str, module: torch.nn.Module, args: tuple[Any, ...]
) -> None:
    del module
    collector.arrive(layer, role, args[0])


class _Pass:
    """One pass: its streams of hidden states, their buffers, and its saves."""

    def __init__(
        self,
        driver: PassDriver,
        statistics: Sequence[Statistic],
        saves: Saves,
        stack: ExitStack,
    ) -> None:
        self.driver, self.arch, self.saves = driver, driver.arch, saves
        self.layerwise = driver.layerwise()
        self._stack = stack
        self._states: dict[str, Buffer] = {}
        self._kept: dict[str, Buffer] = {}
        self._ram, self._gpu = driver.free_ram_bytes(), driver.free_gpu_bytes()
        tokens = driver.context.tokens
        groups: dict[tuple[int, int], list[Statistic]] = {}
        for statistic in statistics:
            samples = min(statistic.samples or tokens.samples, tokens.samples)
            length = min(statistic.length or tokens.length, tokens.length)
            groups.setdefault((samples, length), []).append(statistic)
        self.streams = [
            self._stream(number, tokens.ids[:samples, :length], group)
            for number, ((samples, length), group) in enumerate(groups.items())
        ]
        self.saves.layout = tuple(sorted(self._states | self._kept))

    def _stream(self, number: int, ids: torch.Tensor, statistics: Sequence[Statistic]) -> _Stream:
        samples, length = ids.shape
        residual = self.arch.sizes["residual"]

        def scope(statistic: Statistic) -> Scope:
            owner = f"{number}-{type(statistic).__name__}"
            make = partial(self._buffer, owner)
            return Scope(self.arch.layers, residual, samples, length, make)

        collectors = {statistic: statistic.collector(scope(statistic)) for statistic in statistics}
        lanes = (None, *sorted({unit for one in statistics for unit in one.skipped}))
        shape, rows = (length, residual), len(lanes) * samples
        dtype = self.driver.dtype
        states = self._buffer(str(number), "states", rows, shape, dtype, states=True)
        spare = None
        if states.path is not None:
            path = self.saves.folder / f"{number}-spare.spool"
            spare = self._stack.enter_context(Buffer(rows, shape, dtype, path=path))
        return _Stream(ids, collectors, lanes, states, spare, self.driver.batch(length))

    def _buffer(
        self,
        owner: str,
        name: str,
        rows: int,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        *,
        states: bool = False,
    ) -> Buffer:
        name = f"{owner}-{name}"
        size = rows * prod(shape) * dtype.itemsize
        if states and size <= self._gpu:
            self._gpu -= size
            made = Buffer(rows, shape, dtype, device=self.driver.device)
        elif size <= self._ram:
            self._ram -= size
            made = Buffer(rows, shape, dtype)
        else:
            made = Buffer(rows, shape, dtype, path=self.saves.folder / f"{name}.spool")
        if made.path is None:
            (self._states if states else self._kept)[name] = made
        return self._stack.enter_context(made)

    def run(self, progress: Progress) -> None:
        """Runs from the last save to the end."""
        total = sum(stream.work(self.arch.layers) for stream in self.streams)
        with progress.task("Calibrating", total) as task:
            done = self._resume(task)
            if done == self.arch.layers:
                return
            self.layerwise.look_up(torch.cat([stream.ids.flatten() for stream in self.streams]))
            for stream in self.streams:
                stream.calls = self.layerwise.calls(stream.ids)
                if not done:
                    stream.enter(self.layerwise)
            self.layerwise.forget_rows()
            for layer in loaded(self.layerwise, range(done, self.arch.layers)):
                for stream in self.streams:
                    stream.advance(self.layerwise, layer, task)
                # A state in a file is overwritten by the block after next: it is marked each time.
                offloaded = any(stream.spare is not None for stream in self.streams)
                if layer + 1 < self.arch.layers and (offloaded or self.saves.due()):
                    self.saves.save(layer + 1, self._states | self._kept, self._collected())
            hearing = [stream for stream in self.streams if len(stream.lanes) > 1]
            reading = [stream for stream in self.streams if stream.readers]
            if hearing or reading:
                self.layerwise.load_head()
            for stream in hearing:
                stream.finish(self.layerwise)
            for stream in reading:
                stream.tell(self.layerwise)
        if not reading and (self.saves.any or self.saves.due()):
            # What follows may be killed as well; by then the states themselves are of no use.
            self.saves.save(self.arch.layers, self._kept, self._collected())
            for stream in self.streams:
                stream.forget()

    def _resume(self, task: Task) -> int:
        done = self.saves.done()
        if not done:
            return 0
        ended = done == self.arch.layers
        state = self.saves.restore(self._kept if ended else self._states | self._kept)
        for i, collector in enumerate(self._all_collectors()):
            prefix = f"{i}."
            own = {key.removeprefix(prefix): state[key] for key in state if key.startswith(prefix)}
            collector.restore(own)
        for stream in self.streams:
            if stream.spare is not None and done % 2:
                stream.states, stream.spare = stream.spare, stream.states
        before = sum(stream.work(self.arch.layers) for stream in self.streams)
        task.advance(before * done / self.arch.layers)
        return done

    def _collected(self) -> dict[str, torch.Tensor]:
        return {
            f"{i}.{key}": value
            for i, collector in enumerate(self._all_collectors())
            for key, value in collector.state().items()
        }

    def _all_collectors(self) -> list[Collector]:
        return [one for stream in self.streams for one in stream.collectors.values()]
