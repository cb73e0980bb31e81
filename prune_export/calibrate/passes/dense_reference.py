"""The dense model's states beside those of a model that a sweep edits.

From them comes what a projection back to the residual states would have to give, so that these are
again what they are in the dense model: its own output there, and what they have lost until then.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from contextlib import ExitStack
from functools import partial
from typing import Any, Final, Protocol, runtime_checkable

import torch
from torch import nn

from prune_export.arch import Arch
from prune_export.arch.conditions import holds
from prune_export.calibrate.streaming.layerwise_model import Call, LayerwiseModel
from prune_export.calibrate.streaming.linear_groups import Accumulator, LinearGroup, linear_groups
from prune_export.calibrate.streaming.offload import Buffer

TARGETED: Final = ("attention.out", "mlp.out")
"""Sites that have a target. Experts have none: other tokens are routed to them in the dense model,
and only the sum of what they give is compared."""

DENSE_STATES: Final = 1 + len(TARGETED)
"""Arrays of states that are held more: the dense model's, and one for each site's target."""

_LEAST: Final = 1e-20

_NOT_ADDED: Final = {"norm.attn.out", "norm.mlp.out", "shortcut.attn", "shortcut.mlp"}


@runtime_checkable
class TargetAccumulator(Accumulator, Protocol):
    """Gathers something of a site's inputs and of what is to be made of them."""

    def see_with_target(
        self, states: torch.Tensor, wanted: torch.Tensor, weights: torch.Tensor
    ) -> None:
        """Sees inputs `[samples, length, in]` and what the matrix is to make of them `[…, out]`.

        `weights` `[samples, length]` are one over the mean square of the residual states that
        result: the norms after them divide by it.
        """


def added_times(arch: Arch) -> float | None:
    """What is added to the residual states is the output of a projection back, times this.

    None where it is not: where it is normalized before, or the states are after, or are multiplied.
    """
    roles = {row.role for row in arch.table.rows()}
    if roles & _NOT_ADDED:
        return None
    if not holds(arch.table.added_when, arch.config):
        return None
    key = arch.table.added_times
    return float(arch.config.get(key, 1.0)) if key else 1.0


class DenseReference:
    """The states of the dense model, and the targets of the block that is being edited.

    `spare` takes the next states where they are in files, which a killed sweep reads again.
    """

    def __init__(
        self,
        layerwise: LayerwiseModel,
        times: float,
        states: Buffer,
        spare: Buffer,
        goals: Mapping[str, Buffer],
    ) -> None:
        self._layerwise, self.times = layerwise, times
        self.states, self.spare = states, spare
        self._goals = goals

    def swap(self) -> None:
        """Makes the next states those that are read."""
        self.states, self.spare = self.spare, self.states

    def advance(
        self,
        layer: int,
        call: Call,
        kinds: Collection[str],
        batches: Iterable[tuple[int, int]],
    ) -> None:
        """Carries the states through a block that is not yet edited, and keeps the targets.

        A target is the residual states as they are when the output has been added.
        """
        with ExitStack() as hooks:
            tracker = ResidualTracker(self._layerwise, layer, self.times, hooks)
            for kind, module in projections(self._layerwise, layer).items():
                if kind in kinds:
                    handle = module.register_forward_hook(partial(self._keep, kind, tracker))
                    hooks.callback(handle.remove)
            for start, stop in batches:
                inputs = self.states.read(start, stop).to(self._layerwise.device)
                tracker.begin(start, inputs)
                self.spare.write(start, self._layerwise.run(layer, inputs, call))
                tracker.forget(start)

    def _keep(
        self,
        kind: str,
        tracker: ResidualTracker,
        module: nn.Module,
        args: Any,
        output: torch.Tensor,
    ) -> None:
        del module, args
        goal = tracker.states(tracker.at)
        if kind != "attention.out":  # what attention gives is in it by now
            goal = torch.add(goal, output.view(goal.shape), alpha=self.times)
        self._goals[kind].write(tracker.at, goal)

    def wanted(
        self, kind: str, start: int, before: torch.Tensor, bias: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What a projection is to give, less its bias, and the weights of its tokens.

        `before` `[samples, length, residual]` are the edited model's states that it is added to.
        """
        goal = self._goals[kind].read(start, start + len(before)).to(before.device)
        outputs = (goal - before) / self.times
        if bias is not None:
            outputs -= bias
        return outputs, goal.float().square().mean(-1).clamp_min(_LEAST).reciprocal()


class ResidualTracker:
    """The residual states to which each projection's output is added, by a batch's first window.

    For attention those that enter the block. For the MLP what attention gives has been added to
    them: so it is in blocks where one follows the other, and in those where both read the same
    states, what the MLP is to make good is what is left after attention has.
    """

    def __init__(
        self, layerwise: LayerwiseModel, layer: int, times: float, hooks: ExitStack
    ) -> None:
        self._times = times
        self._states: dict[int, torch.Tensor] = {}
        self.at = 0
        """The batch that is being computed."""
        for kind, module in projections(layerwise, layer).items():
            if kind == "attention.out":
                hooks.callback(module.register_forward_hook(self._add).remove)

    def begin(self, start: int, inputs: torch.Tensor) -> None:
        """A batch enters the block."""
        self.at = start
        self._states[start] = inputs

    def states(self, start: int) -> torch.Tensor:
        """`[samples, length, residual]` of a batch, with what has been added until now."""
        return self._states[start]

    def forget(self, start: int) -> None:
        """A batch has left the block."""
        del self._states[start]

    def _add(self, module: nn.Module, args: Any, output: torch.Tensor) -> None:
        del module, args
        before = self._states[self.at]
        self._states[self.at] = torch.add(before, output.view(before.shape), alpha=self._times)


def projections(layerwise: LayerwiseModel, layer: int) -> dict[str, nn.Module]:
    """The modules back to the residual states that have a target, by the kind of their site."""
    return {
        site.kind: layerwise.module(site.tensors[0])
        for site in linear_groups(layerwise.arch, layer)
        if has_target(site)
    }


def has_target(site: LinearGroup) -> bool:
    """Whether the dense stream says what a site's matrix is to give."""
    return site.kind in TARGETED and site.expert is None
