"""What models are to say, as steps of a plan: data that are none yet."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from prune_export.arch import Arch
from prune_export.checkpoint import Checkpoint
from prune_export.errors import PruneExportError
from prune_export.generated import talk_of
from prune_export.machine import Machine
from prune_export.planning.data import sets_of
from prune_export.planning.planned import PlannedStage
from prune_export.planning.positions import refuse_long_text
from prune_export.recipe import Generated, Recipe


def talks_of(
    recipe: Recipe,
    model: Checkpoint,
    dense: Arch,
    machine: Machine,
    planned: Callable[..., PlannedStage],
) -> Iterator[PlannedStage]:
    """Plans the answers of each generated source; `planned` makes a step of what it costs.

    Raises:
        PruneExportError: one cannot be asked for, with the name of the data.
    """
    for name, _ in sets_of(recipe):
        source = recipe.data[name]
        if not isinstance(source, Generated):
            continue
        refuse_long_text(f"data.{name}.length", source.length, dense.config)
        try:
            talk = talk_of(source, model, dense, recipe.root, machine)
        except PruneExportError as error:
            where = f"{recipe.name}  data.{name}"
            raise type(error)(where, f"{error.where}: {error.problem}", error.fix) from None
        keys, note = source.generated.model_dump(mode="json"), f"{name}: {talk.note}"
        yield planned("ask", talk.name, keys, talk.arch, talk.arch, talk.cost, note)
