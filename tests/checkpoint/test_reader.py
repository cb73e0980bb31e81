from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from prune_export.checkpoint import Checkpoint
from prune_export.errors import CheckpointError
from tests.checkpoint.raw_safetensors import parts, write

Saved = Callable[..., Path]
LLAMA = {"model_type": "llama"}


@pytest.fixture
def dtypes(tmp_path: Path) -> Path:
    """A directory with a tensor of each dtype that torch can save, scalars and empty ones too."""
    kinds = ["float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2",
             "int64", "int32", "int16", "int8", "uint8", "bool"]  # fmt: skip
    values = torch.arange(12).reshape(4, 3) % 5
    tensors = {kind: values.to(getattr(torch, kind)) for kind in kinds}
    tensors |= {"scalar": torch.tensor(2.5), "empty": torch.empty(0, 3)}
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    return tmp_path


def test_reads_what_safetensors_reads_in_every_dtype(dtypes: Path) -> None:
    checkpoint = Checkpoint.open(dtypes)
    wanted = load_file(dtypes / "model.safetensors")
    assert set(checkpoint.entries) == set(wanted)
    assert checkpoint.nbytes == sum(tensor.nbytes for tensor in wanted.values())
    for name, tensor in wanted.items():
        found = checkpoint.read(name)
        assert found.dtype == tensor.dtype
        assert found.shape == tensor.shape
        raw = tensor.reshape(-1).view(torch.uint8)
        assert torch.equal(found.reshape(-1).view(torch.uint8), raw)


def test_reads_rows_alone(dtypes: Path) -> None:
    checkpoint = Checkpoint.open(dtypes)
    wanted = load_file(dtypes / "model.safetensors")
    assert torch.equal(checkpoint.read_rows("bfloat16", 1, 3), wanted["bfloat16"][1:3])
    assert checkpoint.read_rows("float32", 4, 4).shape == (0, 3)
    assert checkpoint.read_rows("empty", 0, 0).shape == (0, 3)
    for name, start, stop in (("float32", 2, 5), ("float32", -1, 2), ("scalar", 0, 1)):
        with pytest.raises(CheckpointError, match="got rows"):
            checkpoint.read_rows(name, start, stop)


def test_what_is_read_is_its_own(dtypes: Path) -> None:
    checkpoint = Checkpoint.open(dtypes)
    checkpoint.read("float32").zero_()
    assert checkpoint.read("float32").sum() > 0


def test_an_unknown_name_lists_close_ones(dtypes: Path) -> None:
    with pytest.raises(CheckpointError, match="did you mean `float32`"):
        Checkpoint.open(dtypes).read("float23")


def test_a_file_cut_after_opening_is_noticed(dtypes: Path) -> None:
    checkpoint = Checkpoint.open(dtypes)
    last = list(checkpoint.entries)[-1]
    header, _ = parts(dtypes / "model.safetensors")
    write(dtypes / "model.safetensors", header, b"")
    with pytest.raises(CheckpointError, match="has changed since it was opened"):
        checkpoint.read(last)


def test_what_is_computed_with_holds_numbers_only(saved: Saved, tmp_path: Path) -> None:
    shutil.copytree(saved("llama"), tmp_path / "model")
    file, name = tmp_path / "model" / "model.safetensors", "model.layers.0.mlp.up_proj.weight"
    tensors = load_file(file)
    good = Checkpoint.open(tmp_path / "model")
    assert torch.equal(good.read_finite(name), good.read(name))
    tensors[name][1, 2:4] = torch.tensor([torch.nan, torch.inf])
    save_file(tensors, file, {"format": "pt"})
    broken = Checkpoint.open(tmp_path / "model")
    assert broken.read(name)[1, 2:4].isfinite().sum() == 0
    with pytest.raises(CheckpointError, match=rf"{name}\n  2 of \d+ values are NaN"):
        broken.read_finite(name)


def test_shards_give_the_same_as_one_file(saved: Saved) -> None:
    one, many = Checkpoint.open(saved("llama")), Checkpoint.open(saved("llama", shard="20KB"))
    assert len(many.files) > 3
    assert set(one.entries) == set(many.entries)
    assert one.nbytes == many.nbytes
    assert all(torch.equal(one.read(name), many.read(name)) for name in one.entries)
    assert one.arch().tensors == many.arch().tensors


def test_links_as_in_the_hubs_cache_are_followed(saved: Saved, tmp_path: Path) -> None:
    repository = tmp_path / "models--an--owner"
    blobs, snapshot = repository / "blobs", repository / "snapshots" / "0123"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, file in enumerate(sorted(saved("llama", shard="20KB").iterdir())):
        shutil.copy(file, blobs / str(number))
        (snapshot / file.name).symlink_to(f"../../blobs/{number}")
    assert len(Checkpoint.open(snapshot).arch().tensors) > 50


