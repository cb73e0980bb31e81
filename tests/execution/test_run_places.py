"""What a run reads is never what it writes over: each refused in the plan, before any work."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from prune_export.errors import PlanError
from prune_export.execution import Options, plan, run
from prune_export.machine import Machine
from prune_export.recipe import Recipe

DEEPEST = """\
recipe: 1
description: Drop two blocks.
stages:
  - prune: {method: deepest, remove: 2}
verify: {parity: false, generation: false}
"""


pytestmark = pytest.mark.usefixtures("measured_here")


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "deepest.yaml").write_text(DEEPEST)
    return Recipe.load(tmp_path / "recipes" / "deepest.yaml")


@pytest.fixture
def options(tmp_path: Path) -> Options:
    return Options(tmp_path / "out", tmp_path / "store", Machine.detect(device="cpu", threads=1))


@pytest.fixture
def result(tiny_llama: Path, options: Options) -> Path:
    """An earlier run's result, by an earlier version, less its report: what counts is its place."""
    options.out.mkdir()
    hashes = {}
    for file in tiny_llama.iterdir():
        (options.out / file.name).write_bytes(file.read_bytes())
        hashes[file.name] = hashlib.sha256(file.read_bytes()).hexdigest()
    (options.out / "prune_recipe.yaml").write_text(DEEPEST)
    lock = {"lock": 1, "artifacts": {"stages.0.prune": {"id": "prune-deepest-0", "files": hashes}}}
    (options.out / "prune_recipe.lock.json").write_text(json.dumps(lock))
    return options.out


def refused(recipe: Recipe, model: Path | str, options: Options) -> str:
    with pytest.raises(PlanError) as caught:
        plan(recipe, str(model), options).check()
    assert caught.value.fix
    return caught.value.problem


def test_what_a_result_has_got_since_is_not_destroyed(
    tiny_llama: Path, recipe: Recipe, options: Options, result: Path
) -> None:
    plan(recipe, str(tiny_llama), options).check()
    (result / "notes.txt").write_text("mine")
    (result / ".git").mkdir()
    assert "holds .git/ and notes.txt" in refused(recipe, tiny_llama, options)


@pytest.mark.slow
def test_a_place_that_is_read_is_not_written_to(
    tiny_llama: Path, tmp_path: Path, recipe: Recipe, options: Options, result: Path
) -> None:
    assert "is the model itself" in refused(recipe, result, options)
    published = Recipe.load(result / "prune_recipe.yaml")
    assert "is the data root itself" in refused(published, tiny_llama, options)
    published = replace(published, root=tmp_path / "recipes")
    assert "holds the recipe" in refused(published, tiny_llama, options)
    below = replace(options, store=result / "store")
    assert "holds the store" in refused(recipe, tiny_llama, below)
    inside = replace(options, out=options.store / "out")
    assert "lies in the store" in refused(recipe, tiny_llama, inside)
    assert "holds the model" in refused(recipe, tiny_llama, replace(options, out=tiny_llama.parent))
    assert "the data root" in refused(recipe, tiny_llama, replace(options, out=recipe.root))
    plan(recipe, str(tiny_llama), replace(options, out=recipe.root / "out")).check()


@pytest.mark.parametrize("make", [os.mkfifo, lambda path: os.symlink("nothing", path),
                                  lambda path: os.symlink("/dev/null", path)])  # fmt: skip
def test_what_is_no_directory_is_left_as_it_is(
    tiny_llama: Path, recipe: Recipe, options: Options, make: Callable[[Path], None]
) -> None:
    make(options.out)
    before = options.out.lstat()
    refused(recipe, tiny_llama, options)
    with pytest.raises(PlanError):
        run(recipe, str(tiny_llama), options)
    assert os.path.samestat(options.out.lstat(), before)
    assert not options.store.exists()


@pytest.mark.parametrize("out", ["/", ".", "./", "", "x/..", "a" * 256, "a" * 300 + "/b"])
def test_every_name_has_an_error_of_its_own(
    tiny_llama: Path, recipe: Recipe, options: Options, out: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(recipe.root)
    refused(recipe, tiny_llama, replace(options, out=Path(out)))


def test_a_foreign_directory_is_no_store(
    tiny_llama: Path, tmp_path: Path, recipe: Recipe, options: Options
) -> None:
    foreign = replace(options, store=tmp_path / "recipes")
    assert "is no store" in refused(recipe, tiny_llama, foreign)
    assert [path.name for path in foreign.store.iterdir()] == ["deepest.yaml"]


def test_a_link_to_an_empty_directory_stays_a_link(
    tiny_llama: Path, tmp_path: Path, recipe: Recipe, options: Options
) -> None:
    (tmp_path / "real").mkdir()
    options.out.symlink_to("real")
    found = run(recipe, str(tiny_llama), options)
    assert found.out == options.out
    assert options.out.is_symlink()
    assert (tmp_path / "real" / "config.json").is_file()
    # And again into the same place, with what is killed swept away.
    run(recipe, str(tiny_llama), options)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "real", "recipes", "store"]


def test_only_the_caller_names_a_model_outside_of_the_data_root(
    tiny_llama: Path, tmp_path: Path, options: Options, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "root").mkdir()
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "model").symlink_to(tiny_llama)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path / "home")

    def named(model: str) -> Recipe:
        return Recipe.parse(f"{DEEPEST}model: {model}\n", root=tmp_path / "root")

    for model in ("~/model", "model", "./model", str(tiny_llama), "../home/model", "..", "/",
                  f"~{os.environ.get('USER', 'root')}/x", '""'):  # fmt: skip
        with pytest.raises(PlanError) as caught:
            plan(named(model), None, options)
        assert "--model" in caught.value.fix or "hf download" in caught.value.fix, model
    plan(named("nothing"), "~/model", options)
    plan(named("nothing"), "model", options)
    (tmp_path / "root" / "model").symlink_to(tiny_llama)
    with pytest.raises(PlanError, match="leaves the data root"):
        plan(named("model"), None, options)
    (tmp_path / "root" / "model").unlink()
    (tmp_path / "root" / "model").mkdir()
    for file in tiny_llama.iterdir():
        (tmp_path / "root" / "model" / file.name).write_bytes(file.read_bytes())
    plan(named("model"), None, options)
