"""Hidden states of the dense model, as targets for the edited model's output projections.

The target of a projection that writes to the residual stream is the output with which the stream is
again that of the dense model: the dense output, plus what the stream has lost until then.
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
from prune_export.calibrate.streaming.offload import Buffer, Lane

TARGETED: Final = ("attention.out", "mlp.out")
"""Linear groups that have a target. Experts have none: in the dense model other tokens are routed
to them, and only the sum of their outputs is compared."""

DENSE_STATES: Final = 1 + len(TARGETED)
"""Arrays of states that are held more: the dense model's, and one for each group's target."""

MIXERS: Final = ("attention.out", "linear.out")
"""Linear groups whose outputs come first; a block has one of them, or (Falcon-H1) both at once."""

_LEAST: Final = 1e-20

_NOT_ADDED: Final = {"norm.attn.out", "norm.mlp.out", "shortcut.attn", "shortcut.mlp"}


@runtime_checkable
class TargetAccumulator(Accumulator, Protocol):
    """Accumulates a statistic of a linear group's inputs and of its target outputs."""

    def see_with_target(
        self, states: torch.Tensor, wanted: torch.Tensor, weights: torch.Tensor
    ) -> None:
        """Adds inputs `[samples, length, in]` and their target outputs `[…, out]`.

        `weights` `[samples, length]` are one over the mean square of the residual states that
        result: the norms after them divide by it.
        """


def added_times(arch: Arch) -> float | None:
    """The factor of a block's outputs when they are added to the residual stream.

    None where more than a factor lies between: where an output is normalized before it is added,
    the sum is normalized or multiplied after, or two mixers are added to each other first.
    """
    roles = {row.role for row in arch.table.rows()}
    if roles & _NOT_ADDED:
        return None
    if any({"o", "linear.out"} <= {t.role for t in arch.block(i)} for i in range(arch.layers)):
        return None
    if not holds(arch.table.added_when, arch.config):
        return None
    key = arch.table.added_times
    return float(arch.config.get(key, 1.0)) if key else 1.0


class DenseReference:
    """The dense model's hidden states, and the targets of the block that is being edited."""

    def __init__(
        self,
        layerwise: LayerwiseModel,
        times: float,
        lane: Lane,
        goals: Mapping[str, Buffer],
    ) -> None:
        self._layerwise, self.times = layerwise, times
        self.lane, self._goals = lane, goals

    def swap(self) -> None:
        """Makes the states that were written the ones that are read next."""
        self.lane.swap()

    def advance(
        self,
        layer: int,
        call: Call,
        kinds: Collection[str],
        batches: Iterable[tuple[int, int]],
    ) -> None:
        """Runs a block, before it is edited, on the dense states, and keeps its targets.

        A target is the residual states as they are when the output has been added.
        """
        with ExitStack() as hooks:
            tracker = ResidualTracker(self._layerwise, layer, self.times, hooks)
            for kind, module in projections(self._layerwise, layer).items():
                if kind in kinds:
                    handle = module.register_forward_hook(partial(self._keep, kind, tracker))
                    hooks.callback(handle.remove)
            for start, stop in batches:
                inputs = self.lane.states.read(start, stop).to(self._layerwise.device)
                tracker.begin(start, inputs)
                self.lane.spare.write(start, self._layerwise.run(layer, inputs, call))
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
        if kind not in MIXERS:  # what a mixer gives is in it by now
            goal = torch.add(goal, output.view(goal.shape), alpha=self.times)
        self._goals[_slot(kind)].write(tracker.at, goal)

    def wanted(
        self, kind: str, start: int, before: torch.Tensor, bias: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The target output of a projection, without its bias, and the weight of each token.

        `before` `[samples, length, residual]` are the edited model's states that it is added to.
        """
        goal = self._goals[_slot(kind)].read(start, start + len(before)).to(before.device)
        outputs = (goal - before) / self.times
        if bias is not None:
            outputs -= bias
        return outputs, inverse_mean_square(goal)


def inverse_mean_square(states: torch.Tensor) -> torch.Tensor:
    """The weight of each token in a fit: one over the mean square of `[…, residual]`, float32.

    The norms that read the residual states divide by it.
    """
    return states.float().square().mean(-1).clamp_min(_LEAST).reciprocal()


class ResidualTracker:
    """Tracks the residual stream to which each projection's output is added, batch by batch.

    For attention, or what stands in its place, those that enter the block. For the MLP what
    attention gives has been added to them: so it is in blocks where one follows the other, and
    in those where both read the same states, what the MLP is to make good is what is left after
    attention has.
    """

    def __init__(
        self, layerwise: LayerwiseModel, layer: int, times: float, hooks: ExitStack
    ) -> None:
        self._times = times
        self._states: dict[int, torch.Tensor] = {}
        self.at = 0
        """The batch that is being computed."""
        for kind, module in projections(layerwise, layer).items():
            if kind in MIXERS:
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
    """The output projections of a block that have a target, by the kind of their linear group."""
    return {
        group.kind: layerwise.module(group.tensors[0])
        for group in linear_groups(layerwise.arch, layer)
        if has_target(group)
    }


def has_target(group: LinearGroup) -> bool:
    """Whether the dense model gives a target for a linear group."""
    return _slot(group.kind) in TARGETED and group.expert is None


def _slot(kind: str) -> str:
    """The one of `TARGETED` under which a group's targets are held."""
    return MIXERS[0] if kind in MIXERS else kind
