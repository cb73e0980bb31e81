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
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Final, Literal

import psutil
import torch

from prune_export.arch import Arch
from prune_export.calibrate.data.token_set import TokenSet
from prune_export.calibrate.passes.cost import BATCH_TOKENS, block_bytes, suspended_bytes
from prune_export.calibrate.passes.dense_reference import (
    DENSE_STATES,
    TARGETED,
    DenseReference,
    added_times,
)
from prune_export.calibrate.passes.norm_correction import PREFIX_TOKENS
from prune_export.calibrate.passes.sequential_block import Block, Editor
from prune_export.calibrate.passes.statistics import check, compute_dtype
from prune_export.calibrate.streaming.block_loader import loaded, threads
from prune_export.calibrate.streaming.checkpointing import Saves, pass_key
from prune_export.calibrate.streaming.layerwise_model import Call, LayerwiseModel
from prune_export.calibrate.streaming.linear_groups import Weights
from prune_export.calibrate.streaming.offload import Buffer
from prune_export.checkpoint import Checkpoint
from prune_export.machine import Machine
from prune_export.progress import Progress, Silent
from prune_export.system.temporary import Temporary

Order = Literal["sequential", "block"]

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
    tokens: TokenSet,
    machine: Machine,
    progress: Progress | None = None,
    scratch: Path | None = None,
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
    With `scratch`, a pass that is killed goes on from there, and ends in the same matrices bit for
    bit.

    Raises:
        PlanError: the windows are longer than the model's positions, or hold ids it doesn't know.
        ValueError: `dense`, of a model for which `added_times` is None.
    """
    arch = arch or checkpoint.arch()
    check(arch, tokens)
    temporary = Temporary() if scratch is None else None
    scratch = scratch or Path(temporary.path if temporary else "")
    with ExitStack() as stack:
        stack.enter_context(threads(machine.threads))
        stack.enter_context(torch.inference_mode())
        own = [editor.key, order, *(["loss"] if loss else []), *(["dense"] if dense else [])]
        folder = scratch / f"sweep-{pass_key(checkpoint, arch, tokens, machine, *own)}"
        made = SequentialPass(
            checkpoint, arch, editor, tokens, machine, order, Saves(folder), stack, dense
        )
        made.asks_loss = loss
        made.run(progress or Silent())
    logs, names, beside = [], {}, {}
    for layer in range(arch.layers):
        logs.append(json.loads((folder / f"{layer}.json").read_text(encoding="utf-8")))
        file = folder / f"{layer}.safetensors"
        names.update(dict.fromkeys(logs[-1].pop("tensors"), file))
        beside.update(dict.fromkeys(logs[-1].pop("beside", ()), file))
    heard = float((folder / _LOSS).read_text(encoding="ascii")) if loss else None
    swept = SequentialResult(folder, tuple(logs), names, heard, beside)
    if temporary:
        weakref.finalize(swept, temporary.close)
    return swept


class SequentialPass:
    """One sequential pass: its hidden states, where they are kept, and its saves."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        arch: Arch,
        editor: Editor,
        tokens: TokenSet,
        machine: Machine,
        order: Order,
        saves: Saves,
        stack: ExitStack,
        dense: bool,
    ) -> None:
        self.arch, self.editor, self.saves, self.order = arch, editor, saves, order
        self.ids = tokens.ids
        self.asks_loss = False
        self.prefix_calls: list[Call] = []
        dtype = compute_dtype(checkpoint, machine)
        self.layerwise = LayerwiseModel(checkpoint, arch, dtype=dtype, device=machine.device)
        self.weights = Weights(self.layerwise)
        samples, length = self.ids.shape
        self.batch = max(1, BATCH_TOKENS[machine.device] // length)
        free = machine.ram_bytes - psutil.Process().memory_info().rss
        free -= 3 * block_bytes(arch, torch.float32)
        states = self.ids.numel() * arch.sizes["residual"] * dtype.itemsize
        held_states = states * (1 + (DENSE_STATES if dense else 0))
        suspended = suspended_bytes(arch, self.ids.numel(), dtype, dense)
        if machine.device == "cuda":
            room = machine.gpu_bytes // 2 - 3 * block_bytes(arch, dtype)
            self.suspends = suspended + held_states <= room
            held = "cuda" if held_states <= room // 2 else "cpu"
        else:
            self.suspends = suspended + held_states <= free
            held = "cpu"
        shape = (length, arch.sizes["residual"])
        in_memory = held_states <= free // 2 or held == "cuda"

        def buffer(name: str) -> Buffer:
            path = None if in_memory else saves.folder / f"{name}.spool"
            device = held if in_memory else "cpu"
            return stack.enter_context(Buffer(samples, shape, dtype, path=path, device=device))

        self.states = buffer("states")
        self.spare = self.states if in_memory else buffer("spare")
        self.dense: DenseReference | None = None
        if dense:
            times = added_times(arch)
            if times is None:
                raise ValueError(f"{arch.family}: outputs are not simply added to the states")
            own = buffer("dense")
            spare = own if in_memory else buffer("dense-spare")
            goals = {kind: buffer(f"goal-{kind}") for kind in TARGETED}
            self.dense = DenseReference(self.layerwise, times, own, spare, goals)
        self.saves.layout = tuple(self._held())

    def run(self, progress: Progress) -> None:
        """Runs from the last save to the end."""
        total = self.ids.numel() * self.arch.layers
        with progress.task("Pruning block by block", total) as task:
            done = self.saves.done()
            task.advance(self.ids.numel() * done)
            if done == self.arch.layers:
                return
            if done:
                self.saves.restore(self._held())
                if self.spare is not self.states and done % 2:
                    self._swap()
            self.layerwise.look_up(self.ids.flatten())
            calls = self.layerwise.calls(self.ids)
            self.prefix_calls = self.layerwise.calls(self.ids[:, :PREFIX_TOKENS])
            if not done:
                for start, stop in self.batches():
                    entered = self.layerwise.enter(self.ids[start:stop])
                    for buffer in (self.states, *([self.dense.states] if self.dense else [])):
                        buffer.write(start, entered)
            self.layerwise.forget_rows()
            for layer in loaded(self.layerwise, range(done, self.arch.layers)):
                Block(self, layer, calls[layer], task).run()
                self._swap()
                last = layer + 1 == self.arch.layers
                if last and self.asks_loss:
                    (self.saves.folder / _LOSS).write_text(repr(self._loss()), encoding="ascii")
                if last or self.spare is not self.states or self.saves.due():
                    self.saves.save(layer + 1, {} if last else self._held(), {})

    def _loss(self) -> float:
        """Computes the mean next-token loss from the outputs of the last block."""
        self.layerwise.load_head()
        total = sum(
            self.layerwise.loss(self.states.read(start, stop), self.ids[start:stop])
            for start, stop in self.batches()
        )
        samples, length = self.ids.shape
        return total / (samples * (length - 1))

    def _held(self) -> dict[str, Buffer]:
        held = {"states": self.states} | ({"dense": self.dense.states} if self.dense else {})
        return {name: buffer for name, buffer in held.items() if buffer.path is None}

    def _swap(self) -> None:
        self.states, self.spare = self.spare, self.states
        if self.dense:
            self.dense.swap()

    def prefixes(self) -> Iterator[torch.Tensor]:
        """Yields the states of each window's first tokens, `[samples, PREFIX_TOKENS, residual]`."""
        device, rows = (
            self.layerwise.device,
            max(1, self.batch * self.ids.shape[1] // PREFIX_TOKENS),
        )
        held: list[torch.Tensor] = []
        for start, stop in self.batches():
            held.append(self.states.prefixes(start, stop, PREFIX_TOKENS).to(device))
            if stop == len(self.ids) or sum(map(len, held)) >= rows:
                yield torch.cat(held)
                held = []

    def batches(self) -> Iterator[tuple[int, int]]:
        """Yields the first and last window (exclusive) of each batch that a block is run on."""
        for start in range(0, len(self.ids), self.batch):
            yield start, min(start + self.batch, len(self.ids))
