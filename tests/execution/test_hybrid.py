"""A model with blocks of two kinds, from checkpoint to measured engine."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from prune_export.arch.table import table_for
from prune_export.execution import Options, run
from prune_export.machine import Machine
from prune_export.recipe import Recipe

RECIPE = """\
recipe: 1
description: Drop two of six blocks, make 2 of 4 weights zero, heal a little, export.
data:
  calibration: {files: [calibration.txt], samples: 4, length: 32}
  healing: {files: [healing.jsonl], samples: 16, length: 32}
  evaluation: {files: [evaluation.txt], samples: 4, length: 64}
stages:
  - prune: {method: angular_distance, remove: 2}
  - prune: {method: wanda, nm: {keep: 2, of: 4}}
  - heal: {method: lora, rank: 2, steps: 3, batch: 2, learning_rate: 1.0e-3}
export:
  - onnx: {precision: fp32}
verify:
  quality: {perplexity: evaluation}
"""


@pytest.mark.usefixtures("measured_here")
@pytest.mark.slow
def test_a_hybrid_is_pruned_healed_exported_and_measured(
    tiny_llama: Path, corpus: Path, tmp_path: Path
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    settings = table_for("lfm2").tiny.config | {
        "vocab_size": len(tokenizer), "max_position_embeddings": 256,
        "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": None,
    }  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("lfm2", **settings))
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    options = Options(tmp_path / "out", tmp_path / "store", Machine.detect(device="cpu", threads=1))
    result = run(Recipe.parse(RECIPE, root=corpus), str(tmp_path / "model"), options)
    assert not result.failed
    written = json.loads((result.out / "config.json").read_text())
    dropped = json.loads((result.out / "report.json").read_text())["stages"][0]["log"]["dropped"]
    kinds = [kind for at, kind in enumerate(settings["layer_types"]) if at not in dropped]
    assert (written["num_hidden_layers"], written["layer_types"]) == (4, kinds)
    loaded = AutoModelForCausalLM.from_pretrained(result.out)
    for name, parameter in loaded.named_parameters():
        pruned = parameter.dim() == 2 and ".layers." in name
        zeros = float((parameter == 0).float().mean())
        assert zeros == (0.5 if pruned else 0.0), name
    found = result.verification
    assert found.reload.ok
    assert all(parity.ok for parity in found.parity)
    names = [one.name for one in found.perplexity]
    assert (names[0], names[-1]) == ("dense", "onnx")
    assert found.perplexity[-1].value == pytest.approx(found.perplexity[-2].value, rel=1e-3)
