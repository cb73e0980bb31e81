"""Turns the choice of units into edits: narrower tensors, or zeros in tensors of the old width."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from prune_export.arch import Arch, Tensor
from prune_export.calibrate import EnergyShares, ModelView, SequentialResult, linear_groups
from prune_export.pruning.width.unit_layout import reordered, spread, unit_axes
from prune_export.pruning.width.width_passes import axis_of
from prune_export.surgery import Edit, Keep, Overwrite

Kept = Mapping[str, torch.Tensor]
"""By axis: bool of the units' shape."""


@dataclass(frozen=True)
class _Values:
    """Reads current tensor values: the method's own, refitted ones, else the checkpoint's."""

    model: ModelView
    result: SequentialResult | None
    own: Mapping[str, Callable[[], torch.Tensor]]

    def __call__(self, name: str) -> torch.Tensor:
        if name in self.own:
            return self.own[name]()
        if self.result is not None and name in self.result.names:
            return self.result.read(name)
        return self.model.checkpoint.read_finite(name)


def edits(
    model: ModelView,
    kept: Kept,
    result: SequentialResult | None,
    own: Mapping[str, Callable[[], torch.Tensor]],
    shares: EnergyShares | None,
    *,
    wide: bool,
) -> Iterator[Edit]:
    """Makes the edits that remove all units that are not kept.

    `own` are values that the method made itself; `shares` are of norms that are to be rescaled.
    """
    values = _Values(model, result, own)
    made = (dict(result.values()) if result else {}) | dict(own)
    if "residual" in kept:
        made |= _rescaled(model.arch, kept["residual"], shares or {}, values)
    for axis, flags in kept.items():
        if wide:
            made |= _zeroed(model.arch, axis, flags, values)
        elif axis.startswith("kv."):
            cuts, moved = _heads(model.arch, axis, flags, values)
            yield from cuts
            made |= moved
        elif not bool(flags.all()):
            yield Keep(axis, tuple(flags.nonzero().flatten().tolist()))
    for name, value in made.items():
        yield Overwrite(name, value)


def _rescaled(
    arch: Arch, stays: torch.Tensor, shares: EnergyShares, values: _Values
) -> dict[str, Callable[[], torch.Tensor]]:
    """Rescales norms and embeddings of a model with fewer residual channels.

    A norm over the channels that stay divides by their root mean square; with its shares known, its
    gain is multiplied by what that has grown by, so that they come out as large as before. Where
    embeddings are scaled by the size of the residual states, they make up for it, and so does the
    final norm for a head that is tied to them.
    """
    growth = (arch.sizes["residual"] / int(stays.sum())) ** 0.5
    scaled = arch.table.scaled_embeddings
    tied = any(tensor.role == "head" and tensor.tied_to for tensor in arch.tensors)
    found: dict[str, Callable[[], torch.Tensor]] = {}
    for tensor in arch.stored():
        factor, offset = 1.0, 0.0
        if (tensor.layer, tensor.role) in shares and arch.table.norm == "rms":
            left = float(shares[tensor.layer, tensor.role][stays].sum())
            factor, offset = growth * left**0.5, arch.table.norm_offset
        if scaled and tensor.role == "embed":
            factor = growth
        elif scaled and tied and tensor.role == "norm.final":
            factor, offset = factor / growth, arch.table.norm_offset
        if factor != 1.0:
            found[tensor.name] = partial(_scaled, values, tensor.name, factor, offset)
    return found


def _scaled(values: _Values, name: str, factor: float, offset: float) -> torch.Tensor:
    stored = values(name)
    return ((stored.double() + offset) * factor - offset).to(stored.dtype)


def _zeroed(
    arch: Arch, axis: str, flags: torch.Tensor, values: _Values
) -> dict[str, Callable[[], torch.Tensor]]:
    """Zeroes a removed unit in every tensor that holds it."""
    if bool(flags.all()):
        return {}
    axes = unit_axes(arch, axis)
    found: dict[str, Callable[[], torch.Tensor]] = {}
    for tensor in arch.using(axis):
        stays = spread(flags, tensor, axes, arch)
        if not bool(stays.all()):
            found[tensor.name] = partial(_masked, values, tensor.name, stays)
    return found


