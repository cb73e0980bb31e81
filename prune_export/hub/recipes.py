"""Recipes on the Hub: found by the tag that every card of ours has, and published by themselves.

A repository of recipes looks so; the name of one is `hf://owner/name/small`:

    README.md             a card with the tags `prune-export` and `prune-recipe`
    prune_recipe.yaml     the recipe that `hf://owner/name` means
    recipes/small.yaml    others

A published result has the first two as well, so each result is a recipe that others can run.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Final

from huggingface_hub import ModelCardData

from prune_export.display.escapes import escaped_page
from prune_export.errors import PublishError, RecipeError
from prune_export.hub.credentials import refuse_secrets
from prune_export.hub.publishing import Published
from prune_export.hub.uploading import check_names, check_online, found_token, upload
from prune_export.progress import Progress, Silent
from prune_export.recipe import PUBLISHED_NAME, Recipe, bundled
from prune_export.recipe.document import MAX_BYTES, read
from prune_export.recipe.fetching import fetches
from prune_export.report.card import fenced, spanned
from prune_export.report.table import escape_markdown
from prune_export.system.files import read_regular_text
from prune_export.system.temporary import Temporary
from prune_export.system.written import LOCK
from prune_export.units import text_from_bytes

TAG: Final = "prune-export"
_RECIPE_TAG: Final = "prune-recipe"
_LOOKED_AT: Final = 2000
"""Repositories that a search looks through at most."""

_NAME: Final = re.compile(r"\w[\w.-]*")


@dataclass(frozen=True)
class Found:
    """A recipe that a search found: its address, the base it was run on, and its tags."""

    address: str
    base: str
    downloads: int
    tags: tuple[str, ...]


def search(words: Sequence[str] = (), *, limit: int = 20) -> list[Found]:
    """Lists recipes on the Hub whose repository or tags have all words; most downloaded first.

    Raises:
        RecipeError: the Hub cannot be asked.
    """
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import HTTPError

    where = "Hugging Face Hub"
    if constants.HF_HUB_OFFLINE:
        raise RecipeError(where, "offline mode is on (HF_HUB_OFFLINE)", "unset it to search")
    try:
        return list(islice(_matching(HfApi(), [one.lower() for one in words]), limit))
    except (HTTPError, OSError, ValueError) as error:
        said = (str(error).splitlines() or [type(error).__name__])[0]
        failure = RecipeError(where, f"cannot be searched: {said}", "check the network")
    # Raised here: the library's errors carry the request, token included.
    raise failure


def _matching(api: object, words: Sequence[str]) -> Iterator[Found]:
    models = api.list_models(filter=TAG, sort="downloads", full=True)  # type: ignore[attr-defined]
    for model in islice(models, _LOOKED_AT):
        tags = tuple(model.tags or ())
        text = " ".join((model.id, *tags)).lower()
        base = next(
            (tag.partition(":")[2] for tag in tags if re.match(r"base_model:[^:]+$", tag)), ""
        )
        for file in model.siblings or ():
            folder, _, name = file.rfilename.rpartition("/")
            if file.rfilename == PUBLISHED_NAME:
                address = f"hf://{model.id}"
            elif folder == "recipes" and name.endswith(".yaml"):
                address = f"hf://{model.id}/{name.removesuffix('.yaml')}"
            else:
                continue
            if all(word in f"{text} {address.lower()}" for word in words):
                yield Found(address, base, model.downloads or 0, tags)


def publish_recipes(
    source: Path,
    repo_id: str,
    *,
    private: bool = True,
    token: str | None = None,
    endpoint: str | None = None,
    dry_run: bool = False,
    allow: Sequence[str] = (),
    progress: Progress | None = None,
) -> Published:
    """Uploads a recipe, or all of a directory, with a card and nothing else.

    A recipe that extends a file is written out whole; others go as they are, comments too. Of a
    directory `prune_recipe.yaml` is the repository's own, all others go to `recipes/`.

    Raises:
        PublishError: there is no recipe, or the repository holds a result, or the Hub refuses.
        RecipeError: one of them is no recipe.
    """
    check_names(repo_id)
    texts = {name: _text(file) for name, file in _files(source).items()}
    progress = progress or Silent()
    with Temporary() as folder:
        loaded = {}
        for name, text in texts.items():
            file = folder / name
            file.parent.mkdir(exist_ok=True)
            file.write_text(text, encoding="utf-8")
            loaded[name] = Recipe.load(file)
        (folder / "README.md").write_text(_card(repo_id, loaded), encoding="utf-8")
        names = ["README.md", *texts]
        owner = repo_id.partition("/")[0]
        refuse_secrets(folder, names, token, owner=owner, allowed=allow)
        total = sum((folder / name).stat().st_size for name in names)
        size = f"{len(names)} files, {text_from_bytes(total)}"
        if dry_run:
            progress.say(f"Would upload {size} to {repo_id}")
            return Published(repo_id, "", "", tuple(names), (), total)
        token = found_token(token)
        check_online()
        refuse_secrets(folder, names, token, owner=owner, allowed=allow)
        _refuse_results(repo_id, token, endpoint)
        progress.say(f"Uploading {size} to {repo_id}")
        url, commit = upload(
            folder, repo_id, names, stale=("recipes/*.yaml",), private=private, revision=None,
            token=token, endpoint=endpoint, bars=False,
        )  # fmt: skip
    progress.say(f"Published {url}")
    return Published(repo_id, url, commit, tuple(names), (), total)


def _files(source: Path) -> dict[str, Path]:
    """The recipes to publish, by their names in the repository."""
    if source.is_file():
        return {PUBLISHED_NAME: source}
    found = sorted(source.glob("*.yaml")) if source.is_dir() else []
    if not found:
        raise PublishError(
            str(source), "holds no recipe", "give a recipe's file, or a directory of .yaml files"
        )
    for file in found:
        if not _NAME.fullmatch(file.name):
            raise PublishError(
                str(file), "has a name that is no address", "use letters, digits, `-` and `_`"
            )
    return {
        file.name if file.name == PUBLISHED_NAME else f"recipes/{file.name}": file for file in found
    }


def _text(file: Path) -> str:
    """A recipe as it is published; what it extends from a file here is written into it."""
    recipe = Recipe.load(file)
    data = read(file).data
    parent = data.get("extends") if isinstance(data, dict) else None
    if parent is None or str(parent).startswith("hf://") or parent in bundled():
        return read_regular_text(file, MAX_BYTES, "a recipe", error=RecipeError)
    return recipe.to_yaml()


def _refuse_results(repo_id: str, token: str, endpoint: str | None) -> None:
    """Refuses to write over the card of a published model."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HTTPError

    api = HfApi(endpoint=endpoint, token=token)
    try:
        taken = any(api.file_exists(repo_id, name) for name in (LOCK, "config.json"))
    except (HTTPError, OSError, ValueError):
        return  # the upload says it better
    if taken:
        raise PublishError(
            repo_id,
            "holds a model, whose card this would replace",
            "give another repository: a result's own recipe is published with it",
        )


def _card(repo_id: str, recipes: dict[str, Recipe]) -> str:
    """The card of a repository of recipes."""
    stages = [stage.name for recipe in recipes.values() for stage in recipe.stages]
    tags = list(dict.fromkeys([TAG, _RECIPE_TAG, "pruning", *stages]))
    lines = [f"# {escape_markdown(repo_id.rpartition('/')[2])}", "", "Recipes for prune_export."]
    for name, recipe in recipes.items():
        below = "" if name == PUBLISHED_NAME else f"/{Path(name).stem}"
        address = f"hf://{repo_id}{below}"
        described = " ".join(recipe.description.split())
        lines += ["", f"## {escape_markdown(Path(name).stem)}", ""]
        lines += [escape_markdown(described), ""] if described else []
        lines += [fenced(f"prune-export run {address} --model MODEL --out out/", "sh"), ""]
        needed = fetches(recipe)
        lines += [f"Fetches {', '.join(map(spanned, needed))}.", ""] if needed else []
        lines += [fenced(recipe.text, "yaml")]
    front = ModelCardData(tags=tags).to_yaml()
    return escaped_page(f"---\n{front}\n---\n\n" + "\n".join(lines) + "\n")
