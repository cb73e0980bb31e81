"""Recipes that others share: published by themselves, found, shown, and kept in their bounds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard

from prune_export.errors import PublishError, RecipeError
from prune_export.hub.recipes import publish_recipes
from prune_export.recipe import Recipe
from prune_export.recipe.fetching import fetches
from tests.hub.fake_hub import FakeHub, Repo
from tests.hub.made import called, make_result, uploading

PLAIN = "recipe: 1\ndescription: Two *fewer*.\nstages:\n  - prune: {method: deepest, remove: 2}\n"
OTHER = PLAIN.replace("deepest", "laco").replace("remove: 2", "merge: 2")
CARD = "---\ntags: [prune-export, deepest]\nbase_model: org/base\n---\n"


def loading(spec: str, **extra: Any) -> dict[str, Any]:
    return {"function": "load", "arguments": {"spec": spec} | extra}


def searching(*words: str) -> dict[str, Any]:
    return {"function": "search", "arguments": {"words": words}}


@pytest.mark.slow
def test_recipes_are_published_found_and_read(tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    text = "# Why two: see the paper.\n" + PLAIN
    (folder / "prune_recipe.yaml").write_text(text, encoding="utf-8")
    (folder / "three.yaml").write_text(
        "recipe: 1\nextends: prune_recipe.yaml\nstages: [{prune: {method: deepest, remove: 3}}]\n",
        encoding="utf-8",
    )
    (folder / "notes.txt").write_text("mine", encoding="utf-8")
    sending = {"directory": str(folder), "repo_id": "me/recipes", "private": False}
    result = make_result(tmp_path / "out")
    with FakeHub() as fake:
        calls = [
            {"function": "publish_recipes", "arguments": sending},
            uploading(result, "me/model", private=False),
            uploading(result, "me/hidden"),
            {"function": "publish_recipes", "arguments": sending | {"repo_id": "me/model"}},
            searching(),
            searching("RECIPES", "three"),
            searching("nothing-like-it"),
            loading("hf://me/recipes"),
            loading("hf://me/recipes/three"),
        ]
        outcomes, _ = called(fake, tmp_path / "home", calls)
        stored = fake.files("me/recipes")
        kept = fake.files("me/model")["README.md"]
    sent, _, _, refused, every, three, none, plain, named = outcomes
    assert sent["files"] == ["README.md", "prune_recipe.yaml", "recipes/three.yaml"]
    assert set(stored) == set(sent["files"])
    assert stored["prune_recipe.yaml"].decode() == text
    # What was extended from a file here is written into what goes out.
    assert "extends" not in yaml.safe_load(stored["recipes/three.yaml"])
    assert "holds a model" in refused["problem"]
    assert kept == (result / "README.md").read_bytes()
    assert [one["address"] for one in every["found"]] == [
        "hf://me/recipes", "hf://me/recipes/three", "hf://me/model",
    ]  # fmt: skip
    assert [one["address"] for one in three["found"]] == ["hf://me/recipes/three"]
    assert none["found"] == []
    assert plain["stages"] == named["stages"] == ["deepest"]
    assert named["fetches"] == ["recipe hf://me/recipes/three"]


@pytest.mark.slow
def test_a_fetched_recipe_extends_only_its_owners(tmp_path: Path) -> None:
    own = b"recipe: 1\nextends: hf://me/base\nmodel: org/large\n"
    foreign = b"recipe: 1\nextends: hf://you/base\n"
    further = b"recipe: 1\nextends: hf://me/foreign\n"
    here = tmp_path / "here.yaml"
    here.write_text("recipe: 1\nextends: hf://you/base\n", encoding="utf-8")
    through = tmp_path / "through.yaml"
    through.write_text("recipe: 1\nextends: hf://me/foreign\n", encoding="utf-8")
    with FakeHub() as fake:
        for name, data in {"me/base": PLAIN.encode(), "you/base": PLAIN.encode(), "me/own": own,
                           "me/foreign": foreign, "me/further": further}.items():  # fmt: skip
            files = {"main": {"prune_recipe.yaml": data}}
            fake.repos[name] = Repo(private=False, branches=files, commits=["c" * 40])
        calls = [
            loading("hf://me/own"),
            loading("hf://me/foreign"),
            loading("hf://me/further"),
            loading(str(through)),
            {"function": "cli", "arguments": {"arguments": ["plan", "hf://me/own"]}},
        ]
        *outcomes, planned = called(fake, tmp_path / "home", calls)[0]
        asked = [line for line in fake.requests if "/you/" in line]
        allowed = [loading("hf://me/further", allow=["you"]), loading(str(here))]
        trusted, _ = called(fake, tmp_path / "home", allowed)
    assert outcomes[0]["stages"] == ["deepest"]
    assert outcomes[0]["fetches"] == ["recipe hf://me/own", "recipe hf://me/base",
                                      "model org/large"]  # fmt: skip
    # Told before it is asked for, and here it is not there.
    assert planned["status"] == 2
    assert planned["told"].index("the recipe fetches model org/large") < planned["told"].index(
        "error"
    )
    for refused in outcomes[1:]:
        assert refused["error"] == "RecipeError"
        assert "`hf://you/base` is of another owner" in refused["problem"]
        assert "--allow-owner you" in refused["fix"]
    assert not asked  # refused before it was fetched
    # A recipe of one's own names whom it likes.
    assert [one["stages"] for one in trusted] == [["deepest"], ["deepest"]]


def test_what_would_be_fetched_is_listed(tmp_path: Path) -> None:
    (tmp_path / "local").mkdir()
    text = """\