def _masked(values: _Values, name: str, stays: torch.Tensor) -> torch.Tensor:
    value = values(name)
    return torch.where(stays, value, torch.zeros((), dtype=value.dtype))


def _heads(
    arch: Arch, axis: str, flags: torch.Tensor, values: _Values
) -> tuple[list[Edit], dict[str, Callable[[], torch.Tensor]]]:
    """Cuts groups, and heads in each group.

    A cut keeps the same places in every group. Where groups keep other heads than each other, the
    kept ones are moved to the front first: which head of a group comes first changes nothing.
    """
    layer = int(axis.partition(".")[2])
    heads = flags.view(len(flags), -1)
    groups = heads.any(1)
    cuts: list[Edit] = []
    if not bool(groups.all()):
        cuts.append(Keep(axis, tuple(groups.nonzero().flatten().tolist())))
    own = heads[groups]
    left = int(own[0].sum())
    if left == heads.shape[1]:
        return cuts, {}
    if bool((own == own[0]).all()):
        return [*cuts, Keep(f"group.{layer}", tuple(own[0].nonzero().flatten().tolist()))], {}
    cuts.append(Keep(f"group.{layer}", tuple(range(left))))
    order = torch.argsort(heads.int(), dim=1, descending=True, stable=True)
    moved: dict[str, Callable[[], torch.Tensor]] = {
        tensor.name: partial(_moved, values, tensor, order, layer, arch)
        for tensor in arch.using(f"group.{layer}")
    }
    return cuts, moved


def _moved(
    values: _Values, tensor: Tensor, order: torch.Tensor, layer: int, arch: Arch
) -> torch.Tensor:
    return reordered(values(tensor.name), tensor, order, layer, arch)


def log(
    arch: Arch, kept: Kept, scores: Mapping[str, torch.Tensor], result: SequentialResult | None
) -> Any:
    """Logs the removed units and the error of each projection's output, as JSON."""
    found: dict[str, Any] = {
        "removed": {
            axis: (~flags).flatten().nonzero().flatten().tolist()
            for axis, flags in kept.items()
            if not bool(flags.all())
        },
        "width": {},
    }
    for axis, flags in kept.items():
        own = found["width"].setdefault(axis.split(".")[0], {"units": 0, "kept": 0})
        own["units"] += flags.numel()
        own["kept"] += int(flags.sum())
    if result is not None:
        found["refits"] = list(_refits(arch, result))
        errors: list[list[float]] = [[] for _ in range(arch.layers)]
        for row in found["refits"]:
            if row["error"] is not None:
                errors[row["layer"]].append(row["error"])
        found["block_scores"] = [sum(own) / len(own) if own else None for own in errors]
        found["block_score_name"] = "share of the projections' output lost"
    elif scores:
        shares: list[list[float]] = [[] for _ in range(arch.layers)]
        for axis, flags in kept.items():
            if axis in scores and "." in axis:
                own_scores = scores[axis].double().cpu()
                whole = float(own_scores.sum())
                if whole > 0:
                    lost = float(own_scores[~flags].sum()) / whole
                    shares[int(axis.split(".")[1])].append(lost)
        if any(shares):
            found["block_scores"] = [sum(own) / len(own) if own else None for own in shares]
            found["block_score_name"] = "share of the score removed"
    return found


def _refits(arch: Arch, result: SequentialResult) -> Iterator[dict[str, Any]]:
    for layer, logs in enumerate(result.logs):
        for group in linear_groups(arch, layer):
            if axis_of(arch, group) is not None and group.name in logs:
                own = logs[group.name]
                yield {
                    "layer": layer,
                    "site": group.name,
                    **{key: own[key] for key in ("error", "cut_error", "ridge", "towards")},
                }
