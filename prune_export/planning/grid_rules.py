"""Refuses recipes that quantize weights and then lose what was won by it."""

from __future__ import annotations

from prune_export.errors import PlanError
from prune_export.exporter_facts import ExporterFacts
from prune_export.recipe import Recipe


def refuse_lost_grids(recipe: Recipe) -> None:
    """Refuses stages after a quantizer, and integer exports of other bits than its.

    Raises:
        PlanError: the first of them, with what to write instead.
    """
    stages = recipe.stages
    found = next((at for at, stage in enumerate(stages) if stage.kind == "quantize"), None)
    if found is None:
        return
    quantizer = stages[found]
    for at, stage in list(enumerate(stages))[found + 1 :]:
        raise PlanError(
            f"{recipe.name}  stages.{at}.{stage.kind}: {stage.name}",
            f"comes after {quantizer.name} (stages.{found}), and would move weights off their grid",
            f"put `quantize: {{method: {quantizer.name}}}` last",
        )
    bits = getattr(quantizer.entry, "bits", None)
    for at, export in enumerate(recipe.export):
        precision = export.parameters().get("precision")
        codes = {"int4": 4, "int8": 8}.get(str(precision))
        if bits and codes and codes != bits and ExporterFacts.of(type(export.entry)).writes_codes:
            raise PlanError(
                f"{recipe.name}  export.{at}.{export.name}.precision",
                f"is {precision}, and {quantizer.name} puts weights on grids of {bits} bits",
                f"write `precision: int{bits}`, or `bits: {codes}` in the quantize stage",
            )
