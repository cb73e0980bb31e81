"""Chooses the units to keep: the highest scores of each block, or of all blocks together."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass

import torch

from prune_export.arch import Arch
from prune_export.pruning.width.unit_layout import unit_shape
from prune_export.pruning.width.width_sizes import AXES, usual_multiple


def units_cut(arch: Arch, sizes: Mapping[str, int]) -> tuple[str, ...]:
    """The axes along which units are cut; heads belong to their key-value axis."""
    found: dict[str, None] = {}
    for axis in sizes:
        name, _, layer = axis.partition(".")
        found[f"kv.{layer}" if name == "group" else axis] = None
    return tuple(axis for axis in arch.sizes if axis in found)


def largest(scores: torch.Tensor, keep: int) -> torch.Tensor:
    """Marks the `keep` units with the highest scores, bool `[units]`; of equal ones the first."""
    order = torch.argsort(scores, descending=True, stable=True)
    kept = torch.zeros(len(scores), dtype=torch.bool)
    kept[order[:keep].cpu()] = True
    return kept


def chosen(arch: Arch, axis: str, scores: torch.Tensor, sizes: Mapping[str, int]) -> torch.Tensor:
    """Marks the units of one axis to keep, as many as `sizes` says (bool, True where kept).

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
    """Chooses the units to keep of every axis, each ranked by itself."""
    return {axis: chosen(arch, axis, scores[axis], sizes) for axis in units_cut(arch, sizes)}


def chosen_everywhere(
    arch: Arch,
    scores: Mapping[str, torch.Tensor],
    sizes: Mapping[str, int],
    protected: Collection[int],
    multiple_of: int | None,
) -> dict[str, torch.Tensor]:
    """Chooses the units to keep of every axis, ranked together over all blocks.

    Scores are compared as shares of their axis's mean, since their scale says little about blocks.
    Channels go in runs of `multiple_of`, groups one by one, and of heads the weakest of every group
    of a block at once, so that engines can leave them out; each axis keeps at least one of them.
    """
    kept = {
        axis: torch.ones(unit_shape(arch, axis), dtype=torch.bool)
        for axis in units_cut(arch, sizes)
    }
    for kind in (*AXES["ffn"], "kv", "group"):
        axes = [axis for axis in sizes if axis.split(".")[0] == kind]
        if not axes:
            continue
        step = 1
        if kind in AXES["ffn"]:
            step = multiple_of or usual_multiple(arch.sizes[axes[0]])
        runs: list[_Run] = []
        for axis in axes:
            layer = axis.split(".")[1]
            own = f"kv.{layer}" if kind == "group" else axis
            if int(layer) not in protected:
                runs += _runs(kind, own, scores[own].double().cpu(), kept[own], step)
        runs.sort(key=lambda run: run.share)
        remove = sum(arch.sizes[axis] - sizes[axis] for axis in axes)
        for run in runs[: int(remove / step + 0.5)]:
            kept[run.axis].view(-1)[run.units] = False
    return kept


@dataclass(frozen=True)
class _Run:
    """Units that are removed together, and their mean score relative to that of their axis."""

    axis: str
    share: float
    units: list[int]


def _runs(
    kind: str, axis: str, scores: torch.Tensor, kept: torch.Tensor, step: int
) -> Iterator[_Run]:
    """Lists what may be removed of an axis, the least first; the last run stays."""
    mean = float(scores.mean()) or 1.0
    if kind in AXES["ffn"]:
        order = torch.argsort(scores.flatten(), stable=True)
        parts = [order[at : at + step] for at in range(0, len(order) - step, step)]
    else:
        places = torch.arange(scores.numel()).view(len(scores), -1)
        heads, stays = scores.reshape(places.shape), kept.reshape(places.shape).any(1)
        if kind == "kv":
            parts = [places[group] for group in torch.argsort(heads.sum(1), stable=True)[:-1]]
        else:
            order = torch.argsort(heads[stays], dim=1, stable=True)
            parts = list(places[stays].gather(1, order).T[:-1])
    for part in parts:
        yield _Run(axis, float(scores.flatten()[part].mean()) / mean, part.tolist())
