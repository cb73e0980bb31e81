"""Placeholder sizes in a traced graph, for blocks of different widths.

A block is traced once, whatever widths its copies have: its parameters take no memory, so it is
traced with sizes that occur nowhere else, and what in the graph depends on them (split points, head
counts, shapes) can be read back as a polynomial and filled in for each block.

    traced with K = 2^20+7 groups of G = 2^13+17 heads of 64, the queries have a width of 64·K·G;
    where 64·K·G stands in the graph, a block with 2 groups of 3 heads gets 64·2·3 = 384
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final

import torch
from torch import nn

from prune_export.arch.roles import CONTROLS
from prune_export.exporters._shared.trim import Trim

_MLP: Final = 2**45 + 59
_KV: Final = 2**20 + 7
_GROUP: Final = 2**13 + 17
"""Larger than any plain number in a block, and so far apart that no product is another's."""

_COEFFICIENT: Final = 2**12  # an MLP's width is multiplied by 2 at most: gate and up are joined
_STANDS_FOR: Final = {"mlp": _MLP, "moe": _MLP, "kv": _KV, "group": _GROUP}


@dataclass(frozen=True)
class Fit:
    """The sizes of each block of a trimmed model, and how to fill them into a traced graph.

    `dead` are (torch parameter, expert or None) of projections, and biases, that are zero.
    """

    trim: Trim
    dead: frozenset[tuple[str, int | None]]

    @cached_property
    def shrunk(self) -> frozenset[str]:
        """Names of the axes that have placeholder sizes in the trace."""
        return self.trim.shrunk()

    @staticmethod
    def of(trim: Trim, parameter_of: Callable[[str], str]) -> Fit:
        """Makes the fit for a traced model; `parameter_of` gives torch names."""
        found: set[tuple[str, int | None]] = set()
        for name in trim.dead:
            parameter, expert = parameter_of(name), trim.arch.by_name[name].expert
            if expert is not None:  # transformers stacks the experts in memory
                parameter = parameter.rsplit(f".{expert}.", 1)[0] + ".down_proj"
            found.add((parameter, expert))
        return Fit(trim, frozenset(found))

    def is_dead(self, parameter: str, layer: int, expert: int | None) -> bool:
        """Whether a parameter, or one expert of it, is all zero."""
        if expert is not None or (parameter, None) in self.dead:
            return (parameter, expert) in self.dead
        experts = self.trim.arch.sizes.get(f"expert.{layer}", 0)
        return experts > 0 and all((parameter, one) in self.dead for one in range(experts))

    def is_size(self, number: int) -> bool:
        """Whether a number of the traced graph is a placeholder for one that differs by layer."""
        heads = bool(self.shrunk & {"kv", "group"})
        return self._is_width(number) or (heads and self._is_heads(number))

    def read(self, number: int, layer: int, expert: int = -1) -> int:
        """The value, in a layer or an expert, of a number of the traced graph."""
        if not self.is_size(number):
            return number
        if self._is_width(number):
            axis = f"mlp.{layer}" if expert < 0 else f"moe.{layer}.{expert}"
            return number // _MLP * self.trim.size(axis)
        group = f"group.{layer}"
        heads = self.trim.size(group) if group in self.trim.arch.sizes else 1
        if number == _GROUP:
            return heads
        products, alone = divmod(number // _KV, _GROUP)
        return (products * heads + alone) * self.trim.size(f"kv.{layer}")

    def _is_width(self, number: int) -> bool:
        multiple, rest = divmod(number, _MLP)
        return not rest and 0 < multiple < _COEFFICIENT and bool(self.shrunk & {"mlp", "moe"})

    def _is_heads(self, number: int) -> bool:
        return number == _GROUP or (0 < number < _MLP and number % _KV == 0)


def resize(model: Any, blocks: str, trim: Trim, parameter_of: Callable[[str], str]) -> None:
    """Gives the blocks of a weightless model placeholder sizes, in place."""
    names = trim.shrunk()
    if names & {"kv", "group"}:
        names |= {"kv", "group"}
    arch = trim.arch
    for axis in arch.sizes:
        name, dot, _ = axis.partition(".")
        if dot and name in names:
            arch = arch.resized(axis, _STANDS_FOR[name])
    has_groups = any(axis.startswith("group.") for axis in arch.sizes)
    queries = _KV * (_GROUP if has_groups else 1)
    shapes = {parameter_of(tensor.name): arch.shape(tensor) for tensor in arch.tensors}
    # What keeps states counts other heads, which are never cut.
    own = {parameter_of(t.name).rpartition(".")[0] for t in arch.tensors if t.role in CONTROLS}
    for path, module in model.named_modules():
        if path.startswith(f"{blocks}."):
            for name, parameter in list(module._parameters.items()):
                if parameter is not None:
                    shape = shapes.get(f"{path}.{name}") or _stacked(name, parameter, names)
                    if shape != tuple(parameter.shape):
                        empty = torch.zeros((), dtype=parameter.dtype).expand(shape)
                        setattr(module, name, nn.Parameter(empty, requires_grad=False))
            _tell(module, "kv" in names and path not in own, queries)
    if "kv" in names:
        if getattr(model.config, "head_dim", None) is None and "dim" in arch.sizes:
            model.config.head_dim = arch.sizes["dim"]  # else some divide by the number of heads
        model.config.num_attention_heads = queries


def _stacked(name: str, parameter: torch.Tensor, names: frozenset[str]) -> tuple[int, ...]:
    """The shape of a stacked parameter, which the files hold apart: experts `[experts, …]`."""
    count, rows, columns = parameter.shape
    if "moe" not in names:
        return count, rows, columns
    if name == "down_proj":
        return count, rows, _MLP
    return count, _MLP if name == "up_proj" else 2 * _MLP, columns


def _tell(module: nn.Module, heads: bool, queries: int) -> None:
    """Sets a module's attributes (numbers of heads …) to its new shapes, `queries` of them."""
    known = vars(module)
    if "nf" in known:  # Conv1D
        known["nf"] = module._parameters["weight"].shape[1]  # type: ignore[union-attr]
    if heads:
        for name, count in (("num_heads", queries), ("num_key_value_heads", _KV)):
            if name in known:
                known[name] = count
        if {"num_heads", "head_dim", "hidden_size"} <= known.keys():  # what comes back together
            known["hidden_size"] = queries * known["head_dim"]
        if "split_size" in known:  # GPT-2: where queries, keys and values are split
            known["split_size"] = _KV * known["head_dim"]
