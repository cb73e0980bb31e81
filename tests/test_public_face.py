"""What `prune_export` offers to programs: exactly this, typed, and cheap to import."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import prune_export
from prune_export import Machine, Options, Recipe, load, run
from prune_export.errors import CheckpointError
from tests import measured_here

RECIPE = """\
recipe: 1
data:
  calibration: {files: [calibration.txt], samples: 2, length: 16}
stages:
  - prune: {method: angular_distance, remove: 2, refit: false}
"""


def test_the_public_names_are_these() -> None:
    assert prune_export.__all__ == [
        "Loaded", "Machine", "Options", "Plan", "Provenance", "Recipe", "RunResult",
        "__version__", "contracts", "engines", "errors", "load", "plan", "plugins", "run",
    ]  # fmt: skip
    for name in prune_export.__all__:
        assert getattr(prune_export, name) is not None
        assert name in dir(prune_export)
    assert callable(prune_export.run)
    assert callable(prune_export.plan)


def test_a_name_that_is_not_public_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'prune'"):
        prune_export.prune  # noqa: B018


def test_importing_it_brings_nothing_heavy() -> None:
    code = "import sys, prune_export; print([m for m in ('torch', 'yaml') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.slow
def test_verbs_stay_functions_when_their_homes_are_imported_without_what_is_heavy() -> None:
    code = (
        "import prune_export.execution, prune_export.planning, prune_export.results.provenance\n"
        "from prune_export import load, plan, run\n"
        "print(callable(load), callable(plan), callable(run))\n"
        "import sys; print([m for m in ('matplotlib', 'transformers.models', 'peft')"
        " if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["True True True", "[]"]


@pytest.fixture(scope="module")
def result(tiny_llama: Path, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("public")
    machine = Machine.detect(device="cpu", threads=1)
    recipe = Recipe.parse(RECIPE, root=corpus)
    options = Options(folder / "out", folder / "store", machine)
    with pytest.MonkeyPatch.context() as patch:
        measured_here.install(patch)
        return run(recipe, str(tiny_llama), options).out


def test_a_result_is_loaded_with_how_it_was_made(result: Path) -> None:
    loaded = load(result)
    ids = torch.tensor([[3, 4, 5]])
    stock = AutoModelForCausalLM.from_pretrained(result).eval()
    assert torch.equal(loaded.model(ids).logits, stock(ids).logits)
    known = loaded.provenance
    assert known is not None
    assert (known.base, known.revision) == ("tiny-llama", None)
    assert list(known.artifacts) == ["stages.0.prune"]
    assert known.versions["prune_export"] == prune_export.__version__
    assert known.recipe().stages[0].name == "angular_distance"
    assert known.report["result"]["layers"] == 4
    assert known.changed() == ()


def test_what_was_changed_since_is_named(result: Path, tmp_path: Path) -> None:
    import shutil

    copy = shutil.copytree(result, tmp_path / "copy")
    (copy / "config.json").write_text((copy / "config.json").read_text() + "\n")
    (copy / "report.html").unlink()
    known = load(copy).provenance
    assert known is not None
    assert known.changed() == ("config.json", "report.html")


def test_a_model_of_others_has_no_provenance(tiny_llama: Path) -> None:
    loaded = load(tiny_llama, dtype="bfloat16")
    assert loaded.provenance is None
    assert loaded.model.dtype == torch.bfloat16


def test_what_cannot_be_loaded_is_told(result: Path, tmp_path: Path) -> None:
    import shutil

    with pytest.raises(CheckpointError, match="is no directory"):
        load(tmp_path / "absent")
    copy = shutil.copytree(result, tmp_path / "copy")
    (copy / "prune_recipe.lock.json").write_text('{"base": [], "artifacts": {}, "versions": {}}')
    with pytest.raises(CheckpointError, match="is not a lock of this tool"):
        load(copy)
