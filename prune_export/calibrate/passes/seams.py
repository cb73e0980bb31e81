"""Finds the seams (places where layers were removed) and the order in which a pass refits them.

A seam is where something was removed: what stands before it gives states that what stands after it
does not know. The last projection before it that is left can give what left the last removed part
in the dense model. That goal is known only when the dense model's states have passed what was
removed, so the edited model's wait before the block with that projection until then.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Final

from prune_export.arch import Arch
from prune_export.calibrate.passes.dense_reference import MIXERS, has_target
from prune_export.calibrate.streaming.linear_groups import LinearGroup, linear_groups
from prune_export.calibrate.streaming.skip import Part, Unit

_KINDS: Final[Mapping[Part, tuple[str, ...]]] = {"attention": MIXERS, "mlp": ("mlp.out",)}


@dataclass(frozen=True)
class Seam:
    """Adjacent removed parts, the projection before them to refit, and the place of its target.

    The goal are the dense model's residual states where `goal` ends: a block, or its attention.
    `group` is None where nothing before it can be refitted; `why` then says so.
    """

    removed: tuple[Unit, ...]
    goal: Unit
    group: LinearGroup | None
    why: str = ""


@dataclass(frozen=True)
class Step:
    """One step of the pass: a block in memory, and the hidden states that go through it.

    `forks`: before it, the edited model's states become their own; until then both are the same.
    `mends` is the seam before which the edited model's block stands.
    """

    layer: int
    dense: bool = False
    edited: bool = False
    forks: bool = False
    mends: Seam | None = None


def seams_of(
    arch: Arch, removed: Collection[Unit], is_zero: Callable[[int, Part], bool]
) -> tuple[Seam, ...]:
    """Finds the seams that removing these units leaves, from the first to the last.

    `is_zero` says that a part of a block that stays adds nothing: earlier stages may have zeroed
    it. Of blocks whose parts are added to the same states, a part that stays stands before one that
    goes: it can make good what that gave.
    """
    gone = {(unit.layer, part) for unit in removed for part in _parts(unit)}
    order = list(_order(arch, gone))
    found: list[tuple[Unit | None, list[Unit]]] = []
    for at, half in enumerate(order):
        if (half.layer, half.part) not in gone:
            continue
        if at and found and found[-1][1][-1] == order[at - 1]:
            found[-1][1].append(half)
            continue
        stays = (
            one
            for one in reversed(order[:at])
            if (one.layer, one.part) not in gone and not is_zero(one.layer, one.part)
        )
        before = next(stays, None)
        if found and found[-1][0] == before:
            found[-1][1].append(half)
        else:
            found.append((before, [half]))
    return tuple(_seam(arch, before, run, gone) for before, run in found)


def steps(layers: int, dropped: Collection[int], seams: Collection[Seam], first: int) -> list[Step]:
    """Plans the order in which blocks are loaded; both models are the same before `first`.

    The dense model's states go no further than the last goal.
    """
    mended = {seam.group.layer: seam for seam in seams if seam.group is not None}
    last = max((seam.goal.layer for seam in mended.values()), default=-1)
    made = [Step(layer, dense=True) for layer in range(first)]
    dense, forked = first, False
    for layer in range(first, layers):
        if layer in dropped:
            continue
        seam = mended.get(layer)
        if seam is not None:
            for ahead in range(dense, seam.goal.layer + 1):
                made.append(Step(ahead, dense=True, forks=not forked))
                forked = True
            dense = max(dense, seam.goal.layer + 1)
            made.append(Step(layer, edited=True, mends=seam))
        else:
            both = dense == layer and layer <= last
            made.append(Step(layer, dense=both, edited=True, forks=not forked))
            dense += both
        forked = True
    return made


def _order(arch: Arch, gone: Collection[tuple[int, Part]]) -> Iterator[Unit]:
    """The parts (attention, MLP) of all blocks, in the order in which their outputs are added."""
    parts: tuple[Part, Part] = ("attention", "mlp")
    for layer in range(arch.layers):
        own = parts
        if arch.parallel and (layer, "attention") in gone:
            own = ("mlp", "attention")
        for part in own:
            yield Unit(layer, part)


def _parts(unit: Unit) -> tuple[Part, ...]:
    return ("attention", "mlp") if unit.part == "block" else (unit.part,)


def _seam(
    arch: Arch, before: Unit | None, run: list[Unit], gone: Collection[tuple[int, Part]]
) -> Seam:
    last = run[-1]
    # Where an MLP comes after, the goal lies inside of the block.
    inside = last.part == "attention" and not arch.parallel
    goal = Unit(last.layer, "attention" if inside else "block")
    removed = _whole(run)
    if before is None:
        return Seam(removed, goal, None, "no projection stands before it")
    groups = {group.kind: group for group in linear_groups(arch, before.layer) if has_target(group)}
    group = _first(groups, before.part)
    if group is None and (before.layer, "attention") not in gone:
        # Experts: what the block's attention gives is refitted, as if they did not see it.
        group = _first(groups, "attention")
    if group is None:
        return Seam(removed, goal, None, "only experts stand before it")
    return Seam(removed, goal, group)


def _first(groups: Mapping[str, LinearGroup], part: Part) -> LinearGroup | None:
    return next((groups[kind] for kind in _KINDS[part] if kind in groups), None)


def _whole(run: list[Unit]) -> tuple[Unit, ...]:
    """Joins both parts of one block into that block."""
    halves = {(unit.layer, unit.part) for unit in run}
    found = []
    for layer in sorted({unit.layer for unit in run}):
        own: list[Part] = [part for part in ("attention", "mlp") if (layer, part) in halves]
        found += [Unit(layer)] if len(own) == 2 else [Unit(layer, part) for part in own]
    return tuple(found)
