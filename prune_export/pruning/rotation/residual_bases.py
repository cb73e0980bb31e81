"""Rotations of the residual stream for SliceGPT: which models allow them, and PCA bases.

The residual states may be rotated at no cost where every tensor that touches them is one of: the
embedding, a norm that divides by the root mean square, a matrix that reads behind such a norm, or a
matrix or bias that writes into them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Final

import torch

from prune_export.arch import Arch, Tensor
from prune_export.arch.roles import ROLES, roles
from prune_export.arch.table import tables
from prune_export.errors import PlanError, UnsupportedArch

READS_BEHIND: Final[Mapping[str, str]] = {
    name: own.reads for name, own in ROLES.items() if own.reads is not None
}
"""For each role that reads the residual states, the role of the norm before it."""

WRITES: Final = frozenset(roles(lambda own: own.writes, biases=True))
"""The roles of what is added to the residual states."""
TURNS: Final = frozenset({"shortcut.attn", "shortcut.mlp"})
"""Matrices between two bases, which only models that were sliced before have."""

NORMS: Final = frozenset(READS_BEHIND.values())

_ROWS: Final = 8192
"""Rows multiplied at once, so that a large vocabulary needs little more than its own memory."""


def check(arch: Arch) -> None:
    """Refuses a model whose residual stream cannot be rotated within its own class.

    Raises:
        PlanError: its norms subtract the mean, or something else stands in the way.
    """
    problem = _problem(arch)
    if problem:
        able = sorted({table.family for table in tables().values() if _able(table.model_types[0])})
        raise PlanError(
            f"model  {arch.family}",
            f"{problem}, so its residual states cannot be rotated",
            f"slicegpt works on {', '.join(able)}; for others cut channels (`minitron`) or blocks",
        )


def _problem(arch: Arch) -> str:
    if arch.table.norm != "rms":
        return "its norms subtract the mean, and its class has no other norm"
    found = {tensor.role for tensor in arch.using("residual")}
    known = NORMS | READS_BEHIND.keys() | WRITES
    if not found >= NORMS:
        return "it has no norm before attention and MLP"
    inside = NORMS - {"norm.final"}
    if not all(inside <= {one.role for one in arch.block(i)} for i in range(arch.layers)):
        return "some of its blocks have attention or an MLP alone"
    if found - known:
        return f"`{min(found - known)}` scales the states between a matrix and the residual stream"
    return ""


def _able(model_type: str) -> bool:
    """Whether models of a type can be rotated, judged by its tiny config."""
    table = tables()[model_type]
    try:
        return not _problem(Arch.from_config({"model_type": model_type, **table.tiny.config}))
    except UnsupportedArch:
        return False


def sliced_type(arch: Arch) -> str:
    """The model type of our own class that has a rotation at each norm.

    Raises:
        PlanError: there is none.
    """
    found = f"sliced_{arch.config['model_type']}"
    if found not in tables():
        able = sorted(
            name.removeprefix("sliced_") for name in tables() if name.startswith("sliced_")
        )
        raise PlanError(
            "rotation: per_junction",
            f"needs a model type of our own, and there is none for {arch.family}",
            f"write `rotation: shared`; there is one for {', '.join(able)}",
        )
    return found


def sizes(arch: Arch, multiple_of: int) -> list[int]:
    """The smaller hidden sizes that the model's config can express, ascending."""
    found = []
    for size in range(multiple_of, arch.sizes["residual"], multiple_of):
        try:
            arch.resized("residual", size).to_config(arch.config)
        except PlanError:
            continue
        found.append(size)
    return found


def principal(covariances: Sequence[torch.Tensor] | Iterator[torch.Tensor]) -> torch.Tensor:
    """The PCA of summed covariances: orthogonal `[residual, residual]`, largest directions first.

    Each direction's largest entry is positive, so that the same states give the same rotation.
    """
    total = sum(covariances, start=torch.zeros((), dtype=torch.float64))
    _, vectors = torch.linalg.eigh((total + total.T) / 2)
    vectors = vectors.flip(1)
    signs = vectors.gather(0, vectors.abs().argmax(0, keepdim=True)).sign()
    found: torch.Tensor = signs * vectors
    return found


def fitted(covariance: torch.Tensor, basis: torch.Tensor) -> torch.Tensor:
    """The matrix `[residual, kept]` that best reconstructs a state from its projection on `basis`.

    For a matrix W that reads states x, `W @ fitted` reads `basis.T @ x` and comes nearest to W x in
    the mean square. Where `basis` are principal directions of `covariance`, it is `basis`.
    """
    seen = covariance @ basis
    own = basis.T @ seen
    # What is cut off, foretold from what is left; damped, so that rounding foretells nothing.
    damping = 1e-6 * own.diagonal().mean() * torch.eye(len(own), dtype=own.dtype)
    cut_off: torch.Tensor = torch.linalg.solve(own + damping, seen - basis @ own, left=False)
    found: torch.Tensor = basis + cut_off
    return found


def along(tensor: Tensor) -> int:
    """The dimension of a tensor that is the residual one."""
    return tensor.dims.of.index((("residual",),))


def turned(
    stored: torch.Tensor, dim: int, by: torch.Tensor, gain: torch.Tensor | None = None
) -> torch.Tensor:
    """Multiplies dimension `dim` of a tensor by `gain`, then by the columns of `by`.

    Its shape and dtype stay: behind the columns of `by` there are zeros.
    """
    rows = stored.movedim(dim, -1)
    flat = rows.reshape(-1, rows.shape[-1])
    out = torch.zeros_like(flat)
    by = by.float()
    for start in range(0, len(flat), _ROWS):
        part = flat[start : start + _ROWS].float()
        if gain is not None:
            part = part * gain.float()
        out[start : start + _ROWS, : by.shape[1]] = (part @ by).to(out.dtype)
    return out.reshape(rows.shape).movedim(-1, dim).contiguous()
