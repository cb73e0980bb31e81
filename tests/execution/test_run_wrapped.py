"""A model of images and text goes through a run: its language model is cut, healed and exported."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors import safe_open

import prune_export
from prune_export.checkpoint import Checkpoint
from prune_export.errors import PlanError
from prune_export.execution import Options, plan, run
from prune_export.machine import Machine
from prune_export.recipe import Recipe
from tests.checkpoint.tiny_wrappers import save_wrapper

RECIPE = """\
recipe: 1
description: Drop two of six blocks, heal a little, quantize, export.
data:
  calibration: {files: [calibration.txt], samples: 4, length: 32}
  healing: {files: [healing.jsonl], samples: 16, length: 32}
  evaluation: {files: [evaluation.txt], samples: 2, length: 32}
stages:
  - prune: {method: angular_distance, remove: 2}
  - heal: {method: lora, rank: 2, steps: 3, batch: 2, learning_rate: 1.0e-3}
  - quantize: {method: rtn, bits: 4, group_size: 16}
export:
  - gptq_format: {}
verify:
  quality: {perplexity: evaluation}
"""


@pytest.fixture(scope="module")
def gemma3(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gemma3")
    save_wrapper("gemma3", folder, vocab_size=258, max_position_embeddings=256)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((tiny_llama / name).read_bytes())
    (folder / "preprocessor_config.json").write_text('{"size": 8}\n')
    return folder


@pytest.fixture
def options(tmp_path: Path) -> Options:
    return Options(tmp_path / "out", tmp_path / "store", Machine.detect(device="cpu", threads=1))


@pytest.mark.slow
def test_the_language_model_is_pruned_in_place(
    gemma3: Path, corpus: Path, options: Options, measured_here: None
) -> None:
    recipe = Recipe.parse(RECIPE, root=corpus)
    planned = plan(recipe, str(gemma3), options)
    assert "its language model is cut" in planned.notes[0]
    assert "take no images" in planned.notes[1]
    rest = Checkpoint.open(gemma3).wrapped
    assert rest is not None
    first = planned.stages[0]
    assert first.cost.disk_bytes == first.after.bytes + rest.carried_bytes
    result = run(recipe, str(gemma3), options)
    assert result.verification.reload.ok
    assert result.verification.reload.model_type == "gemma3"
    assert [one.name for one in result.verification.perplexity][:3] == ["dense", "pruned", "healed"]
    out = options.out
    assert json.loads((out / "config.json").read_text())["text_config"]["num_hidden_layers"] == 4
    carried = Checkpoint.open(out).wrapped
    assert carried is not None
    with (
        safe_open(gemma3 / "model.safetensors", "pt") as old,
        safe_open(out / "model.safetensors", "pt") as new,
    ):
        for name in carried.carried:
            assert old.get_tensor(name).equal(new.get_tensor(name)), name
    assert (out / "preprocessor_config.json").read_text() == '{"size": 8}\n'
    engine = json.loads((out / "gptq" / "config.json").read_text())
    assert engine["model_type"] == "gemma3_text"
    assert engine["num_hidden_layers"] == 4
    loaded = prune_export.load(out)
    assert type(loaded.model).__name__ == "Gemma3ForConditionalGeneration"
    assert loaded.provenance is not None
    assert not loaded.provenance.changed()
    card = (out / "README.md").read_text()
    assert "AutoModelForImageTextToText.from_pretrained" in card
    assert "pipeline_tag: image-text-to-text" in card
    assert "its language model is cut" in card


def test_a_cut_of_what_the_projector_ends_in_is_refused_in_the_plan(
    gemma3: Path, corpus: Path, options: Options
) -> None:
    text = RECIPE.replace("method: angular_distance, remove: 2", "method: minitron, hidden: 0.5")
    with pytest.raises(PlanError, match=r"stages\.0\.prune\.minitron\n.*of this gemma3 model too"):
        plan(Recipe.parse(text, root=corpus), str(gemma3), options)
