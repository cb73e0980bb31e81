"""Refuses, in the plan, settings and machines that TensorRT cannot build for."""

from __future__ import annotations

import re
from typing import Final

from prune_export.errors import PlanError
from prune_export.exporters.tensorrt.binding import FEATURES, Flavor
from prune_export.machine import Machine

CURRENT: Final = "current"
_AMPERE: Final = 80
_SM: Final = re.compile(r"sm(\d+)")
_HOPPER: Final = frozenset({90, 100, 103})
_LEAST: Final = {"bf16": (80, "Ampere"), "fp8": (89, "Ada")}
"""The oldest GPUs that compute in a precision."""


def refuse_settings(
    flavor: Flavor, target: str, *, sparse: bool, precision: str, version_compatible: bool
) -> None:
    """Refuses recipe keys that contradict each other.

    Raises:
        PlanError: they do.
    """
    if flavor == "tensorrt" and target != CURRENT:
        raise PlanError(
            "tensorrt.compute_capability",
            f"got {target!r}, but TensorRT chooses kernels by timing them on the GPU itself",
            "build on that GPU, or write `flavor: rtx`",
        )
    if version_compatible and flavor == "rtx":
        raise PlanError(
            "tensorrt.version_compatible",
            "TensorRT-RTX has no lean runtime to put into the engine",
            "leave it out: the engine runs with the version that built it",
        )
    if target != CURRENT:
        known = FEATURES["rtx", 1].targets
        number = _number(target)
        if target not in known and number not in _HOPPER:
            raise PlanError(
                "tensorrt.compute_capability",
                f"got {target!r}, expected one of {', '.join(known)}",
                "write the GPU's compute capability without its dot: `sm89` for 8.9",
            )
        _refuse_gpu(flavor, number, f"{target} is", sparse=sparse, precision=precision)


def refuse_machine(
    flavor: Flavor, target: str, machine: Machine, *, sparse: bool, precision: str
) -> None:
    """Refuses a machine that cannot build the engine.

    Raises:
        PlanError: it has no GPU where one is needed, or one that cannot run the engine.
    """
    if target != CURRENT:
        return
    if machine.device != "cuda":
        raise PlanError(
            f"tensorrt  flavor: {flavor}",
            "builds for the GPU of this machine, and there is none (or `--device cpu` hides it)",
            "run it on the machine with the GPU, or write `flavor: rtx` and the GPU's "
            "`compute_capability: sm89` to build ahead",
        )
    who = f"this GPU (compute capability {machine.capability / 10:g}) is"
    _refuse_gpu(flavor, machine.capability, who, sparse=sparse, precision=precision)


def _refuse_gpu(flavor: Flavor, number: int, who: str, *, sparse: bool, precision: str) -> None:
    if flavor == "rtx" and number in _HOPPER:
        raise PlanError(
            "tensorrt  flavor: rtx",
            f"{who} a data-centre GPU, and TensorRT-RTX has no kernels for those "
            "(Hopper, data-centre Blackwell)",
            "write `flavor: tensorrt` and build on that GPU",
        )
    if sparse and number < _AMPERE:
        raise PlanError(
            "tensorrt.sparse",
            f"{who} older than Ampere, whose tensor cores were the first to skip zeros",
            "write `sparse: false`, or choose another GPU",
        )
    least, family = _LEAST.get(precision, (0, ""))
    if number < least:
        raise PlanError(
            "tensorrt.precision",
            f"{who} older than {family}, the first to compute in {precision}",
            "write `precision: fp16`, or `int8`"
            if precision == "fp8"
            else "write `precision: fp16`",
        )


def _number(target: str) -> int:
    match = _SM.fullmatch(target)
    return int(match.group(1)) if match else 0
