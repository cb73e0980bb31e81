"""Linear layers of a block: what one is, its role, and the dims of its outputs and inputs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import torch
from torch import nn

from prune_export.arch.dims import Dims
from prune_export.deriving.watching import Seen, same

Sizes = Mapping[str, int]

QUERY: Final = "(kv group dim)"
KEY: Final = "(kv dim)"
INTO_MLP: Final = frozenset(
    {"gate", "up", "gate_up", "router", "shared.gate", "shared.up", "shared.gate_up"}
)


@dataclass(frozen=True)
class Layer:
    """A linear layer of a block: its role, and the dims of its outputs and of its inputs."""

    name: str
    role: str
    out: str
    into: str
    transposed: bool = False


def is_linear(module: nn.Module) -> bool:
    """Whether a module multiplies by a matrix of its own."""
    weight = getattr(module, "weight", None)
    plain = isinstance(weight, torch.Tensor) and weight.dim() == 2
    return plain and not isinstance(module, nn.Embedding) and not list(module.children())


def transposed(seen: Seen) -> bool | None:
    """Whether a linear layer stores [in, out]; None where it does something else, too."""
    weight, bias = seen.module.weight, getattr(seen.module, "bias", None)
    assert isinstance(weight, torch.Tensor)
    plus = 0 if bias is None else bias
    given = seen.given.reshape(-1, seen.given.shape[-1])
    for matrix, answer in ((weight.T, False), (weight, True)):
        if given.shape[1] == matrix.shape[0] and same(given @ matrix + plus, seen.gave):
            return answer
    return None


def below(name: str, home: str) -> bool:
    """Whether a module lies in another; nothing lies in ""."""
    return bool(home) and name.startswith(f"{home}.")


def size_dims(size: int, sizes: Sizes, *, within_heads: bool) -> str:
    """The dims of a tensor of one dimension of this size; a number where no axis is so long."""
    heads = sizes["kv"] * sizes.get("group", 1)
    query = QUERY if "group" in sizes else KEY
    known: dict[int, str] = {}
    if "group" in sizes:
        known[heads] = "(kv group)"
    known.setdefault(sizes["kv"], "kv")
    known[sizes["dim"]] = "dim"
    for text in (KEY, query):
        known[Dims.parse(text).shape(sizes)[0]] = text
    if "mlp" in sizes:
        known[sizes["mlp"]] = "mlp"
    if not within_heads or sizes["residual"] not in known:
        known[sizes["residual"]] = "residual"
    for times in (2, 3, 4) if within_heads else ():
        for text in (KEY, query):
            known.setdefault(times * Dims.parse(text).shape(sizes)[0], f"({times} {text[1:]}")
    return known.get(size, str(size))


def leaf(name: str) -> str:
    """The last part of a module's path."""
    return name.rpartition(".")[2]
