"""Refuses sequences that are longer than a model or its engine allows.

Models with learned positions (GPT-2, OPT) have a row for each, and there is no further. With rotary
ones `max_position_embeddings` is advice: text is refused beyond it, as losses mean little there,
and requests that are only timed are not. An engine may have a limit of its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from prune_export.arch import Arch
from prune_export.contracts import Bounded
from prune_export.errors import PlanError
from prune_export.recipe import Recipe


def refuse_long_text(where: str, length: int, config: Mapping[str, Any]) -> None:
    """Refuses windows of text that are longer than the model's context.

    Raises:
        PlanError: naming the longest that is possible.
    """
    for key in ("max_position_embeddings", "n_positions"):
        positions = config.get(key)
        if positions and length > positions:
            raise PlanError(
                where,
                f"is {length}, but the model has {positions} positions",
                f"write {positions} or less",
            )


def refuse_long_requests(recipe: Recipe, archs: tuple[Arch, ...]) -> None:
    """Refuses timed requests that are longer than the recipe's models and engines allow.

    Raises:
        PlanError: naming the phase, and the longest that is possible.
    """
    for where, prompt, new, engines in _requests(recipe):
        for arch in archs:
            for engine in engines or (None,):
                limit = engine.longest(arch.config) if isinstance(engine, Bounded) else None
                refuse_long_request(where, prompt, new, arch.positions, limit)


def refuse_long_request(
    where: str, prompt: int, new: int, positions: int | None, engine: int | None = None
) -> None:
    """Refuses a request whose prompt and new tokens do not fit into a model or its engine.

    `positions` are those that the model has learned, `engine` is the longest that its engine takes.
    Warm-up and the cache hold no more than the request itself.

    Raises:
        PlanError: naming the longest that is possible.
    """
    for limit, said in ((positions, "the model has {} positions"), (engine, "its engine takes {}")):
        if limit is not None and prompt + new > limit:
            raise PlanError(
                where,
                f"asks for {prompt} tokens and {new} new ones, but {said.format(limit)}",
                f"let prompt and new tokens be {limit} together at most",
            )


def _requests(recipe: Recipe) -> Iterator[tuple[str, int, int, tuple[Any, ...]]]:
    """Lists timed requests: the place in the recipe, prompt, new tokens, and their engines."""
    exports = tuple(export.entry for export in recipe.export)
    speed = recipe.verify.speed
    if speed:
        for at, one in enumerate(speed.workloads):
            yield f"verify.speed.workloads.{at}", one.prompt, one.new, exports
        for prompt in speed.sweep.prompt if speed.sweep else ():
            assert speed.sweep is not None
            yield "verify.speed.sweep.prompt", prompt, speed.sweep.new, exports
    for index, stage in enumerate(recipe.stages):
        target = getattr(stage.entry, "target", None)
        asked = getattr(target, "timed", False) or getattr(stage.entry, "measure_speed", False)
        request = getattr(target, "workload", None)
        if asked and request is not None:
            where = f"stages.{index}.{stage.kind}.{stage.name}.target.workload"
            yield where, request.prompt, request.new, _engines(target)


def _engines(target: Any) -> tuple[Any, ...]:
    from prune_export import registry

    name = getattr(target, "engine", None)
    return (registry.find("exporters", name)(),) if name in registry.names("exporters") else ()
