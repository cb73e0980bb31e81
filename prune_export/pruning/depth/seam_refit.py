"""Refits the last projection before removed blocks, so that it makes up for them.

When blocks go, what leaves the block before them is not what the block after them knows. The last
projection before them is refitted by ridge regression, so that it gives what they gave as well, as
far as that is linear in its inputs. No matrix is added, and what is kept of the rest stays as it
is. ADR 0021 has the measurements.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Collection, Mapping
from functools import partial
from typing import Annotated, Any, Final, Literal, Protocol

import torch
from pydantic import Field

from prune_export.arch import Arch
from prune_export.calibrate import (
    OUTPUTS,
    SEAM_STATES,
    CutModel,
    ExtraPass,
    ModelView,
    Part,
    Repaired,
    Seam,
    Unit,
    added_times,
    has_target,
    inputs_of,
    linear_groups,
    seams_of,
)
from prune_export.calibrate.passes.seam_fit import HELD_ROWS
from prune_export.contracts import Decision
from prune_export.errors import PlanError
from prune_export.surgery import Drop, Edit, Overwrite

Refit = Annotated[
    Literal["auto"] | bool,
    Field(
        description="Refit the projection before each seam, so that it gives what the removed "
        "blocks gave as well (ridge regression on the calibration windows). `auto` does it where "
        "the stage has data, and keeps it where the loss on held-out windows is lower. Not in "
        "families that normalize outputs before they are added (Gemma 2 and 3, OLMo 2)."
    ),
]

_NORMED: Final = "a {} model normalizes or turns what is added to its residual states"


class KnowsSeams(Protocol):
    """A depth method that says in the plan where its removed blocks will leave seams."""

    @property
    def refit(self) -> Literal["auto"] | bool:
        """Its recipe key: whether projections are refitted."""

    def seams_known(self, arch: Arch) -> tuple[Seam, ...] | None:
        """The seams (places where blocks are removed) that are known without data, else None."""

    def seams_at_most(self, arch: Arch) -> str:
        """An upper bound on the number of seams, in words."""


class Refits:
    """Adds the recipe key `refit` to depth methods: refit the projection before removed blocks."""

    refit: Refit

    @property
    def needs_data(self) -> bool:
        """Whether the stage needs calibration data: the recipe demands a refit."""
        return self.refit is True

    def passes_with_data(self, arch: Arch) -> tuple[ExtraPass, ...]:
        """The calibration pass of the refit, which is made where the stage has data.

        Raises:
            PlanError: a refit is demanded, and this family cannot have one.
        """
        if self.refit is True and added_times(arch) is None:
            raise PlanError(
                "refit",
                f"got true, but {_NORMED.format(arch.family)}",
                "write `refit: auto`, or leave it out",
            )
        if not self.refit or added_times(arch) is None:
            return ()
        widths = [
            inputs_of(arch, group.tensors[0]) + 1
            for layer in range(arch.layers)
            for group in linear_groups(arch, layer)
            if has_target(group)
        ]
        widest, residual = max(widths), arch.sizes["residual"]
        # Sums in float32, and held-out rows; of a solve in float64 the damped sums, their factor
        # and two sides; a few matrices.
        both = widest + residual
        held = (20 * widest + 4 * HELD_ROWS) * both + 24 * widest * residual
        head = 8 * arch.sizes["vocab"] * residual
        return (ExtraPass(forwards=1.5, ram_bytes=max(held, head), states=SEAM_STATES),)

    def refit_note(self: KnowsSeams, arch: Arch) -> str:
        """Says in the plan what will be refitted where the stage has data."""
        if not self.refit:
            return ""
        if added_times(arch) is None:
            return f"no refit at the seams: {_NORMED.format(arch.family)}"
        known = self.seams_known(arch)
        if known is None:
            return f"refits {self.seams_at_most(arch)}"
        blocks = [str(seam.group.layer) for seam in known if seam.group is not None]
        if not blocks:
            return "no refit: no projection stands before what is removed"
        return f"refits {_count(len(blocks))}, block{'s' * (len(blocks) > 1)} {', '.join(blocks)}"

    def refitted(self, model: ModelView, decision: Decision, removed: Collection[Unit]) -> Decision:
        """Adds refitted projections to a decision, where that is better, and logs what was done.

        `removed` are the units whose work is to be done by what stands before them.
        """
        if self.refit is False:
            return decision
        arch = model.arch
        if added_times(arch) is None:
            return _told(decision, {"taken": False, "why": _NORMED.format(arch.family)})
        if model.context is None:
            return _told(decision, {"taken": False, "why": "the stage has no calibration data"})
        edits = tuple(decision.edits)
        found = seams_of(arch, removed, partial(_is_zero, model))
        mendable = [seam for seam in found if seam.group is not None]
        log: dict[str, Any] = {"taken": False}
        if len(mendable) < len(found):
            log["left"] = [
                {"removed": [unit.layer for unit in seam.removed], "why": seam.why}
                for seam in found
                if seam.group is None
            ]
        samples = model.context.tokens.samples
        if not mendable:
            return _told(decision, {**log, "why": found[0].why if found else "nothing is removed"})
        if self.refit == "auto" and samples < 2:
            return _told(decision, {**log, "why": "there is one window, and none to hold out"})
        repaired = model.repair(mendable, _cut_model(edits, decision.log))
        log |= {
            "seams": [dict(one) for one in repaired.logs],
            "tokens": repaired.tokens,
            "held_out_tokens": repaired.held_out_tokens,
            "held_out_loss": list(repaired.loss) if repaired.loss else None,
        }
        why = _why_not(self.refit, repaired)
        if why:
            return _told(decision, {**log, "why": why})
        log["taken"] = True
        return _told(dataclasses.replace(decision, edits=_with(edits, repaired)), log)


def _count(seams: int) -> str:
    return f"{seams} seam{'' if seams == 1 else 's'}"


def at_most(seams: int) -> str:
    """Words an upper bound on the number of seams."""
    return _count(1) if seams == 1 else f"up to {_count(seams)}"


def seams_listed(arch: Arch, layers: Collection[int], part: Part) -> tuple[Seam, ...]:
    """The seams of listed blocks, found without weights: no part is known to be zero."""
    return seams_of(arch, [Unit(layer, part) for layer in layers], lambda _layer, _part: False)


def _why_not(refit: Literal["auto"] | bool, repaired: Repaired) -> str:
    if not repaired.names:
        return "no ridge made the states truer on held-out windows"
    if refit == "auto" and repaired.loss and not repaired.loss[1] < repaired.loss[0]:
        return "the loss on held-out windows is not lower"
    return ""


def _cut_model(edits: Collection[Edit], log: Mapping[str, Any]) -> CutModel:
    dropped = {layer for edit in edits if isinstance(edit, Drop) for layer in edit.layers}
    values = {edit.tensor: edit.value for edit in edits if isinstance(edit, Overwrite)}
    return CutModel(frozenset(dropped), values, json.dumps(log.get("folded", {}), sort_keys=True))


def _with(edits: Collection[Edit], repaired: Repaired) -> tuple[Edit, ...]:
    """Replaces the edits of refitted tensors by the refitted values."""
    others = [
        edit
        for edit in edits
        if not (isinstance(edit, Overwrite) and edit.tensor in repaired.names)
    ]
    return (*others, *(Overwrite(name, partial(repaired.read, name)) for name in repaired.names))


def _told(decision: Decision, log: Mapping[str, Any]) -> Decision:
    return dataclasses.replace(decision, log={**decision.log, "refit": dict(log)})


def _is_zero(model: ModelView, layer: int, part: Part) -> bool:
    """Whether a part of a block adds nothing: its output projection is zero."""
    return not any(
        bool(torch.count_nonzero(model.checkpoint.read_finite(tensor.name)))
        for tensor in model.arch.block(layer)
        if tensor.role in OUTPUTS[part]
    )
