"""Loading: extends, overrides, places, round trip, and the reference made from the classes."""

from __future__ import annotations

from pathlib import Path

import jsonschema
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from prune_export.errors import RecipeError
from prune_export.recipe import Recipe, bundled
from prune_export.recipe.document import parse, scalar
from prune_export.recipe.reference import json_schema, markdown

BASE = """\
recipe: 1
description: base
data:
  calibration: {files: [a.txt], samples: 8, length: 64}
stages:
  - prune: {method: angular_distance, sparsity: 0.4}
"""


def written(folder: Path, name: str, text: str) -> Path:
    file = folder / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text, encoding="utf-8")
    return file


def test_extends_merges_mappings_and_replaces_lists(tmp_path: Path) -> None:
    written(tmp_path, "base.yaml", BASE)
    child = written(
        tmp_path,
        "child.yaml",
        "recipe: 1\nextends: base.yaml\ndata: {calibration: {length: 32}}\n"
        "stages:\n  - prune: {method: deepest, remove: 2}\n",
    )
    recipe = Recipe.load(child)
    assert recipe.description == "base"
    assert recipe.data["calibration"].length == 32
    assert recipe.data["calibration"].samples == 8
    assert [stage.name for stage in recipe.stages] == ["deepest"]


def test_an_error_in_the_extended_file_names_that_file(tmp_path: Path) -> None:
    written(tmp_path, "base.yaml", BASE.replace("0.4", "40"))
    child = written(tmp_path, "child.yaml", "recipe: 1\nextends: base.yaml\n")
    with pytest.raises(RecipeError) as caught:
        Recipe.load(child)
    assert "base.yaml:6" in caught.value.where


def test_overrides_win_and_are_named_in_errors(tmp_path: Path) -> None:
    file = written(tmp_path, "r.yaml", BASE)
    recipe = Recipe.load(file, overrides=["stages.0.prune.sparsity=0.2", "model=here"])
    assert recipe.stages[0].entry.sparsity == 0.2
    assert recipe.model == "here"
    for assignment, problem in {
        "stages.0.prune.sparsity=40": "got 40",
        "stages.3.prune.sparsity=0.1": "there is no 3",
        "stages.0.prune.spasity=0.1": "not a key",
        "nonsense": "not `key.path=value`",
        "recipe.deeper=1": "has no `deeper`",
    }.items():
        with pytest.raises(RecipeError, match=problem) as caught:
            Recipe.load(file, overrides=[assignment])
        assert "--set" in caught.value.where


def test_written_out_it_reads_back_the_same(tmp_path: Path) -> None:
    first = Recipe.load(written(tmp_path, "r.yaml", BASE))
    again = Recipe.load(written(tmp_path, "again.yaml", first.to_yaml()))
    assert again.to_dict() == first.to_dict()
    assert again.stages == first.stages


def test_yaml_1_2_scalars() -> None:
    document = parse("a: no\nb: 3e-4\nc: 012\nd: 2026-01-01\ne: '1'\nf: 1_000\ng: ~\n", "x")
    assert document.data == {
        "a": "no", "b": 3e-4, "c": 12, "d": "2026-01-01", "e": "1", "f": "1_000", "g": None,
    }  # fmt: skip


@given(
    st.one_of(
        st.integers(-(10**38), 10**38),
        st.floats(allow_nan=False, allow_infinity=False),
        st.booleans(),
    )
)
def test_scalars_that_yaml_writes_are_read_back(value: float) -> None:
    text = yaml.safe_dump(value).splitlines()[0]
    assert scalar(text) == value


@given(st.text(max_size=200))
def test_any_text_is_read_or_refused_with_a_recipe_error(text: str) -> None:
    try:
        Recipe.parse(text, name="fuzz")
    except RecipeError as error:
        assert "fuzz" in error.where


@pytest.mark.parametrize("name", sorted(bundled()))
def test_bundled_recipes_load_and_satisfy_the_json_schema(name: str) -> None:
    recipe = Recipe.load(name)
    assert recipe.description.endswith(".")
    data = yaml.safe_load(bundled()[name].read_text(encoding="utf-8"))
    jsonschema.Draft202012Validator(json_schema()).validate(data)


def test_the_json_schema_is_one_and_refuses_what_the_loader_refuses() -> None:
    validator = jsonschema.Draft202012Validator(json_schema())
    validator.check_schema(json_schema())
    assert not validator.is_valid({"recipe": 1, "stage": []})
    assert not validator.is_valid(
        {"recipe": 1, "stages": [{"prune": {"method": "deepest", "x": 1}}]}
    )
    assert validator.is_valid(
        {"recipe": 1, "stages": [{"prune": {"method": "deepest", "remove": 1}}]}
    )


def test_the_reference_is_up_to_date() -> None:
    file = Path(__file__).parents[2] / "docs" / "recipes.md"
    assert file.read_text(encoding="utf-8") == markdown(), "run `make docs`"


def test_a_prefix_of_the_first_window_only_is_for_streams() -> None:
    text = """\
recipe: 1
data:
  one: {files: [a.txt], prefix: first}
verify: {quality: {perplexity: one}}
export: [onnx]
"""
    assert Recipe.parse(text).to_dict()["data"]["one"]["prefix"] == "first"
    every = Recipe.parse(text.replace("first", "every")).to_dict()["data"]["one"]
    assert set(every) == {"samples", "length", "seed", "column", "packing", "files"}
    with pytest.raises(RecipeError, match=r"recipe:3  data\.one\.prefix\n  got 'first', which is"):
        Recipe.parse(text.replace("prefix: first", "prefix: first, packing: packed"))
