"""One set of text takes the place of all data of a recipe, split so that nothing overlaps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from prune_export.calibrate import token_set
from prune_export.errors import PlanError
from prune_export.execution import Options, plan, with_data
from prune_export.machine import Machine
from prune_export.planning import data_notes, with_own_samples, with_text
from prune_export.recipe import LocalText, Recipe
from prune_export.recipe.sources import SOURCES

RECIPE = """
recipe: 1
data:
  calibration: {dataset: owner/name, samples: 64, length: 1024}
  ranking: {dataset: owner/name, split: validation, samples: 8, length: 1024}
  healing: {dataset: owner/name, length: 1024, seed: 1}
  evaluation: {dataset: owner/other, split: test, length: 2048}
stages:
  - search:
      target: {parameters: 0.75}
      candidates: [{prune: {method: structured_wanda, sparsity: to_target}}]
      validation: ranking
      heal: {method: lora, rank: 2, steps: 2}
  - heal: {method: lora, rank: 2, steps: 2}
verify: {quality: {perplexity: evaluation}}
"""


def prose(paragraphs: int) -> str:
    lines = (f"Zeile {number}: der Fluss fließt durch die Stadt." for number in range(paragraphs))
    return "\n\n".join(lines)


@pytest.fixture
def notes(tmp_path: Path) -> Path:
    folder = tmp_path / "Über uns"
    folder.mkdir()
    (folder / "Meine Notizen.txt").write_text(prose(3000), encoding="utf-8")
    return folder / "Meine Notizen.txt"


def test_the_parts_share_no_document(tiny_llama: Path, notes: Path) -> None:
    recipe = with_text(Recipe.parse(RECIPE), [notes], longest=256)
    assert list(recipe.data) == ["evaluation", "ranking", "calibration", "healing"]
    seen: set[str] = set()
    for name, source in recipe.data.items():
        assert isinstance(source, LocalText)
        assert source.files == ("Meine Notizen.txt",)
        assert source.length <= 256
        made = token_set(source, tiny_llama, recipe.root)
        assert made.samples == source.samples or name == "healing"
        assert made.samples >= 8
        assert not seen & set(made.documents)
        seen |= set(made.documents)
    assert recipe.data["evaluation"].packing == "stream"
    assert recipe.data["ranking"].samples == 8
    (said,) = data_notes(recipe)
    assert "evaluation 10%, ranking 10%, calibration 20%, healing 60%; seed 0" in said
    # What it says is what is written down, and is read again as the same.
    again = Recipe.parse(recipe.to_yaml(), root=recipe.root)
    assert again.data == recipe.data


def test_a_plan_says_how_the_text_was_split(tiny_llama: Path, notes: Path, tmp_path: Path) -> None:
    recipe, model = with_data(Recipe.parse(RECIPE), str(tiny_llama), [notes.parent])
    machine = Machine.detect(device="cpu", threads=1)
    found = plan(recipe, model, Options(tmp_path / "out", tmp_path / "store", machine))
    assert found.notes == data_notes(recipe)
    assert found.to_json()["notes"]


def test_a_model_that_the_recipe_names_is_still_found(tiny_llama: Path, notes: Path) -> None:
    asked = Recipe.parse(f"{RECIPE}\nmodel: {tiny_llama.name}", root=tiny_llama.parent)
    _, model = with_data(asked, None, [notes])
    assert model == str(tiny_llama)
    same, none = with_data(asked, None, [])
    assert same is asked
    assert none is None


def test_too_little_text_says_how_much_is_needed(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(prose(100), encoding="utf-8")
    with pytest.raises(PlanError) as refused:
        with_text(Recipe.parse(RECIPE), [tmp_path / "a.txt"])
    said = str(refused.value)
    assert "characters of text, too few to be split into evaluation, ranking" in said
    assert "give at least 38,000 characters (about 6,400 words)" in said
    (tmp_path / "a.txt").write_text(prose(800), encoding="utf-8")
    assert with_text(Recipe.parse(RECIPE), [tmp_path / "a.txt"]).data


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("gone.txt", "is not there"),
        ("a.docx", "has another format"),
        ("folder", "is a directory without text"),
    ],
)
def test_what_is_no_text(tmp_path: Path, name: str, said: str) -> None:
    (tmp_path / "a.docx").write_text("x")
    (tmp_path / "folder").mkdir()
    with pytest.raises(PlanError, match=said):
        with_text(Recipe.parse(RECIPE), [tmp_path / name])


def test_without_text_the_model_speaks_for_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = Recipe.parse(RECIPE)
    if "generated" not in SOURCES:
        with pytest.raises(PlanError, match="pass text of the kind that the model is for"):
            with_own_samples(recipe)
        return
    own = with_own_samples(recipe, longest=256)
    said: Any = own.data
    assert Recipe.parse(own.to_yaml()).data == said
    assert "what the dense model says itself" in data_notes(own)[0]
    assert list(said) == ["evaluation", "ranking", "calibration", "healing"]
    assert len({source.generated.seed for source in said.values()}) == 4
    assert {source.length for source in said.values()} == {256}