recipe: 1
model: org/base@v1
data:
  calibration: {dataset: allenai/c4, config: en, revision: abc, samples: 2, length: 16}
  healing: {dataset: org/talks, samples: 2, length: 16}
stages:
  - prune: {method: deepest, remove: 2}
  - heal: {method: lora, rank: 2, steps: 3, objective: {distill: {teacher: org/teacher}}}
verify: {quality: {tasks: [arc_easy]}}
"""
    recipe = Recipe.parse(text, root=tmp_path)
    own = ["the data of the task arc_easy"]
    teacher = ["model org/teacher"]
    data = ["dataset allenai/c4@abc en", "dataset org/talks"]
    assert fetches(recipe) == ["model org/base@v1", *teacher, *data, *own]
    assert fetches(recipe, str(tmp_path), own_data=True) == [*teacher, *own]
    assert fetches(recipe, "org/other")[0] == "model org/other"
    beside = Recipe.parse(text.replace("org/base@v1", "local"), root=tmp_path)
    assert fetches(beside) == [*teacher, *data, *own]


def test_the_card_of_recipes_has_the_tag_and_cannot_be_broken_out_of(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(PLAIN.replace("Two *fewer*.", '"Two\\n---\\n```\\n<b> | x"'), encoding="utf-8")
    found = publish_recipes(file, "me/recipes", dry_run=True)
    assert found.files == ("README.md", "prune_recipe.yaml")
    from prune_export.hub.recipes import _card

    card = ModelCard(_card("me/recipes", {"prune_recipe.yaml": Recipe.load(file)}))
    assert card.data.tags == ["prune-export", "prune-recipe", "pruning", "deepest"]
    assert "<b>" not in card.text.partition("```yaml")[0].replace("````", "")
    assert "hf://me/recipes --model MODEL" in card.text


@pytest.mark.parametrize(
    ("name", "text", "error", "said"),
    [
        ("mine.yaml", "recipe: 2\n", RecipeError, "expected 1"),
        ("mine.yaml", PLAIN + "# hf_" + "ABCdef123" * 4, PublishError, "a Hugging Face token"),
        ("a b.yaml", PLAIN, PublishError, "a name that is no address"),
        ("notes.txt", PLAIN, PublishError, "holds no recipe"),
    ],
)
def test_what_is_no_recipe_is_not_published(
    tmp_path: Path, name: str, text: str, error: type[Exception], said: str
) -> None:
    (tmp_path / name).write_text(text, encoding="utf-8")
    with pytest.raises(error, match=said):
        publish_recipes(tmp_path, "me/recipes", dry_run=True)


def test_the_commands(cli: Any, tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(PLAIN + "model: org/large\n", encoding="utf-8")
    status, shown, told = cli("recipes", "show", str(file))
    assert status == 0
    assert yaml.safe_load(shown)["model"] == "org/large"
    assert "the recipe fetches model org/large" in told
    assert json.loads(cli("recipes", "show", str(file), "--json")[1])["fetches"] == [
        "model org/large"
    ]
    status, shown, _ = cli("publish", str(file), "--repo", "me/x", "--recipe-only", "--dry-run")
    assert status == 0
    assert "prune_recipe.yaml" in shown
    status, _, told = cli("recipes", "search", "wanda")
    assert status == 2
    assert "offline mode is on" in told
    assert cli("recipes", "demo", "more")[0] == 2
