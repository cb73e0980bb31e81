"""Runs a block with its attention or MLP skipped, and measures what each adds to the residual."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Final, Literal

import torch

from prune_export.arch.roles import roles
from prune_export.calibrate.streaming.layerwise_model import Call, LayerwiseModel

Part = Literal["block", "attention", "mlp"]


@dataclass(frozen=True, order=True)
class Unit:
    """What can be removed: a block, or its attention or its MLP alone."""

    layer: int
    part: Part = "block"


def after(unit: Unit, layers: int) -> int:
    """The blocks to run for the model without a unit, from that unit's block on."""
    return layers - unit.layer - (unit.part == "block")


OUTPUTS: Final[Mapping[Part, tuple[str, ...]]] = {
    "attention": roles(lambda own: own.writes and own.part == "attention", biases=True),
    "mlp": roles(lambda own: own.writes and own.part == "mlp", biases=True),
}
"""The roles of what writes the output of a part of a block; zeros there remove the part."""

_LANDMARKS: Final[Mapping[Part, tuple[str, ...]]] = {
    "attention": ("o", "linear.out"),
    "mlp": ("down", "router", "shared.down", "experts.down"),
}
"""The roles of matrices by which a part is found; experts are fused in memory, their router not."""


@contextmanager
def skipped(layerwise: LayerwiseModel, layer: int, parts: Collection[Part]) -> Iterator[None]:
    """Makes these parts of a loaded block give zeros inside a `with`; modules are not computed."""
    with ExitStack() as undo:
        for part in parts:
            for module, whole, pair in _modules(layerwise, layer, part):
                if whole:
                    zeros = _zeros_and_none if pair else _zeros
                    _instead(module, partial(zeros, layerwise.arch.sizes["residual"]), undo)
                else:
                    handle = module.register_forward_hook(lambda _m, _i, out: torch.zeros_like(out))
                    undo.callback(handle.remove)
        yield


Step = tuple[torch.Tensor, torch.Tensor]
"""Residual states without what a part adds to them, and with it."""


class Steps:
    """Measures what attention and MLP each add to the residual stream, at the cost of the norms.

    A part's output is kept when the block runs; then the block runs again with what was kept in
    place of the parts, or zeros. So whatever a family does with an output (scales it, norms it, or
    norms the sum) is done to both sides of a step. Where both parts are added to what enters the
    block (`Arch.parallel`), both steps start there; else that of the MLP starts where the
    attention's ends.
    """

    def __init__(self, layerwise: LayerwiseModel, layer: int, call: Call) -> None:
        self._layerwise, self._layer, self._call = layerwise, layer, call
        parts: tuple[Part, ...] = ("attention", "mlp")
        self._modules = [
            (part, module) for part in parts for module, *_ in _modules(layerwise, layer, part)
        ]
        self._kept: dict[Any, Any] = {}

    def run(self, states: torch.Tensor) -> torch.Tensor:
        """Runs the whole block, and keeps the outputs of its parts."""
        with ExitStack() as undo:
            for _, module in self._modules:
                handle = module.register_forward_hook(partial(_keep, self._kept))
                undo.callback(handle.remove)
            return self._layerwise.run(self._layer, states, self._call)

    def of(self, part: Part, states: torch.Tensor, outputs: torch.Tensor) -> Step:
        """The residual stream before and after one part; `states` were the last input of `run`."""
        if part == "attention":
            return self._with((), states), self._with(("attention",), states)
        if self._layerwise.arch.parallel:
            return self._with((), states), self._with(("mlp",), states)
        return self._with(("attention",), states), outputs

    def _with(self, parts: Collection[str], states: torch.Tensor) -> torch.Tensor:
        """The block's output with the kept outputs of only these parts."""
        with ExitStack() as undo:
            for part, module in self._modules:
                kept = self._kept[module]
                _instead(module, partial(_given, kept if part in parts else _blank(kept)), undo)
            return self._layerwise.run(self._layer, states, self._call)


def _modules(layerwise: LayerwiseModel, layer: int, part: Part) -> list[tuple[Any, bool, bool]]:
    """The modules of a block that are a part, and True: one, or that of a shared expert too.

    Else its last one, and False: some MLPs have no module (OPT), and some modules add the residual
    states (Bloom). The third says whether the module returns its output as the first of two.
    """
    found: list[tuple[Any, bool, bool]] = []
    for tensor in layerwise.arch.block(layer):
        if tensor.role in _LANDMARKS[part]:
            leaf = layerwise.module(tensor)
            whole = next(
                child
                for child in layerwise.block(layer).children()
                if any(module is leaf for module in child.modules())
            )
            if layerwise.arch.table.parts_add:
                whole = leaf
            if all(whole is not other for other, *_ in found):
                pair = tensor.role == "o"
                if part == "mlp":
                    pair = layerwise.arch.mlp_in_tuple(layer)
                found.append((whole, whole is not leaf, pair))
    return found


def _instead(module: Any, forward: Callable[..., Any], undo: ExitStack) -> None:
    """Replaces a module's `forward` until `undo` is closed."""
    # An instance's own `forward` hides that of its class.
    module.forward = forward
    undo.callback(delattr, module, "forward")


def _zeros(width: int, *args: Any, **named: Any) -> torch.Tensor:
    states: torch.Tensor = args[0] if args else named["hidden_states"]
    assert states.shape[-1] == width
    return torch.zeros_like(states)


def _zeros_and_none(width: int, *args: Any, **named: Any) -> tuple[torch.Tensor, None]:
    return _zeros(width, *args, **named), None


def _keep(kept: dict[Any, Any], module: Any, args: Any, output: Any) -> None:
    del args
    kept[module] = output


def _given(output: Any, *args: Any, **named: Any) -> Any:
    del args, named
    return output


def _blank(output: Any) -> Any:
    if isinstance(output, tuple):
        return (torch.zeros_like(output[0]), *output[1:])
    return torch.zeros_like(output)
