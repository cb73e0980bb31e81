"""Refuses models with states, for exporters whose caches hold keys and values only."""

from __future__ import annotations

from prune_export.arch import Arch
from prune_export.errors import PlanError


def has_states(arch: Arch) -> bool:
    """Whether a block keeps a state of its own: a convolution's inputs, or a recurrence."""
    return any(tensor.role == "linear.conv" for tensor in arch.tensors)


def refuse_states(where: str, arch: Arch) -> None:
    """Refuses models with blocks that keep states.

    Raises:
        PlanError: with the exporter that takes them.
    """
    if has_states(arch):
        raise PlanError(
            where,
            f"keeps keys and values between steps, and blocks of this {arch.family} model keep "
            "states of convolutions or recurrences instead",
            "use the exporter `onnx` on ONNX Runtime's own kernels, which takes it",
        )