def test_the_single_file_wins_over_an_index_as_in_transformers(
    saved: Saved, tmp_path: Path
) -> None:
    shutil.copytree(saved("llama"), tmp_path / "both")
    (tmp_path / "both" / "model.safetensors.index.json").write_text("{}")
    checkpoint = Checkpoint.open(tmp_path / "both")
    assert [file.name for file in checkpoint.files] == ["model.safetensors"]
    AutoModelForCausalLM.from_pretrained(tmp_path / "both")


def test_without_weights_only_the_config_is_needed(saved: Saved, tmp_path: Path) -> None:
    shutil.copy(saved("llama") / "config.json", tmp_path)
    checkpoint = Checkpoint.open(tmp_path, weights=False)
    assert checkpoint.nbytes == 0
    assert checkpoint.arch().parameters() == Checkpoint.open(saved("llama")).nbytes // 4


def test_defaults_are_filled_in_and_code_is_not_run(saved: Saved, tmp_path: Path) -> None:
    path = tmp_path / "model"
    shutil.copytree(saved("llama"), path)
    config = json.loads((path / "config.json").read_text())
    del config["rms_norm_eps"]
    config["auto_map"] = {"AutoConfig": "configuration_evil.EvilConfig"}
    (path / "config.json").write_text(json.dumps(config))
    (path / "configuration_evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    full = Checkpoint.open(path).full_config()
    assert full["rms_norm_eps"] == 1e-6
    assert "auto_map" not in full
    assert not (tmp_path / "ran").exists()


def test_the_config_is_kept_as_it_stands(saved: Saved) -> None:
    raw = json.loads((saved("llama") / "config.json").read_text())
    assert list(Checkpoint.open(saved("llama")).config.items()) == list(raw.items())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_names_the_dtype_of_the_weights(saved: Saved, dtype: str) -> None:
    assert Checkpoint.open(saved("llama", dtype=dtype)).dtype == dtype


@pytest.mark.parametrize(
    ("model_type", "name"),
    [
        ("llama", "model.layers.0.self_attn.rotary_emb.inv_freq"),
        ("gpt2", "transformer.h.0.attn.bias"),
        ("gpt2", "transformer.h.0.attn.masked_bias"),
    ],
)
def test_buffers_of_old_releases_are_accepted(
    saved: Saved, tmp_path: Path, model_type: str, name: str
) -> None:
    checkpoint = Checkpoint.open(with_extra(saved(model_type), tmp_path, name))
    assert checkpoint.redundant(checkpoint.arch()) == (name,)


def test_gpt2_without_its_prefix_is_read_as_on_the_hub(saved: Saved, tmp_path: Path) -> None:
    shutil.copytree(saved("gpt2"), tmp_path / "old")
    file = tmp_path / "old" / "model.safetensors"
    header, data = parts(file)
    write(file, {name.removeprefix("transformer."): row for name, row in header.items()}, data)
    old, new = Checkpoint.open(tmp_path / "old"), Checkpoint.open(saved("gpt2"))
    assert old.arch().tensors == new.arch().tensors
    assert all(torch.equal(old.read(name), new.read(name)) for name in new.entries)


def test_what_is_carried_along_and_what_is_not(saved: Saved, tmp_path: Path) -> None:
    shutil.copytree(saved("llama"), tmp_path / "model")
    carried = ["LICENSE.txt", "chat_template.jinja", "generation_config.json", "merges.txt",
               "tokenizer.json", "tokenizer.model", "tokenizer_config.json"]  # fmt: skip
    for name in [*carried, "README.md", "training_args.bin", "modeling_evil.py", "events.log"]:
        (tmp_path / "model" / name).write_text("{}")
    found = Checkpoint.open(tmp_path / "model").side_files()
    assert [file.name for file in found] == carried


def test_opening_imports_neither_torch_nor_transformers(saved: Saved) -> None:
    code = (
        "import sys; from prune_export.checkpoint import Checkpoint; import prune_export.surgery; "
        f"Checkpoint.open({str(saved('llama'))!r}); "
        "print(sorted({'torch', 'transformers', 'numpy', 'gguf'} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def with_extra(source: Path, tmp_path: Path, name: str) -> Path:
    """A copy of a model that stores one tensor more: its embedding again, under `name`."""
    path = tmp_path / "extra"
    shutil.copytree(source, path)
    tensors = load_file(path / "model.safetensors")
    embedding = tensors.get("model.embed_tokens.weight", tensors.get("transformer.wte.weight"))
    save_file(tensors | {name: embedding.clone()}, path / "model.safetensors", {"format": "pt"})
    return path
