"""Carries windows through a model while its blocks are edited on the way, one block in memory.

Later blocks see what the edited earlier ones give. Inside a block, the order is the true one: the
matrices that take the block's input are edited first, what they then give reaches the next, and so
on. Every window is computed once for that: its computation is parked where a site's inputs arrive,
all windows' inputs are seen there, the site's matrices are edited, and all go on. What is parked is
held in memory; where that would be too much, the block is computed again up to each site instead.
"""

from __future__ import annotations

import json
import shutil
import tempfile
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Final, Literal, Protocol

import psutil
import torch
from torch import nn

from prune_export.arch import Arch
from prune_export.calibrate.blocks import loaded, threads
from prune_export.calibrate.cost import BATCH_TOKENS, block_bytes, parked_bytes
from prune_export.calibrate.dense_stream import (
    AIMED,
    DENSE_STATES,
    Aimed,
    DenseStream,
    Entered,
    added_times,
    has_target,
)
from prune_export.calibrate.resume import Saves, pass_key
from prune_export.calibrate.sites import Accumulator, Site, Weights, inputs_of, sites_of
from prune_export.calibrate.skeleton import Call, Skeleton
from prune_export.calibrate.spool import Buffer
from prune_export.calibrate.stream import check, compute_dtype
from prune_export.calibrate.tokens import TokenSet
from prune_export.checkpoint import Checkpoint
from prune_export.machine import Machine
from prune_export.progress import Progress, Silent, Task

Order = Literal["sequential", "block"]

_LOSS: Final = "loss.txt"


@dataclass(frozen=True)
class Edited:
    """What an editor made of a site: new matrices `[out, in]` by stored name, and JSON about it."""

    weights: Mapping[str, torch.Tensor] = field(default_factory=dict)
    log: Mapping[str, Any] = field(default_factory=dict)


class Editor(Protocol):
    """Edits the matrices of one site after another; it keeps nothing from one block to the next."""

    @property
    def key(self) -> str:
        """Everything that decides what it does: a killed sweep goes on only with an equal one."""

    def watch(self, site: Site, width: int, device: str) -> Accumulator | None:
        """What gathers the inputs `[…, width]` of a site; None where the site stays as it is."""

    def edit(self, site: Site, weights: Mapping[str, torch.Tensor], seen: Any) -> Edited:
        """New matrices for float32 copies `[out, in]` by stored name; `seen` is `watch`'s own."""


@dataclass(frozen=True, eq=False)
class Swept:
    """The edited matrices of a whole model, in files, and each block's logs by site.

    `loss` is the edited model's mean next-token loss in nats over the windows, where it was asked
    for.
    """

    folder: Path
    logs: tuple[Mapping[str, Any], ...]
    names: Mapping[str, Path]
    loss: float | None = None

    def read(self, name: str) -> torch.Tensor:
        """An edited tensor, as it is to be stored."""
        from safetensors import safe_open

        with safe_open(self.names[name], framework="pt") as file:
            found: torch.Tensor = file.get_tensor(name)
        return found

    def values(self) -> Iterator[tuple[str, Callable[[], torch.Tensor]]]:
        """Every edited tensor's name, and a function that reads it."""
        for name in self.names:
            yield name, partial(self.read, name)


