"""A plan as the rows of a table, which the terminal and a notebook show."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from prune_export.units import text_from_bytes, text_from_count, text_from_seconds

if TYPE_CHECKING:
    from prune_export.planning.planned import Plan

COLUMNS: Final = ("step", "blocks", "parameters", "weights", "peak RAM", "disk", "about")


_DEVICE: Final = "each device"


def columns_of(planned: Plan) -> tuple[str, ...]:
    """The columns' names; a plan for devices that are not here has one for their memory."""
    return (*COLUMNS[:5], _DEVICE, *COLUMNS[5:]) if planned.devices.elsewhere else COLUMNS


def rows_of(planned: Plan) -> list[tuple[str, ...]]:
    """A row a step, as `columns_of` names its cells."""
    rows: list[tuple[str, ...]] = []
    for stage in planned.stages:
        change = f"{stage.after.layers}"
        if stage.before.layers != stage.after.layers:
            change = f"{stage.before.layers} → {stage.after.layers}"
        rows.append((
            f"{stage.kind}: {stage.name}" + (f" ({stage.note})" if stage.note else ""),
            change, text_from_count(stage.after.parameters), text_from_bytes(stage.after.bytes),
            text_from_bytes(stage.cost.ram_bytes),
            *([text_from_bytes(stage.cost.gpu_bytes)] if planned.devices.elsewhere else []),
            text_from_bytes(stage.cost.disk_bytes),
            text_from_seconds(stage.seconds),
        ))  # fmt: skip
    return rows


def title_of(planned: Plan) -> str:
    """The recipe, the model and its family."""
    return f"{planned.recipe} on {planned.model} ({planned.family})"


def sums_of(planned: Plan) -> str:
    """Peaks and sums of all steps, in one line."""
    gpu, devices = "", planned.devices
    on = f"with {planned.machine.threads} threads on {planned.machine.device}"
    if devices.elsewhere:
        on = f"on {devices.count} devices at {devices.flops / 1e12:g} TFLOP/s each"
    if planned.machine.device == "cuda":
        gpu = f", GPU memory {text_from_bytes(planned.peak_gpu_bytes)}"
    return (
        f"peak RAM {text_from_bytes(planned.peak_ram_bytes)}{gpu}, disk "
        f"{text_from_bytes(planned.disk_bytes)}, about {text_from_seconds(planned.seconds)} "
        f"{on}"
    )
