"""Chooses matrices to work on by the recipe keys `include`, `exclude` and `layers`."""

from __future__ import annotations

from collections.abc import Mapping
from math import gcd

from prune_export.arch import Arch, Tensor
from prune_export.arch.roles import is_fused
from prune_export.calibrate import LINEAR_GROUPS, linears
from prune_export.errors import PlanError, did_you_mean
from prune_export.sparsity.nm import Nm

Roles = tuple[str, ...]


def refuse_unknown_roles(include: Roles | None, exclude: Roles) -> None:
    """Refuses roles that no matrix of a linear group has.

    Raises:
        PlanError: the first of them.
    """
    for key, roles in (("include", include), ("exclude", exclude)):
        for role in roles or ():
            if role not in LINEAR_GROUPS:
                raise PlanError(
                    f"{key}: {role}",
                    "is not a role that can be pruned, "
                    f"expected some of {', '.join(f'`{known}`' for known in LINEAR_GROUPS)}",
                    did_you_mean(role, LINEAR_GROUPS),
                )


def chosen_matrices(
    arch: Arch, include: Roles | None, exclude: Roles, layers: tuple[int, ...] | None
) -> tuple[Tensor, ...]:
    """The matrices of the blocks that the keys `include`, `exclude` and `layers` choose.

    Raises:
        PlanError: a role or a block that the model does not have, or nothing is left.
    """
    every = tuple(linears(arch))
    roles = dict.fromkeys(tensor.role for tensor in every)
    for key, named in (("include", include), ("exclude", exclude)):
        for role in named or ():
            if role not in roles:
                raise PlanError(
                    f"{key}: {role}",
                    f"this model has none, expected some of "
                    f"{', '.join(f'`{known}`' for known in roles)}",
                    did_you_mean(role, roles),
                )
    for layer in layers or ():
        if layer >= arch.layers:
            raise PlanError(
                f"layers: {layer}",
                f"the model has {arch.layers} blocks",
                f"write numbers up to {arch.layers - 1}",
            )
    if include is None and any(is_fused(tensor.role) for tensor in arch.tensors):
        raise PlanError(
            f"model  {arch.family}",
            "has the experts of a block in one tensor on disk, most of its weights, and these "
            "cannot be worked on yet",
            f"write `include: [{', '.join(roles)}]` to leave its experts as they are",
        )
    wanted = set(roles if include is None else include) - set(exclude)
    found = tuple(
        tensor
        for tensor in every
        if tensor.role in wanted and (layers is None or tensor.layer in layers)
    )
    if not found:
        raise PlanError("include, exclude, layers", "leave nothing to prune", "exclude fewer roles")
    return found


def check_widths(nm: Nm, widths: Mapping[str, int]) -> None:
    """Refuses a pattern whose groups do not divide the inputs of a matrix.

    Raises:
        PlanError: the first such matrix, and what would do.
    """
    bad = [name for name, width in widths.items() if width % nm.of]
    if not bad:
        return
    common = 0
    for width in widths.values():
        common = gcd(common, width)
    offers = [
        f"`nm: {{keep: {of * nm.keep // nm.of}, of: {of}}}`"
        for of in range(nm.of, 1, -1)
        if common % of == 0 and of * nm.keep % nm.of == 0
    ]
    raise PlanError(
        bad[0],
        f"has {widths[bad[0]]} inputs, which groups of {nm.of} do not divide "
        f"({len(bad)} of {len(widths)} matrices)",
        (f"write {offers[0]}, or " if offers else "") + "`exclude` the role of these matrices",
    )
