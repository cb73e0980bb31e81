"""A recipe: what to do to a model, as data. `Recipe.load` reads, merges and checks it.

A recipe is a YAML file, a bundled name (`demo`), `hf://owner/name[@revision]` (that repository's
`prune_recipe.yaml`) or `hf://owner/name/other` (its `recipes/other.yaml`). It cannot run code; its
paths stay below the data root, which is the recipe's own directory unless the caller, who is
trusted, says otherwise.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.resources import files
from itertools import groupby
from pathlib import Path
from typing import Any, Final

import yaml

from prune_export import registry
from prune_export.errors import RecipeError, did_you_mean
from prune_export.recipe import document as yaml_document
from prune_export.recipe import schema
from prune_export.recipe.document import Document
from prune_export.recipe.engines import EngineOption, Export, engines_of
from prune_export.recipe.iterate import together
from prune_export.recipe.schema import Publish, Quality, Speed, Verify
from prune_export.recipe.search import (
    Candidate,
    Search,
    Template,
    heal_of,
    rungs_of,
    templates,
    unreached,
)
from prune_export.recipe.sources import (
    CONVERSATIONS,
    DENSE,
    Generated,
    Generation,
    HubDataset,
    LocalText,
    Source,
    TextSource,
    TokenFile,
)
from prune_export.recipe.stages import Stage, Sweep, Workload
from prune_export.units import text_from_name

__all__ = [
    "CONVERSATIONS",
    "DENSE",
    "Candidate",
    "EngineOption",
    "Export",
    "Generated",
    "Generation",
    "HubDataset",
    "LocalText",
    "Publish",
    "Quality",
    "Recipe",
    "Search",
    "Source",
    "Speed",
    "Stage",
    "Sweep",
    "Template",
    "TextSource",
    "TokenFile",
    "Verify",
    "Workload",
    "bundled",
    "engines_of",
    "heal_of",
    "rungs_of",
    "templates",
    "unreached",
]

PUBLISHED_NAME: Final = "prune_recipe.yaml"
"""Not `recipe.yaml`: another tool reads any file of that name in a model directory."""

_KEYS: Final = {
    "recipe",
    "description",
    "extends",
    "model",
    "data",
    "stages",
    "export",
    "verify",
    "publish",
}
_MAX_EXTENDS: Final = 8


@dataclass(frozen=True)
class Recipe:
    """A checked recipe. `root` is the directory that its relative paths are resolved below.

    `file` is where it was read from, None if that was a string; `fetched` are the `hf://` addresses
    that it and what it extends came from.
    """

    name: str
    description: str
    model: str | None
    data: Mapping[str, Source]
    stages: tuple[Stage, ...]
    export: tuple[Export, ...]
    verify: Verify
    publish: Publish
    root: Path
    text: str
    file: Path | None = None
    fetched: tuple[str, ...] = ()

    @staticmethod
    def load(
        spec: str | Path,
        *,
        overrides: Sequence[str] = (),
        data_root: Path | None = None,
        allow: Sequence[str] = (),
    ) -> Recipe:
        """Reads a recipe: a path, a bundled name or `hf://owner/name[@revision]`.

        `overrides` are `key.path=value` assignments. `data_root` replaces the recipe's directory as
        the place that its paths are resolved below. A recipe of the Hub may extend others of its
        owner, and of the owners in `allow`.

        Raises:
            RecipeError: it cannot be found, read or understood; file, line and key are named.
        """
        file = _located(str(spec))
        origins = [str(spec)] if str(spec).startswith("hf://") else []
        document = _extended(file, file.parent, (), origins, tuple(allow))
        for assignment in overrides:
            document = yaml_document.assigned(document, assignment)
        recipe = _checked(text_from_name(file.stem), document, (data_root or file.parent).resolve())
        return replace(recipe, file=file.resolve(), fetched=tuple(origins))

    @staticmethod
    def parse(
        text: str,
        *,
        name: str = "recipe",
        root: Path | None = None,
        overrides: Sequence[str] = (),
    ) -> Recipe:
        """Reads a recipe from a string; it cannot extend another.

        Raises:
            RecipeError: it cannot be understood.
        """
        document = yaml_document.parse(text, name)
        for assignment in overrides:
            document = yaml_document.assigned(document, assignment)
        return _checked(name, document, (root or Path.cwd()).resolve())

    def to_yaml(self) -> str:
        """The recipe written out: `extends` and overrides resolved, defaults filled in."""
        return yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True, width=100)

    def to_dict(self) -> dict[str, Any]:
        """The recipe as plain data, defaults filled in."""
        stages = []
        for group, found in groupby(self.stages, key=lambda one: one.round and one.round.group):
            written = [(stage, self._body(stage)) for stage in found]
            if group is not None:
                stages.append(together(written))
            else:
                stages += [{stage.kind: body} for stage, body in written]
        return {
            "recipe": schema.VERSION,
            "description": self.description,
            "model": self.model,
            "data": {name: source.model_dump(mode="json") for name, source in self.data.items()},
            "stages": stages,
            "export": [{export.name: export.parameters()} for export in self.export],
            "verify": self.verify.model_dump(mode="json"),
            "publish": self.publish.model_dump(mode="json"),
        }

    def _body(self, stage: Stage) -> dict[str, Any]:
        """A stage's keys as plain data."""
        if stage.kind == "search":
            return stage.parameters()
        named = {"data": stage.data} if stage.data in self.data else {}
        return {"method": stage.name} | named | stage.parameters()