def sweep(
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
) -> Swept:
    """The matrices that `editor` makes while `tokens` pass through the blocks that it has edited.

    `order` is `sequential` (each site's inputs come from edited earlier sites of the block too) or
    `block` (all sites of a block see the dense block; it is then computed a second time), as the
    reference codes of Wanda and SparseGPT have it. With `dense`, the dense model's states go along,
    and what gathers (`Aimed`) is told what a matrix has to give to be true to them. With `scratch`,
    a sweep that is killed goes on from there, and ends in the same matrices bit for bit.

    Raises:
        PlanError: the windows are longer than the model's positions, or hold ids it doesn't know.
        ValueError: `dense`, of a model for which `added_times` is None.
    """
    arch = arch or checkpoint.arch()
    check(arch, tokens)
    temporary = scratch is None
    scratch = scratch or Path(tempfile.mkdtemp(prefix="sweep-"))
    with ExitStack() as stack:
        stack.enter_context(threads(machine.threads))
        stack.enter_context(torch.inference_mode())
        own = [editor.key, order, *(["loss"] if loss else []), *(["dense"] if dense else [])]
        folder = scratch / f"sweep-{pass_key(checkpoint, arch, tokens, machine, *own)}"
        made = _Sweep(checkpoint, arch, editor, tokens, machine, order, Saves(folder), stack, dense)
        made.asks_loss = loss
        made.run(progress or Silent())
    logs, names = [], {}
    for layer in range(arch.layers):
        logs.append(json.loads((folder / f"{layer}.json").read_text(encoding="utf-8")))
        file = folder / f"{layer}.safetensors"
        names.update(dict.fromkeys(logs[-1].pop("tensors"), file))
    heard = float((folder / _LOSS).read_text(encoding="ascii")) if loss else None
    swept = Swept(folder, tuple(logs), names, heard)
    if temporary:
        weakref.finalize(swept, shutil.rmtree, scratch, ignore_errors=True)
    return swept


class _Arrived(Exception):
    """The inputs of a site that is not yet edited have arrived, and are not to be parked."""


