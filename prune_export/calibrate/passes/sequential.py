"""Edits a model block by block on the calibration windows, as SparseGPT and Wanda do.

Each block gets the outputs of the edited blocks before it. Inside a block, linear layers are edited
in the order of the forward pass, so that each sees inputs from the edited ones before it. Every
window is computed once: its forward pass is suspended at a group of linear layers that share an
input, until the inputs of all windows have been seen and the group is edited; then all go on. What
is suspended is held in memory; where that would be too much, the block is computed again up to each
group instead.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Final

import torch

from prune_export.arch import Arch
from prune_export.calibrate.context import CalibrationContext
from prune_export.calibrate.passes.cost import suspended_bytes
from prune_export.calibrate.passes.dense_reference import (
    DENSE_STATES,
    TARGETED,
    DenseReference,
    added_times,
)
from prune_export.calibrate.passes.norm_correction import PREFIX_TOKENS
from prune_export.calibrate.passes.sequential_block import Block
from prune_export.calibrate.passes.sequential_state import Editor, Order, SequentialState
from prune_export.calibrate.streaming.block_loader import loaded
from prune_export.calibrate.streaming.checkpointing import Saves
from prune_export.calibrate.streaming.driver import PassDriver
from prune_export.calibrate.streaming.linear_groups import Weights
from prune_export.calibrate.streaming.offload import Buffer, Lane
from prune_export.checkpoint import Checkpoint
from prune_export.progress import Progress

_LOSS: Final = "loss.txt"


@dataclass(frozen=True, eq=False)
class SequentialResult:
    """The edited matrices of a whole model, in files, and each block's logs by linear group.

    `loss` is the edited model's mean next-token loss in nats over the windows, where it was asked
    for; `beside` are the files of what the editor kept that is no weight.
    """

    folder: Path
    logs: tuple[Mapping[str, Any], ...]
    names: Mapping[str, Path]
    loss: float | None = None
    beside: Mapping[str, Path] = field(default_factory=dict)

    def read(self, name: str) -> torch.Tensor:
        """Reads an edited tensor, in the dtype and layout of the checkpoint, or what is beside."""
        from safetensors import safe_open

        file = self.names[name] if name in self.names else self.beside[name]
        with safe_open(file, framework="pt") as opened:
            found: torch.Tensor = opened.get_tensor(name)
        return found

    def values(self) -> Iterator[tuple[str, Callable[[], torch.Tensor]]]:
        """Maps the name of every edited tensor to a function that reads it."""
        for name in self.names:
            yield name, partial(self.read, name)


def run_sequential(
    checkpoint: Checkpoint,
    editor: Editor,
    context: CalibrationContext,
    *,
    arch: Arch | None = None,
    order: Order = "sequential",
    loss: bool = False,
    dense: bool = False,
) -> SequentialResult:
    """Applies `editor` to every block in turn, each on the outputs of the edited blocks before it.

    `order` is `sequential` (inputs come from the edited earlier layers of the block too) or
    `block` (all layers of a block see the dense block; it is then computed a second time), as the
    reference codes of Wanda and SparseGPT have it. With `dense`, the dense model's hidden states
    are computed beside, and a `TargetAccumulator` gets the target outputs that follow from them.
    With `context.scratch`, a pass that is killed goes on from there, and ends in the same matrices
    bit for bit.

    Raises:
        PlanError: the windows are longer than the model's positions, or hold ids it doesn't know.
        ValueError: `dense`, of a model for which `added_times` is None.
    """
    driver = PassDriver.of(checkpoint, context, arch)
    own = [editor.key, order, *(["loss"] if loss else []), *(["dense"] if dense else [])]
    made_in = driver.folder("sweep", *own)
    folder = made_in.path
    with ExitStack() as stack:
        stack.enter_context(driver.computing())
        saves = Saves(folder)
        made = SequentialPass(driver, editor, order, saves, stack, loss=loss, dense=dense)
        made.run(context.told)
    logs, names, beside = [], {}, {}
    for layer in range(driver.arch.layers):
        logs.append(json.loads((folder / f"{layer}.json").read_text(encoding="utf-8")))
        file = folder / f"{layer}.safetensors"
        names.update(dict.fromkeys(logs[-1].pop("tensors"), file))
        beside.update(dict.fromkeys(logs[-1].pop("beside", ()), file))
    heard = float((folder / _LOSS).read_text(encoding="ascii")) if loss else None
    swept = SequentialResult(folder, tuple(logs), names, heard, beside)
    made_in.live_as_long_as(swept)
    return swept


class SequentialPass:
    """One sequential pass: where its hidden states are kept, and its saves."""

    def __init__(
        self,
        driver: PassDriver,
        editor: Editor,
        order: Order,
        saves: Saves,
        stack: ExitStack,
        *,
        loss: bool,
        dense: bool,
    ) -> None:
        arch, dtype, ids = driver.arch, driver.dtype, driver.ids
        self.saves, self.asks_loss = saves, loss
        layerwise = driver.layerwise()
        held_bytes = ids.numel() * arch.sizes["residual"] * dtype.itemsize
        held_bytes *= 1 + (DENSE_STATES if dense else 0)
        suspended = suspended_bytes(arch, ids.numel(), dtype, dense)
        on_gpu = driver.device == "cuda"
        free = driver.free_gpu_bytes() if on_gpu else driver.free_ram_bytes()
        held_on = driver.place_of(held_bytes)
        offloaded = held_on is None
        shape = (ids.shape[1], arch.sizes["residual"])

        def buffer(name: str) -> Buffer:
            path = saves.folder / f"{name}.spool" if offloaded else None
            made = Buffer(len(ids), shape, dtype, path=path, device=held_on or "cpu")
            return stack.enter_context(made)

        reference = None
        if dense:
            times = added_times(arch)
            if times is None:
                raise ValueError(f"{arch.family}: outputs are not simply added to the states")
            goals = {kind: buffer(f"goal-{kind}") for kind in TARGETED}
            lane = Lane(buffer, "dense", offloaded=offloaded)
            reference = DenseReference(layerwise, times, lane, goals)
        self.state = SequentialState(
            arch=arch,
            editor=editor,
            order=order,
            ids=ids,
            batch=driver.batch(),
            layerwise=layerwise,
            weights=Weights(layerwise),
            lane=Lane(buffer, "states", offloaded=offloaded),
            dense=reference,
            suspends=suspended + held_bytes <= free,
            folder=saves.folder,
        )
        self.saves.layout = tuple(self._held())

    def run(self, progress: Progress) -> None:
        """Runs from the last save to the end."""
        state, layerwise, ids = self.state, self.state.layerwise, self.state.ids
        layers = state.arch.layers
        with progress.task("Pruning block by block", ids.numel() * layers) as task:
            done = self.saves.done()
            task.advance(ids.numel() * done)
            if done == layers:
                return
            if done:
                self.saves.restore(self._held())
                if state.lane.offloaded and done % 2:
                    state.swap()
            layerwise.look_up(ids.flatten())
            calls, prefix_calls = layerwise.calls(ids), layerwise.calls(ids[:, :PREFIX_TOKENS])
            if not done:
                for start, stop in state.batches():
                    entered = layerwise.enter(ids[start:stop])
                    for lane in self._lanes():
                        lane.states.write(start, entered)
            layerwise.forget_rows()
            for layer in loaded(layerwise, range(done, layers)):
                Block(state, layer, calls[layer], prefix_calls[layer], task).run()
                state.swap()
                last = layer + 1 == layers
                if last and self.asks_loss:
                    (self.saves.folder / _LOSS).write_text(repr(self._loss()), encoding="ascii")
                if last or state.lane.offloaded or self.saves.due():
                    self.saves.save(layer + 1, {} if last else self._held(), {})

    def _loss(self) -> float:
        """Computes the mean next-token loss from the outputs of the last block."""
        state = self.state
        state.layerwise.load_head()
        total = sum(
            state.layerwise.loss(state.lane.states.read(start, stop), state.ids[start:stop])
            for start, stop in state.batches()
        )
        samples, length = state.ids.shape
        return total / (samples * (length - 1))

    def _lanes(self) -> list[Lane]:
        return [self.state.lane, *([self.state.dense.lane] if self.state.dense else [])]

    def _held(self) -> dict[str, Buffer]:
        return {lane.name: lane.states for lane in self._lanes() if not lane.offloaded}
