"""Chooses the weights that get an adapter, by the architecture's table."""

from __future__ import annotations

from typing import Final

from prune_export.arch import Arch, Tensor
from prune_export.arch.roles import CONTROLS, is_fused
from prune_export.arch.roles import is_expert as is_expert_role
from prune_export.errors import PlanError, did_you_mean

_NOT: Final = CONTROLS | {"router", "shared.router"}
"""What chooses experts, and what controls a recurrence."""
_FFN_AXES: Final = frozenset({"mlp", "moe", "shared"})


def linear_weights(arch: Arch) -> tuple[Tensor, ...]:
    """Lists the blocks' linear layers' weights, experts included; routers and controls not."""
    return tuple(
        tensor
        for tensor in arch.tensors
        if tensor.layer is not None
        and len(tensor.dims.of) == 2
        and tensor.role not in _NOT
        and tensor.role not in arch.table.unadapted
        and not tensor.role.endswith(".bias")
    )


def is_expert(tensor: Tensor) -> bool:
    """Whether a weight is one expert's of a mixture; transformers stacks those of a block."""
    return is_expert_role(tensor.role)


def stacks_experts(arch: Arch) -> bool:
    """Whether a model has experts, which transformers stacks; some are stored so too."""
    return any(is_expert(tensor) or is_fused(tensor.role) for tensor in arch.tensors)


def targets(which: str | tuple[str, ...], arch: Arch) -> tuple[Tensor, ...]:
    """Chooses the weights that get an adapter, in the order of the model.

    Raises:
        PlanError: a role does not exist, nothing matches, or a match is an expert of a mixture.
    """
    weights = linear_weights(arch)
    roles = list(dict.fromkeys(tensor.role for tensor in weights))
    if which == "all":
        chosen = weights
    elif which == "all_but_experts":
        chosen = tuple(tensor for tensor in weights if not is_expert(tensor))
    elif which == "ffn":
        chosen = tuple(tensor for tensor in weights if _axes(tensor) & _FFN_AXES)
    else:
        unknown = [role for role in which if role not in roles]
        if unknown:
            raise PlanError(
                "targets",
                f"this {arch.family} model has no linear weight of the role `{unknown[0]}`",
                did_you_mean(unknown[0], roles),
            )
        chosen = tuple(tensor for tensor in weights if tensor.role in which)
    whole = which in ("all", "ffn") and stacks_experts(arch)
    if whole or any(is_expert(tensor) for tensor in chosen):
        rest = [role for role in roles if not is_expert_role(role)]
        raise PlanError(
            "targets",
            f"`{which if isinstance(which, str) else ', '.join(which)}` takes in the experts of "
            f"this {arch.family} model, which share one stacked tensor and get no adapter",
            f"write `targets: [{', '.join(rest)}]`, which `all_but_experts` stands for; "
            "`method: full` trains experts too",
        )
    if not chosen:
        raise PlanError(
            "targets",
            f"`{which}` matches no linear weight of this {arch.family} model",
            f"write roles it has: [{', '.join(roles)}]",
        )
    return chosen


def _axes(tensor: Tensor) -> frozenset[str]:
    return frozenset(axis.partition(".")[0] for axis in tensor.dims.axes())
