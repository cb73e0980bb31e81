"""Edits one block: its linear layers in order, each on inputs that the edited earlier ones give."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import nn

from prune_export.calibrate.passes.dense_reference import (
    ResidualTracker,
    TargetAccumulator,
    has_target,
)
from prune_export.calibrate.passes.norm_correction import SeesUnedited, show_unedited
from prune_export.calibrate.passes.sequential_state import SequentialState
from prune_export.calibrate.streaming.layerwise_model import Call
from prune_export.calibrate.streaming.linear_groups import (
    Accumulator,
    LinearGroup,
    inputs_of,
    linear_groups,
)
from prune_export.progress import Task


class Arrived(Exception):
    """Ends a forward pass at a group that is not yet edited, where it is not suspended."""


class Block:
    """One loaded block: its linear groups, their accumulators, and its forward passes."""

    def __init__(
        self, given: SequentialState, layer: int, call: Call, prefix_call: Call, task: Task
    ) -> None:
        self.given, self.layer, self.task = given, layer, task
        self.call, self.prefix_call = call, prefix_call
        self.layerwise, self.editor = given.layerwise, given.editor
        self.seen: dict[str, Accumulator] = {}
        self.groups: dict[str, list[LinearGroup]] = {}
        """By kind: one group, or those of all experts, which get their tokens together."""
        self.logs: dict[str, Any] = {}
        self.made: dict[str, torch.Tensor] = {}
        self.beside: dict[str, torch.Tensor] = {}
        self.edited: set[str] = set()
        self.here: set[str] = set()
        """The kinds whose inputs of the current windows have been added."""
        self.tracker: ResidualTracker | None = None

    def run(self) -> None:
        """Edits the block, and replaces the hidden states by the edited block's outputs."""
        with ExitStack() as hooks:
            for group in linear_groups(self.given.arch, self.layer):
                width = inputs_of(self.given.arch, group.tensors[0])
                found = self.editor.watch(group, width, self.layerwise.device)
                if found is not None:
                    self.seen[group.name] = found
                    self.groups.setdefault(group.kind, []).append(group)
            if self.given.dense:
                # While the block is as it was.
                batches = self.given.batches()
                self.given.dense.advance(self.layer, self.call, self.groups, batches)
                times = self.given.dense.times
                self.tracker = ResidualTracker(self.layerwise, self.layer, times, hooks)
            if self.given.order == "sequential":
                self._show_unedited()
            for kind, groups in self.groups.items():
                modules = {
                    self.layerwise.module(tensor) for group in groups for tensor in group.tensors
                }
                for module in sorted(modules, key=id):
                    if groups[0].expert is None:
                        handle = module.register_forward_pre_hook(partial(self._arrive, kind))
                        hooks.callback(handle.remove)
                    elif "forward" not in vars(module):
                        module.forward = partial(self._experts, module)
                        hooks.callback(delattr, module, "forward")
            if self.given.order == "block":
                self._block_order()
            elif self.given.suspends:
                self._suspended()
            else:
                self._repeated()
        if self.seen:
            name = next(iter(self.seen))
            raise RuntimeError(f"block {self.layer}: no inputs arrived at {name}")
        self._store()

    def _show_unedited(self) -> None:
        """Records inputs before any edit, for the accumulators that correct their norms by them."""
        wanted = {}
        for kind in list(self.groups)[1:]:  # before the first nothing is edited
            for group in self.groups[kind]:
                seen = self.seen[group.name]
                if isinstance(seen, SeesUnedited):
                    wanted[self.layerwise.module(group.tensors[0])] = seen
        if wanted:
            prefixes = self.given.prefixes()
            show_unedited(self.layerwise, self.layer, self.prefix_call, wanted, prefixes)

    def _arrive(self, kind: str, module: nn.Module, args: tuple[Any, ...]) -> None:
        del module
        # OPT flattens windows before its MLP.
        length = self.given.ids.shape[1]
        self._see(kind, {None: args[0].reshape(-1, length, args[0].shape[-1])})

    def _experts(
        self, module: Any, states: torch.Tensor, chosen: torch.Tensor, shares: torch.Tensor
    ) -> torch.Tensor:
        """Computes transformers' experts one after the other, and records their inputs.

        `states` `[tokens, residual]`; `chosen` and `shares` `[tokens, experts of each]`.
        """
        linear = nn.functional.linear
        gated = hasattr(module, "gate_up_proj")
        first, act = (
            (module.gate_up_proj, module._apply_gate) if gated else (module.up_proj, module.act_fn)
        )
        routed = [torch.where(chosen == expert) for expert in range(len(first))]
        inputs = {expert: states[token] for expert, (token, _) in enumerate(routed)}
        self._see("experts.in", {expert: x[None] for expert, x in inputs.items()})
        inner = {expert: act(linear(x, first[expert])) for expert, x in inputs.items()}
        self._see("experts.out", {expert: x[None] for expert, x in inner.items()})
        out = torch.zeros_like(states)
        for expert, (token, place) in enumerate(routed):
            made = linear(inner[expert], module.down_proj[expert]) * shares[token, place, None]
            out.index_add_(0, token, made.to(out.dtype))
        return out

    def _see(self, kind: str, inputs: Mapping[int | None, torch.Tensor]) -> None:
        """Adds the inputs of a kind of group to its accumulators, and suspends the forward pass."""
        if kind in self.edited or kind in self.here or kind not in self.groups:
            return
        self.here.add(kind)
        for group in self.groups[kind]:
            seen, states = self.seen[group.name], inputs[group.expert]
            if self.tracker and has_target(group) and isinstance(seen, TargetAccumulator):
                seen.see_with_target(states, *self._target(group))
            else:
                seen.see(states)
        if self.given.order == "block":
            return
        if not self.given.suspends:
            raise Arrived
        from greenlet import getcurrent

        getcurrent().parent.switch(kind)

    def _target(self, group: LinearGroup) -> tuple[torch.Tensor, torch.Tensor]:
        """The target outputs of a group's matrix for the current windows, and their weights."""
        assert self.tracker is not None
        assert self.given.dense is not None
        start = self.tracker.at
        bias: torch.Tensor | None = getattr(self.layerwise.module(group.tensors[0]), "bias", None)
        return self.given.dense.wanted(group.kind, start, self.tracker.states(start), bias)

    def _enter(self, start: int, stop: int) -> torch.Tensor:
        inputs = self.given.lane.states.read(start, stop).to(self.layerwise.device)
        if self.tracker:
            self.tracker.begin(start, inputs)
        return inputs

    def _forward(self, start: int, stop: int) -> None:
        inputs = self._enter(start, stop)
        outputs = self.layerwise.run(self.layer, inputs, self.call)
        if self.tracker:
            self.tracker.forget(start)
        self.given.lane.spare.write(start, outputs)
        self.task.advance(inputs.shape[0] * inputs.shape[1])

    def _suspended(self) -> None:
        from greenlet import greenlet

        waiting = [
            (greenlet(partial(self._forward, *rows)), rows[0], set[str]())
            for rows in self.given.batches()
        ]
        while waiting:
            left, reached = [], set()
            for one, start, mark in waiting:
                self.here = mark
                if self.tracker:
                    self.tracker.at = start
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
            for start, stop in self.given.batches():
                self.here = set()
                try:
                    self._forward(start, stop)
                except Arrived:
                    (reached,) = self.here
            if not reached:
                return
            self._edit(reached)

    def _block_order(self) -> None:
        for start, stop in self.given.batches():
            self.here = set()
            inputs = self._enter(start, stop)
            self.layerwise.run(self.layer, inputs, self.call)
        for name in self.groups:
            self._edit(name)
        for start, stop in self.given.batches():
            self._forward(start, stop)

    def _edit(self, kind: str) -> None:
        for group in self.groups[kind]:
            weights = {tensor.name: self.given.weights.read(tensor) for tensor in group.tensors}
            result = self.editor.edit(group, weights, self.seen.pop(group.name))
            for tensor in group.tensors:
                if tensor.name in result.weights:
                    value = result.weights[tensor.name]
                    self.made[tensor.name] = self.given.weights.write(tensor, value)
            self.beside |= {name: kept.cpu() for name, kept in result.beside.items()}
            self.logs[group.name] = dict(result.log)
        self.edited.add(kind)

    def _store(self) -> None:
        from safetensors.torch import save_file

        folder = self.given.folder
        save_file(self.made | self.beside, folder / f"{self.layer}.safetensors")
        known = self.logs | {"tensors": list(self.made), "beside": list(self.beside)}
        (folder / f"{self.layer}.json").write_text(json.dumps(known), encoding="utf-8")
