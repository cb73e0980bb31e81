"""Runs a recipe for a command, or plans it: what `run`, `smaller` and `faster` have in common."""

from __future__ import annotations

from typing import TYPE_CHECKING

from prune_export.cli import console
from prune_export.cli.publishing import upload
from prune_export.cli.showing import show_plan, show_report
from prune_export.errors import VerifyError

if TYPE_CHECKING:
    from prune_export.execution import Options
    from prune_export.recipe import Recipe


def carry_out(
    recipe: Recipe,
    model: str | None,
    chosen: Options,
    *,
    dry_run: bool,
    json: bool,
    quiet: bool,
    repo: str | None = None,
    private: bool = True,
) -> None:
    """Runs a recipe, shows what came of it, and uploads it to `repo` where one is given.

    Raises:
        VerifyError: a gate of the recipe was not met.
    """
    from prune_export.execution import plan, run

    if dry_run:
        show_plan(plan(recipe, model, chosen), as_json=json)
        chosen.team.dismiss()
        return
    result = run(recipe, model, chosen, console.progress(quiet=quiet or json))
    chosen.team.dismiss()
    if json:
        console.print_json(result.report)
    else:
        show_report(result.report, result.out)
    if repo:
        upload(result.out, repo, private=private, force=False, quiet=quiet)
    elif recipe.publish.repo and not (quiet or json):
        console.output.put(
            f"not published: the recipe proposes {recipe.publish.repo} (`--publish`)"
        )
    if result.failed:
        gate = result.failed[0]
        raise VerifyError(
            gate.what,
            f"claimed {gate.claimed:g}, measured {gate.measured:.3g}",
            f"the result is in {result.out}; change the recipe, or its gate",
        )
