"""Modules that predict further tokens are left behind, and config.json says so."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from prune_export.checkpoint import Checkpoint
from prune_export.errors import CheckpointError
from prune_export.planning.wrapped import further_notes
from prune_export.surgery import Drop, rewrite
from tests.saved_models import maker


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    return maker(tmp_path_factory.mktemp)


def with_further(source: Path, out: Path, **config: int) -> Path:
    """Adds the tensors of one module after the last block, as published files have them."""
    out.mkdir()
    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.6.enorm.weight"] = torch.ones(32)
    tensors["model.layers.6.eh_proj.weight"] = torch.ones(32, 64)
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    said = json.loads((source / "config.json").read_text()) | config
    (out / "config.json").write_text(json.dumps(said))
    return out


@pytest.mark.parametrize("model_type", ["deepseek_v3", "glm4_moe"])
@pytest.mark.parametrize("key", ["num_nextn_predict_layers", "num_mtp_layers"])
def test_they_are_left_behind_and_counted_no_more(
    saved: Callable[..., Path], tmp_path: Path, model_type: str, key: str
) -> None:
    plain = saved(model_type)
    whole = json.loads((plain / "config.json").read_text())
    whole.pop("num_nextn_predict_layers", None)
    whole.pop("num_mtp_layers", None)
    source = with_further(plain, tmp_path / "whole")
    (source / "config.json").write_text(json.dumps(whole | {key: 1}))
    opened = Checkpoint.open(source)
    arch = opened.arch()
    assert arch.parameters() == Checkpoint.open(plain).arch().parameters()
    assert "MTP, 2 tensors, 8.12 KiB" in further_notes(opened, arch)[0]
    assert further_notes(Checkpoint.open(plain), arch) == ()
    after = rewrite(opened, arch, [Drop((3,))], tmp_path / "cut", ram_bytes=1 << 30)
    assert after.config[key] == 0
    assert not any("enorm" in name for name in after.entries)
    _, report = AutoModelForCausalLM.from_pretrained(tmp_path / "cut", output_loading_info=True)
    assert not any(report.values()), report


def test_tensors_that_no_key_counts_are_refused(saved: Callable[..., Path], tmp_path: Path) -> None:
    source = with_further(saved("deepseek_v3"), tmp_path / "whole")
    said = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(said | {"num_nextn_predict_layers": 0}))
    with pytest.raises(CheckpointError, match=r"layers\.6\.eh_proj.*\n.*is not part of"):
        Checkpoint.open(source).arch()


@pytest.mark.parametrize(
    ("model_type", "said"), [("qwen3_next", {}), ("qwen3_5_text", {"mtp_num_hidden_layers": 1})]
)
def test_those_under_a_name_of_their_own_are_left_behind(
    saved: Callable[..., Path], tmp_path: Path, model_type: str, said: dict[str, int]
) -> None:
    """Qwen's lie beside the blocks; in Qwen3-Next no key of the config counts them."""
    plain = saved(model_type)
    tensors = load_file(plain / "model.safetensors") | {"mtp.fc.weight": torch.ones(32, 64)}
    (tmp_path / "whole").mkdir()
    save_file(tensors, tmp_path / "whole" / "model.safetensors", {"format": "pt"})
    config = json.loads((plain / "config.json").read_text()) | said
    (tmp_path / "whole" / "config.json").write_text(json.dumps(config))
    opened = Checkpoint.open(tmp_path / "whole")
    after = rewrite(opened, opened.arch(), [Drop((3,))], tmp_path / "cut", ram_bytes=1 << 30)
    assert "mtp.fc.weight" not in after.entries
    assert {key: after.config[key] for key in said} == dict.fromkeys(said, 0)
    assert "MTP, 1 tensors" in further_notes(opened, opened.arch())[0]