class _Sweep:
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
        dtype = compute_dtype(checkpoint, machine)
        self.skeleton = Skeleton(checkpoint, arch, dtype=dtype, device=machine.device)
        self.weights = Weights(self.skeleton)
        samples, length = self.ids.shape
        self.batch = max(1, BATCH_TOKENS[machine.device] // length)
        free = machine.ram_bytes - psutil.Process().memory_info().rss
        free -= 3 * block_bytes(arch, torch.float32)
        states = self.ids.numel() * arch.sizes["residual"] * dtype.itemsize
        held_states = states * (1 + (DENSE_STATES if dense else 0))
        parked = parked_bytes(arch, self.ids.numel(), dtype)
        if machine.device == "cuda":
            room = machine.gpu_bytes // 2 - 3 * block_bytes(arch, dtype)
            self.parks = parked + held_states <= room
            held = "cuda" if held_states <= room // 2 else "cpu"
        else:
            self.parks = parked + held_states <= free
            held = "cpu"
        shape = (length, arch.sizes["residual"])
        in_memory = held_states <= free // 2 or held == "cuda"

        def buffer(name: str) -> Buffer:
            path = None if in_memory else saves.folder / f"{name}.spool"
            device = held if in_memory else "cpu"
            return stack.enter_context(Buffer(samples, shape, dtype, path=path, device=device))

        self.states = buffer("states")
        self.spare = self.states if in_memory else buffer("spare")
        self.dense: DenseStream | None = None
        if dense:
            times = added_times(arch)
            if times is None:
                raise ValueError(f"{arch.family}: outputs are not simply added to the states")
            own = buffer("dense")
            spare = own if in_memory else buffer("dense-spare")
            goals = {kind: buffer(f"goal-{kind}") for kind in AIMED}
            self.dense = DenseStream(self.skeleton, times, own, spare, goals)
        self.saves.layout = tuple(self._held())

    def run(self, progress: Progress) -> None:
        """Goes from where the last save left off to the end."""
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
            self.skeleton.look_up(self.ids.flatten())
            calls = self.skeleton.calls(self.ids)
            if not done:
                for start, stop in self._batches():
                    entered = self.skeleton.enter(self.ids[start:stop])
                    for buffer in (self.states, *([self.dense.states] if self.dense else [])):
                        buffer.write(start, entered)
            self.skeleton.forget_rows()
            for layer in loaded(self.skeleton, range(done, self.arch.layers)):
                _Block(self, layer, calls[layer], task).run()
                self._swap()
                last = layer + 1 == self.arch.layers
                if last and self.asks_loss:
                    (self.saves.folder / _LOSS).write_text(repr(self._loss()), encoding="ascii")
                if last or self.spare is not self.states or self.saves.due():
                    self.saves.save(layer + 1, {} if last else self._held(), {})

    def _loss(self) -> float:
        """The mean next-token loss of the windows, whose states have left the last block."""
        self.skeleton.load_head()
        total = sum(
            self.skeleton.loss(self.states.read(start, stop), self.ids[start:stop])
            for start, stop in self._batches()
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

    def _batches(self) -> Iterator[tuple[int, int]]:
        for start in range(0, len(self.ids), self.batch):
            yield start, min(start + self.batch, len(self.ids))


class _Block:
    """One block: its sites, what is seen at them, and the windows' way through it."""

    def __init__(self, a_sweep: _Sweep, layer: int, call: Call, task: Task) -> None:
        self.sweep, self.layer, self.call, self.task = a_sweep, layer, call, task
        self.skeleton, self.editor = a_sweep.skeleton, a_sweep.editor
        self.seen: dict[str, Accumulator] = {}
        self.sites: dict[str, list[Site]] = {}
        """By kind: one site, or those of all experts, at which tokens arrive together."""
        self.logs: dict[str, Any] = {}
        self.made: dict[str, torch.Tensor] = {}
        self.edited: set[str] = set()
        self.here: set[str] = set()
        """The sites at which the windows that are now computed have been seen."""
        self.entered: Entered | None = None

    def run(self) -> None:
        """Edits the block and carries the states through it."""
        with ExitStack() as hooks:
            for site in sites_of(self.sweep.arch, self.layer):
                width = inputs_of(self.sweep.arch, site.tensors[0])
                found = self.editor.watch(site, width, self.skeleton.device)
                if found is not None:
                    self.seen[site.name] = found
                    self.sites.setdefault(site.kind, []).append(site)
            if self.sweep.dense:
                # While the block is as it was.
                batches = self.sweep._batches()
                self.sweep.dense.advance(self.layer, self.call, self.sites, batches)
                times = self.sweep.dense.times
                self.entered = Entered(self.skeleton, self.layer, times, hooks)
            for kind, sites in self.sites.items():
                modules = {
                    self.skeleton.module(tensor) for site in sites for tensor in site.tensors
                }
                for module in sorted(modules, key=id):
                    if sites[0].expert is None:
                        handle = module.register_forward_pre_hook(partial(self._arrive, kind))
                        hooks.callback(handle.remove)
                    elif "forward" not in vars(module):
                        module.forward = partial(self._experts, module)
                        hooks.callback(delattr, module, "forward")
            if self.sweep.order == "block":
                self._block_order()
            elif self.sweep.parks:
                self._parked()
            else:
                self._repeated()
        if self.seen:
            name = next(iter(self.seen))
            raise RuntimeError(f"block {self.layer}: no inputs arrived at {name}")
        self._store()

    def _arrive(self, kind: str, module: nn.Module, args: tuple[Any, ...]) -> None:
        del module
        # OPT flattens windows before its MLP.
        length = self.sweep.ids.shape[1]
        self._see(kind, {None: args[0].reshape(-1, length, args[0].shape[-1])})

    def _experts(
        self, module: Any, states: torch.Tensor, chosen: torch.Tensor, shares: torch.Tensor
    ) -> torch.Tensor:
        """What transformers' experts compute, one after the other, with their inputs seen.

        `states` `[tokens, residual]`; `chosen` and `shares` `[tokens, experts of each]`.
        """
        linear = nn.functional.linear
        routed = [torch.where(chosen == expert) for expert in range(len(module.gate_up_proj))]
        inputs = {expert: states[token] for expert, (token, _) in enumerate(routed)}
        self._see("experts.in", {expert: x[None] for expert, x in inputs.items()})
        inner = {
            expert: module._apply_gate(linear(x, module.gate_up_proj[expert]))
            for expert, x in inputs.items()
        }
        self._see("experts.out", {expert: x[None] for expert, x in inner.items()})
        out = torch.zeros_like(states)
        for expert, (token, place) in enumerate(routed):
            made = linear(inner[expert], module.down_proj[expert]) * shares[token, place, None]
            out.index_add_(0, token, made.to(out.dtype))
        return out

    def _see(self, kind: str, inputs: Mapping[int | None, torch.Tensor]) -> None:
        """Inputs have arrived at the sites of a kind: see them, and wait for those of others."""
        if kind in self.edited or kind in self.here or kind not in self.sites:
            return
        self.here.add(kind)
        for site in self.sites[kind]:
            seen, states = self.seen[site.name], inputs[site.expert]
            if self.entered and has_target(site) and isinstance(seen, Aimed):
                seen.aim(states, *self._target(site))
            else:
                seen.see(states)
        if self.sweep.order == "block":
            return
        if not self.sweep.parks:
            raise _Arrived
        from greenlet import getcurrent

        getcurrent().parent.switch(kind)

    def _target(self, site: Site) -> tuple[torch.Tensor, torch.Tensor]:
        """What the matrix of a site is to give for the windows that are now computed."""
        assert self.entered is not None
        assert self.sweep.dense is not None
        start = self.entered.at
        bias: torch.Tensor | None = getattr(self.skeleton.module(site.tensors[0]), "bias", None)
        return self.sweep.dense.wanted(site.kind, start, self.entered.states(start), bias)

    def _enter(self, start: int, stop: int) -> torch.Tensor:
        inputs = self.sweep.states.read(start, stop).to(self.skeleton.device)
        if self.entered:
            self.entered.begin(start, inputs)
        return inputs

    def _forward(self, start: int, stop: int) -> None:
        inputs = self._enter(start, stop)
        outputs = self.skeleton.run(self.layer, inputs, self.call)
        if self.entered:
            self.entered.forget(start)
        self.sweep.spare.write(start, outputs)
        self.task.advance(inputs.shape[0] * inputs.shape[1])

    def _parked(self) -> None:
        from greenlet import greenlet

        waiting = [
            (greenlet(partial(self._forward, *rows)), rows[0], set[str]())
            for rows in self.sweep._batches()
        ]
        while waiting:
            left, reached = [], set()
            for one, start, mark in waiting:
                self.here = mark
                if self.entered:
                    self.entered.at = start
                name = one.switch()
                if not one.dead:
                    reached.add(name)
                    left.append((one, start, mark))
            waiting = left
            for name in sorted(reached):
                self._edit(name)

    def _repeated(self) -> None:
        while True:
            reached = ""
            for start, stop in self.sweep._batches():
                self.here = set()
                try:
                    self._forward(start, stop)
                except _Arrived:
                    (reached,) = self.here
            if not reached:
                return
            self._edit(reached)

    def _block_order(self) -> None:
        for start, stop in self.sweep._batches():
            self.here = set()
            inputs = self._enter(start, stop)
            self.skeleton.run(self.layer, inputs, self.call)
        for name in self.sites:
            self._edit(name)
        for start, stop in self.sweep._batches():
            self._forward(start, stop)

    def _edit(self, kind: str) -> None:
        for site in self.sites[kind]:
            weights = {tensor.name: self.sweep.weights.read(tensor) for tensor in site.tensors}
            result = self.editor.edit(site, weights, self.seen.pop(site.name))
            for tensor in site.tensors:
                if tensor.name in result.weights:
                    value = result.weights[tensor.name]
                    self.made[tensor.name] = self.sweep.weights.write(tensor, value)
            self.logs[site.name] = dict(result.log)
        self.edited.add(kind)

    def _store(self) -> None:
        from safetensors.torch import save_file

        folder = self.sweep.saves.folder
        save_file(self.made, folder / f"{self.layer}.safetensors")
        known = self.logs | {"tensors": list(self.made)}
        (folder / f"{self.layer}.json").write_text(json.dumps(known), encoding="utf-8")
