"""The calibration passes of width methods: one that only scores, one that also cuts and refits."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Any

import torch

from prune_export.arch import Arch
from prune_export.calibrate import Edited, LinearGroup, SequentialResult, has_target, linear_groups
from prune_export.calibrate.streaming.linear_groups import Accumulator
from prune_export.errors import StageError
from prune_export.pruning.linalg.refit import Products, refit
from prune_export.pruning.width.scorer import ExpertScorer, StateScorer
from prune_export.pruning.width.unit_choice import chosen, units_cut
from prune_export.pruning.width.unit_layout import spread, unit_axes, unit_shape
from prune_export.pruning.width.width_sizes import Part


def axis_of(arch: Arch, group: LinearGroup) -> str | None:
    """The axis of the units that are inputs of an output projection; None of other groups."""
    match group.kind:
        case "mlp.out":
            return f"mlp.{group.layer}"
        case "shared.out":
            return f"shared.{group.layer}"
        case "experts.out":
            return f"moe.{group.layer}.{group.expert}"
        case "attention.out":
            return f"kv.{group.layer}"
    return None


@dataclass
class _Seen:
    """The accumulators of a linear group: one for scores, one for the refit."""

    scored: Accumulator | None = None
    products: Products | None = None

    def see(self, states: torch.Tensor) -> None:
        for one in (self.scored, self.products):
            if one is not None:
                one.see(states)

    def see_with_target(
        self, states: torch.Tensor, wanted: torch.Tensor, weights: torch.Tensor
    ) -> None:
        if self.scored is not None:
            self.scored.see(states)
        if self.products is not None:
            self.products.see_with_target(states, wanted, weights)


@dataclass(frozen=True)
class Measure:
    """An editor that scores every linear group with units to cut, and edits nothing.

    `parts` are the parts of the model that are cut; `method` identifies who asks.
    """

    scorer: StateScorer
    parts: frozenset[Part]
    arch: Arch
    method: str

    @property
    def key(self) -> str:
        return _key("measure", self.method, {})

    def watch(self, group: LinearGroup, width: int, device: str) -> _Seen | None:
        units = self._units(group, width)
        if not units:
            return None
        return _Seen(self.scorer.watch(group, units, width, device))

    def edit(self, group: LinearGroup, weights: Mapping[str, torch.Tensor], seen: _Seen) -> Edited:
        width = next(iter(weights.values())).shape[1]
        units = self._units(group, width)
        scores = _scored(self.scorer, group, weights, units, seen)
        log: dict[str, Any] = {"scores": scores.double().tolist()}
        if group.kind == "experts.out" and "experts" in self.parts:
            log["expert"] = float(scores.sum())
            if isinstance(self.scorer, ExpertScorer):
                log["expert"] = self.scorer.score_expert(group, weights, scores, seen.scored)
        return Edited(log=log)

    def _units(self, group: LinearGroup, width: int) -> int:
        parts = self.parts
        if group.kind.endswith(".in"):
            return width if "hidden" in parts else 0
        if group.kind == "attention.out":
            wanted = parts & {"heads", "kv_groups"}
        else:
            wanted = parts & {"ffn", "experts"} if group.expert is not None else parts & {"ffn"}
        axis = axis_of(self.arch, group)
        return prod(unit_shape(self.arch, axis)) if wanted and axis else 0


def added(
    arch: Arch, known: Mapping[str, torch.Tensor], measured: SequentialResult
) -> dict[str, torch.Tensor]:
    """Adds the scores of a measuring pass to those known before."""
    found: dict[str, torch.Tensor] = {}

    def add(axis: str, scores: Any) -> None:
        own = torch.tensor(scores, dtype=torch.float64).view(unit_shape(arch, axis))
        found[axis] = found[axis] + own if axis in found else own

    for layer, logs in enumerate(measured.logs):
        experts = []
        for group in linear_groups(arch, layer):
            log = logs.get(group.name)
            if log is None:
                continue
            axis = axis_of(arch, group)
            # An expert sees a part of the tokens: all of a block's count as one group.
            share = 1 / arch.sizes[f"expert.{layer}"] if group.expert is not None else 1.0
            if axis is None:
                add("residual", [share * score for score in log["scores"]])
            else:
                add(axis, log["scores"])
            if "expert" in log:
                experts.append(log["expert"])
        if experts:
            add(f"expert.{layer}", experts)
    return {axis: found[axis] + known[axis] if axis in known else found[axis] for axis in found} | {
        axis: scores for axis, scores in known.items() if axis not in found
    }


@dataclass(frozen=True)
class Cut:
    """An editor that zeroes the removed inputs of output projections, and refits these.

    `kept` is what has been chosen before; what is not there is chosen when its inputs have been
    seen: then `scorer` is not None. `shape` is the samples and length of the windows. With `always`
    a refit is kept unjudged; `method` identifies who asks.
    """

    scorer: StateScorer | None
    arch: Arch
    sizes: Mapping[str, int]
    known: Mapping[str, torch.Tensor]
    kept: Mapping[str, torch.Tensor]
    shape: Sequence[int]
    always: bool
    method: str

    @cached_property
    def axes(self) -> frozenset[str]:
        """The axes along which units are cut."""
        return frozenset(units_cut(self.arch, self.sizes))

    @property
    def key(self) -> str:
        return _key("cut", self.method, {**self.known, **self.kept})

    def watch(self, group: LinearGroup, width: int, device: str) -> _Seen | None:
        axis = axis_of(self.arch, group)
        if axis is None or axis not in self.axes:
            return None
        if axis in self.kept and bool(self.kept[axis].all()):
            return None
        scored = None
        if axis not in self.kept and self.scorer is not None:
            units = prod(unit_shape(self.arch, axis))
            scored = self.scorer.watch(group, units, width, device)
        products = Products(
            width,
            device,
            tokens=prod(self.shape),
            samples=self.shape[0],
            whole=group.expert is None,
        )
        return _Seen(scored, products)

    def edit(self, group: LinearGroup, weights: Mapping[str, torch.Tensor], seen: _Seen) -> Edited:
        ((name, weight),) = weights.items()
        axis = axis_of(self.arch, group)
        assert axis is not None
        assert seen.products is not None
        if axis in self.kept:
            kept = self.kept[axis]
        else:
            kept = chosen(self.arch, axis, self._scores(group, axis, weights, seen), self.sizes)
        columns = spread(kept, group.tensors[0], unit_axes(self.arch, axis), self.arch).flatten()
        found = refit(
            weight,
            columns.to(weight.device),
            seen.products,
            always=self.always,
        )
        log = {
            "kept": kept.flatten().nonzero().flatten().tolist(),
            "error": found.error,
            "cut_error": found.cut,
            "ridge": found.ridge,
            "towards": "own" if seen.products.crossed is None else "dense",
        }
        return Edited({name: found.weight}, log)

    def _scores(
        self, group: LinearGroup, axis: str, weights: Mapping[str, torch.Tensor], seen: _Seen
    ) -> torch.Tensor:
        shape = unit_shape(self.arch, axis)
        units = prod(shape)
        assert self.scorer is not None
        scores = _scored(self.scorer, group, weights, units, seen).double().cpu().view(shape)
        return scores + self.known[axis] if axis in self.known else scores


def kept_in(arch: Arch, result: SequentialResult) -> dict[str, torch.Tensor]:
    """The units that a cutting pass kept, by axis."""
    found = {}
    for layer, logs in enumerate(result.logs):
        for group in linear_groups(arch, layer):
            axis = axis_of(arch, group)
            if axis is not None and group.name in logs:
                flags = torch.zeros(prod(unit_shape(arch, axis)), dtype=torch.bool)
                flags[logs[group.name]["kept"]] = True
                found[axis] = flags.view(unit_shape(arch, axis))
    return found


def refit_bytes(arch: Arch, axes: Mapping[str, int], *, dense: bool) -> int:
    """The bytes that a cutting pass holds beyond states and blocks: Hessians, and a float64 solve.

    With `dense` those of targets too: they are held of both groups of a block, as matrices are.
    """
    cut = frozenset(units_cut(arch, axes))
    residual, most = arch.sizes["residual"], 0
    for layer in range(arch.layers):
        squares, crossed = [], 0
        for group in linear_groups(arch, layer):
            if axis_of(arch, group) in cut:
                width = prod(arch.shape(group.tensors[0])) // residual
                squares.append(width**2)
                crossed += 4 * residual * width if dense and has_target(group) else 0
        if squares:
            most = max(most, 4 * sum(squares) + 28 * max(squares) + crossed)
    return most


def _scored(
    scorer: StateScorer,
    group: LinearGroup,
    weights: Mapping[str, torch.Tensor],
    units: int,
    seen: _Seen,
) -> torch.Tensor:
    """Scores a linear group's inputs, `[units]`.

    Raises:
        StageError: it gives another number of them, or some that are not numbers.
    """
    scores = scorer.score(group, weights, units, seen.scored)
    missing = int(scores.isnan().sum())
    if scores.shape != (units,) or missing:
        raise StageError(
            f"{type(scorer).__name__}.score at {group.name} of block {group.layer}",
            f"got scores {list(scores.shape)}, {missing} of them NaN, expected [{units}] numbers: "
            "one of each unit",
            "sum the scores of a unit's inputs: `scores.view(units, -1).sum(1)`",
        )
    return scores


def _key(kind: str, method: str, scores: Mapping[str, torch.Tensor]) -> str:
    digest = hashlib.sha256()
    for axis, values in scores.items():
        digest.update(axis.encode())
        digest.update(values.contiguous().cpu().numpy().tobytes())
    return json.dumps([kind, method, digest.hexdigest()])
