import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, MixtralConfig, MixtralForCausalLM

from prune_export.arch.table import table_for
from prune_export.errors import VerifyError
from prune_export.machine import Machine
from prune_export.modeling import FOLDER
from prune_export.verify.reload import measure_reload
from prune_export.verify.reload_child import cache_difference

pytestmark = pytest.mark.slow


def changed(checkpoint: Path, out: Path, **tensors: torch.Tensor | None) -> Path:
    """A copy with tensors replaced or, where None, removed."""
    shutil.copytree(checkpoint, out)
    held = {**load_file(out / "model.safetensors"), **tensors}
    kept = {name: tensor for name, tensor in held.items() if tensor is not None}
    save_file(kept, out / "model.safetensors", metadata={"format": "pt"})
    return out


def test_loads_whole(tiny: Path, machine: Machine) -> None:
    found = measure_reload(tiny, machine)
    assert found.ok
    assert (found.model_type, found.missing, found.unexpected) == ("llama", [], [])
    model = AutoModelForCausalLM.from_pretrained(tiny)
    assert found.parameters == sum(parameter.numel() for parameter in model.parameters())


def test_loads_a_mixture_larger_than_memory(tmp_path: Path, machine: Machine) -> None:
    """Its experts are stored apart and merged in memory, so names on disk prove nothing."""
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=128,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
    )
    MixtralForCausalLM(config).bfloat16().save_pretrained(tmp_path / "mixtral")
    found = measure_reload(tmp_path / "mixtral", replace(machine, ram_bytes=150_000))
    assert found.ok
    assert found.model_type == "mixtral"


def test_names_missing_and_unexpected_tensors(tiny: Path, tmp_path: Path, machine: Machine) -> None:
    missing = "model.layers.1.mlp.up_proj.weight"
    surplus = "model.layers.9.mlp.up_proj.weight"
    tensors = {missing: None, surplus: torch.zeros(64, 32)}
    found = measure_reload(changed(tiny, tmp_path / "broken", **tensors), machine)
    assert not found.ok
    assert found.missing == [missing]
    assert found.unexpected == [surplus]


def test_refused_directory_says_why(tiny: Path, tmp_path: Path, machine: Machine) -> None:
    out = tmp_path / "unknown"
    shutil.copytree(tiny, out)
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps({**config, "model_type": "pruned_llama"}))
    with pytest.raises(VerifyError, match=r"could not load(.|\n)*pruned_llama"):
        measure_reload(out, machine)


def test_wrong_cache_index_is_found(tiny: Path) -> None:
    """What a depth cut gets when it forgets to renumber: two blocks share a cache entry."""
    model = AutoModelForCausalLM.from_pretrained(tiny).eval()
    assert cache_difference(model, 8) is None
    model.model.layers[2].self_attn.layer_idx = 1
    assert cache_difference(model, 8) is not None


def test_code_of_ours_is_run_and_no_other(tmp_path: Path, machine: Machine) -> None:
    config = AutoConfig.for_model(
        "sliced_llama",
        vocab_size=128,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    path = tmp_path / "sliced"
    AutoModelForCausalLM.from_config(config).save_pretrained(path)
    bundled = table_for("sliced_llama").bundled
    assert bundled is not None
    said = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**said, "auto_map": bundled.auto_map()}))
    for name in bundled.files:
        shutil.copy(FOLDER / name, path)
    found = measure_reload(path, machine)
    assert found.ok
    assert found.own_code
    with (path / bundled.files[1]).open("a") as file:
        file.write("\nraise SystemExit('a stranger was here')\n")
    with pytest.raises(VerifyError) as caught:
        measure_reload(path, machine)
    assert "trust_remote_code" in str(caught.value)
    assert "a stranger was here" not in str(caught.value)
