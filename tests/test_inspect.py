from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import matplotlib.image
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from prune_export.arch.table import table_for
from prune_export.calibrate import TokenSet
from prune_export.checkpoint import Checkpoint
from prune_export.inspect import Inspection, draw, inspect_model
from prune_export.machine import Machine

MACHINE = Machine("cpu", 8 * 1024**3, 0, 1)


def made(path: Path, layers: int, idle: tuple[int, ...] = ()) -> Inspection:
    """The inspection of a tiny llama in which the blocks `idle` hardly do anything."""
    settings: dict[str, Any] = {**table_for("llama").tiny.config, "num_hidden_layers": layers}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(LlamaConfig(**settings))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.6)
        for layer in idle:
            model.model.layers[layer].mlp.down_proj.weight.mul_(1e-3)
            model.model.layers[layer].self_attn.o_proj.weight.mul_(1e-3)
    model.save_pretrained(path)
    tokens = TokenSet.of(torch.randint(2, 64, (6, 16)))
    return inspect_model(Checkpoint.open(path), tokens, MACHINE, name="tiny $model")


def test_blocks_that_do_nothing_are_found(tmp_path: Path) -> None:
    found = made(tmp_path, 6, idle=(2, 3))
    assert sorted(np.argsort(found.block_influence)[:2].tolist()) == [2, 3]
    two = found.best_runs[1]
    assert (two.remove, two.first) == (2, 2)
    assert two.distance == found.distance_map[2][4] < 0.01
    assert two.margin is not None
    assert two.runner_up is not None
    assert two.margin == found.distance_map[two.runner_up][two.runner_up + 2] - two.distance
    assert [run.remove for run in found.best_runs] == [1, 2, 3, 4, 5]


def test_the_inspection_is_json(tmp_path: Path) -> None:
    found = made(tmp_path, 4)
    read = json.loads(json.dumps(found.to_json()))
    assert len(read["distance_map"]) == len(read["distance_map"][0]) == 5
    assert (read["model"], read["layers"], read["samples"], read["length"]) == (
        "tiny $model",
        4,
        6,
        16,
    )


@pytest.mark.slow
@pytest.mark.parametrize("layers", [1, 2, 5])
def test_the_picture_shows_the_map_and_is_the_same_each_time(tmp_path: Path, layers: int) -> None:
    found = made(tmp_path / "model", layers)
    draw(found, tmp_path / "a.png")
    draw(found, tmp_path / "b.png")
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    pixels = matplotlib.image.imread(tmp_path / "a.png")
    assert pixels.shape[0] > pixels.shape[1] > 1000
    assert len(np.unique(pixels.reshape(-1, pixels.shape[-1]), axis=0)) > 50
