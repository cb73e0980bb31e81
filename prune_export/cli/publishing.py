"""The command `publish`, and what `run` shares with it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from prune_export.cli import console, options
from prune_export.errors import PlanError

if TYPE_CHECKING:
    from prune_export.hub.publishing import Published


def publish(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="A result directory.")],
    repo: Annotated[str, typer.Option(metavar="REPO", help="`owner/name` on the Hub.")],
    public: Annotated[
        bool, typer.Option("--public", help="Create the repository as public.")
    ] = False,
    force: Annotated[
        bool, typer.Option("--force", help="Publish although verification failed.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only list what would be uploaded.")
    ] = False,
    allow: Annotated[
        list[str] | None,
        typer.Option(
            metavar="TEXT", help="Let this name, or paths below it, be published. Repeatable."
        ),
    ] = None,
    recipe_only: Annotated[
        bool,
        typer.Option(
            "--recipe-only", help="Publish the recipe DIR alone: a file, or a directory of them."
        ),
    ] = False,
    bill: Annotated[
        bool, typer.Option("--bom", help="Add a bill of materials (CycloneDX), bom.cdx.json.")
    ] = False,
    sign: Annotated[
        Path | None,
        typer.Option(metavar="KEY", help="Sign all of it with this private key: model.sig."),
    ] = None,
    json: options.Json = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
) -> None:
    """Upload a result directory to the Hub: checkpoint, engines, recipe, lock, card, report.

    prune-export publish out/ --repo me/SmolLM2-135M-depth24
    prune-export publish mine.yaml --repo me/recipes --recipe-only

    The token is taken from the environment or the Hub's login, and written nowhere.
    """
    if recipe_only:
        from prune_export.hub.recipes import publish_recipes

        found = publish_recipes(
            directory, repo, private=not public, dry_run=dry_run, allow=allow or (),
            progress=console.progress(quiet=quiet or json),
        )  # fmt: skip
        _show(found, as_json=json)
        return
    upload(
        directory,
        repo,
        private=not public,
        force=force,
        quiet=quiet,
        dry_run=dry_run,
        as_json=json,
        allow=allow or (),
        bill=bill,
        key=sign,
    )


def destination(proposed: str | None, push_to: str | None, *, publish: bool) -> str | None:
    """Chooses the repository to publish to; None unless the command line asks for it.

    Raises:
        PlanError: `--publish`, and the recipe proposes none.
        PublishError: it is no name of a repository.
    """
    from prune_export.hub.uploading import check_names

    repo = push_to or (proposed if publish else None)
    if publish and repo is None:
        raise PlanError(
            "--publish", "the recipe proposes no repository", "write `--push-to owner/name`"
        )
    if repo is not None:
        check_names(repo)
    return repo


def upload(
    directory: Path,
    repo: str,
    *,
    private: bool,
    force: bool,
    quiet: bool,
    dry_run: bool = False,
    as_json: bool = False,
    allow: Sequence[str] = (),
    bill: bool = False,
    key: Path | None = None,
) -> None:
    """Uploads a result directory and shows what went where."""
    from prune_export.hub.publishing import publish as publish_result

    found = publish_result(
        directory, repo, private=private, force=force, dry_run=dry_run, allow=allow,
        bill=bill, key=key, progress=console.progress(quiet=quiet or as_json),
    )  # fmt: skip
    _show(found, as_json=as_json)


def _show(found: Published, *, as_json: bool) -> None:
    if as_json:
        console.print_json(dataclasses.asdict(found))
    else:
        console.output.put(str(found))
