"""Which units stay: the highest scores of each block, or of all blocks together."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import torch

from prune_export.arch import Arch
from prune_export.methods._units import unit_shape
from prune_export.methods._width_sizes import usual_multiple


def units_cut(arch: Arch, sizes: Mapping[str, int]) -> tuple[str, ...]:
    """The axes whose units are chosen among: heads stand under their key-value axis."""
    found: dict[str, None] = {}
    for axis in sizes:
        name, _, layer = axis.partition(".")
        found[f"kv.{layer}" if name == "group" else axis] = None
    return tuple(axis for axis in arch.sizes if axis in found)


def largest(scores: torch.Tensor, keep: int) -> torch.Tensor:
    """`[units]` bool: the `keep` units with the highest scores; of equal ones the first."""
    order = torch.argsort(scores, descending=True, stable=True)
    kept = torch.zeros(len(scores), dtype=torch.bool)
    kept[order[:keep].cpu()] = True
    return kept


def chosen(arch: Arch, axis: str, scores: torch.Tensor, sizes: Mapping[str, int]) -> torch.Tensor:
    """Bool of the units' shape: those that stay of one axis, as many as `sizes` says.

    Of heads, the groups with the highest sums stay, and in each of them the heads with the highest
    scores.
    """
    if not axis.startswith("kv."):
        return largest(scores.flatten(), sizes[axis]).view(scores.shape)
    heads = scores.reshape(scores.shape[0], -1)
    layer = axis.partition(".")[2]
    kept = torch.zeros(heads.shape, dtype=torch.bool)
    groups = largest(heads.sum(1), sizes.get(axis, heads.shape[0]))
    for group in groups.nonzero().flatten().tolist():
        kept[group] = largest(heads[group], sizes.get(f"group.{layer}", heads.shape[1]))
    return kept.view(scores.shape)


def chosen_in_block(
    arch: Arch, scores: Mapping[str, torch.Tensor], sizes: Mapping[str, int]
) -> dict[str, torch.Tensor]:
    """What stays along every axis, each ranked by itself."""
    return {axis: chosen(arch, axis, scores[axis], sizes) for axis in units_cut(arch, sizes)}


def chosen_everywhere(
    arch: Arch,
    scores: Mapping[str, torch.Tensor],
    sizes: Mapping[str, int],
    protected: Collection[int],
    multiple_of: int | None,
) -> dict[str, torch.Tensor]:
    """What stays along every axis, those of a kind ranked together.

    Scores are compared as shares of their axis's mean, since their scale says little about blocks.
    Channels go in runs of `multiple_of`, heads one by one; each axis keeps at least one of them.
    """
    kept = {
        axis: torch.ones(unit_shape(arch, axis), dtype=torch.bool)
        for axis in units_cut(arch, sizes)
    }
    for kind in ("mlp", "moe", "kv", "group"):
        axes = [axis for axis in sizes if axis.split(".")[0] == kind]
        if not axes:
            continue
        remove = sum(arch.sizes[axis] - sizes[axis] for axis in axes)
        step = 1
        if kind in ("mlp", "moe"):
            step = multiple_of or usual_multiple(arch.sizes[axes[0]])
        ranked = []
        for axis in axes:
            layer = axis.split(".")[1]
            own = f"kv.{layer}" if kind == "group" else axis
            if kind == "group":
                remove += (arch.sizes[axis] - sizes[axis]) * (arch.sizes[own] - 1)
            if int(layer) not in protected:
                ranked.append((own, _units(kind, scores[own], kept[own])))
        for own, unit in _least(ranked, remove, step):
            if kind == "kv":
                kept[own][unit] = False
            else:
                kept[own].view(-1)[unit] = False
    return kept


def _units(kind: str, scores: torch.Tensor, kept: torch.Tensor) -> list[tuple[float, int]]:
    """(share of the mean, position) of the units that are left, ascending."""
    if kind == "kv":
        scores, kept = scores.reshape(len(scores), -1).sum(1), kept.reshape(len(kept), -1).any(1)
    scores, kept = scores.flatten().double().cpu(), kept.flatten()
    mean = float(scores.mean()) or 1.0
    shares = (scores / mean).tolist()
    return sorted((shares[at], at) for at in kept.nonzero().flatten().tolist())


def _least(
    ranked: Sequence[tuple[str, list[tuple[float, int]]]], remove: int, step: int
) -> list[tuple[str, int]]:
    """About `remove` units to remove, in runs of `step`; the last run of each axis stays."""
    runs = []
    for axis, units in ranked:
        for start in range(0, len(units) - step, step):
            run = units[start : start + step]
            mean = sum(share for share, _ in run) / step
            runs.append((mean, axis, [unit for _, unit in run]))
    runs.sort(key=lambda run: run[0])
    count = int(remove / step + 0.5)
    return [(axis, unit) for _, axis, units in runs[:count] for unit in units]