def bundled() -> dict[str, Path]:
    """The recipes that come with the package, by name."""
    installed = Path(str(files("prune_export").joinpath("_recipes")))
    folder = installed if installed.is_dir() else Path(__file__).parents[2] / "recipes"
    return {file.stem: file for file in sorted(folder.glob("*.yaml"))}


def _located(spec: str) -> Path:
    if spec.startswith("hf://"):
        from prune_export.recipe.remote import fetched

        return fetched(spec)
    if spec in bundled() and not Path(spec).is_file():
        return bundled()[spec]
    file = Path(spec)
    if not file.is_file():
        raise RecipeError(
            spec, "is neither a file nor a bundled recipe", did_you_mean(spec, bundled())
        )
    return file


def _extended(
    file: Path, root: Path, chain: tuple[Path, ...], origins: list[str], allow: tuple[str, ...]
) -> Document:
    """Reads a recipe and what it extends; addresses of the Hub among these join `origins`."""
    document = yaml_document.read(file)
    if document.data is None or not isinstance(document.data, dict):
        raise RecipeError(
            str(file),
            "is empty or not a mapping",
            "start it with `recipe: 1`; see `prune-export recipes`",
        )
    parent = document.data.pop("extends", None)
    if parent is None:
        return document
    where = document.where(("extends",))
    if not isinstance(parent, str):
        raise RecipeError(where, f"got {parent!r}, expected one recipe", "write its path or name")
    if parent.startswith("hf://"):
        _refuse_others(where, parent, origins, allow)
        target = _located(parent)
        root = target.parent
        origins.append(parent)
    elif parent in bundled():
        target, root = _located(parent), _located(parent).parent
    else:
        target = (file.parent / parent).resolve()
        if Path(parent).is_absolute() or not target.is_relative_to(root.resolve()):
            raise RecipeError(
                where, f"`{parent}` leaves {root}", "extend a recipe below the same directory"
            )
        if not target.is_file():
            raise RecipeError(
                where,
                f"`{parent}` is neither a file nor a bundled recipe",
                did_you_mean(parent, bundled()),
            )
    seen = (*chain, file.resolve())
    if target.resolve() in seen or len(seen) > _MAX_EXTENDS:
        names = " → ".join(path.name for path in (*seen, target))
        raise RecipeError(where, f"goes in a circle: {names}", "remove one `extends`")
    return yaml_document.merged(_extended(target, root, seen, origins, allow), document)


def _refuse_others(where: str, parent: str, origins: list[str], allow: tuple[str, ...]) -> None:
    """Refuses that a recipe of the Hub brings in another owner's, before that is fetched."""
    from prune_export.recipe.remote import owner_of

    owner = owner_of(parent)
    if origins and owner not in (owner_of(origins[-1]), *allow):
        raise RecipeError(
            where,
            f"`{parent}` is of another owner than {origins[-1]}, and would be fetched",
            f"if you trust them, add `--allow-owner {owner}`",
        )


def _checked(name: str, document: Document, root: Path) -> Recipe:
    data = document.data
    if not isinstance(data, dict):
        raise RecipeError(name, "is empty or not a mapping", "start it with `recipe: 1`")
    for key in data:
        if key not in _KEYS:
            raise RecipeError(
                document.where((key,)),
                f"`{key}` is not a key of a recipe",
                did_you_mean(key, _KEYS),
            )
    if data.get("recipe") != schema.VERSION:
        raise RecipeError(
            document.where(("recipe",)),
            f"got {data.get('recipe')!r}, expected {schema.VERSION}",
            f"write `recipe: {schema.VERSION}`",
        )
    for key in ("description", "model"):
        if not isinstance(data.get(key), str | None):
            raise RecipeError(
                document.where((key,)), f"got {data[key]!r}, expected text", "put it in quotes"
            )
    sources = schema.sources(document)
    stages = schema.stages(document, sources)
    exports = schema.exports(document)
    verify = schema.model(document, ("verify",), Verify, data.get("verify") or {})
    publish = schema.model(document, ("publish",), Publish, data.get("publish") or {})
    if not stages and not exports:
        raise RecipeError(document.where(()), "has no stages and no exports", "add `stages`")
    measured = verify.quality.perplexity if verify.quality else None
    if measured is not None and measured not in sources:
        raise RecipeError(
            document.where(("verify", "quality", "perplexity")),
            f"got {measured!r}, which `data` does not define",
            did_you_mean(measured, sources),
        )
    chosen = any(stage.kind == "search" and stage.entry.engines for stage in stages)
    if verify.speed and not exports and not chosen:
        raise RecipeError(
            document.where(("verify", "speed")),
            "measures engines, but the recipe exports none",
            "add `export: [onnx]`",
        )
    return Recipe(
        name=name,
        description=data.get("description") or "",
        model=data.get("model"),
        data={key: _packed(document, key, sources[key], key == measured) for key in sources},
        stages=stages,
        export=exports,
        verify=verify,
        publish=publish,
        root=root,
        text=yaml.safe_dump(data, sort_keys=False, allow_unicode=True, width=100),
    )


def _packed(document: Document, name: str, source: Source, measured: bool) -> Source:
    if isinstance(source, TokenFile):
        return source
    packing = source.packing or ("stream" if measured else "packed")
    if not isinstance(source, Generated) and source.prefix != "every" and packing != "stream":
        raise RecipeError(
            document.where(("data", name, "prefix")),
            f"got {source.prefix!r}, which is for `packing: stream`, and this one is `{packing}`",
            "leave it out: every window begins with the prefix",
        )
    return source.model_copy(update={"packing": packing})


def entry_names() -> dict[str, tuple[str, ...]]:
    """Every registered name by kind, for listings."""
    return {kind: registry.names(kind) for kind in registry.KINDS}
