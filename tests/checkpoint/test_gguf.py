from __future__ import annotations

import builtins
import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import psutil
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from prune_export.arch import Arch
from prune_export.checkpoint import filled, gguf_config, import_gguf
from prune_export.checkpoint.gguf_header import read_gguf_header
from prune_export.errors import (
    CheckpointError,
    MissingExtra,
    PlanError,
    PruneExportError,
    UnsupportedArch,
)
from prune_export.progress import Silent
from tests.checkpoint.gguf_files import tiny_model, vocabulary, write_gguf

PROMPT = torch.tensor([[5, 9, 40, 3, 17, 22, 8, 61]])


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    return tiny_model()


@pytest.fixture(scope="module")
def file(model: LlamaForCausalLM, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf", model)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(PROMPT).logits


def test_the_header_tells_what_the_file_holds(file: Path, model: LlamaForCausalLM) -> None:
    header = read_gguf_header(file)
    assert header.architecture == "llama"
    assert header.metadata["llama.block_count"] == 2
    assert header.metadata["llama.attention.layer_norm_rms_epsilon"] == np.float32(1e-5)
    assert "tokenizer.ggml.tokens" not in header.metadata
    assert header.tensors["blk.1.ffn_down.weight"] == (32, 64)
    assert header.parameters == sum(p.numel() for p in model.parameters())


def test_the_config_is_known_without_weights(file: Path, model: LlamaForCausalLM) -> None:
    arch = Arch.from_config(gguf_config(file))
    assert arch.parameters() == sum(parameter.numel() for parameter in model.parameters())
    assert arch.layers == 2


def test_an_import_computes_what_the_model_computes(
    file: Path, model: LlamaForCausalLM, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    import_gguf(file, tmp_path)
    assert capfd.readouterr() == ("", "")
    found, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert torch.equal(logits(found), logits(model))
    text = (tmp_path / "config.json").read_text()
    assert json.loads(text)["architectures"] == ["LlamaForCausalLM"]
    assert "name_or_path" not in text
    assert str(file.parent) not in "".join(p.read_text() for p in tmp_path.glob("*.json"))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    ids = tokenizer("the hen", add_special_tokens=False)["input_ids"]
    assert [vocabulary()[i] for i in ids] == ["t", "he", "Ġ", "he", "n"]
    assert tokenizer.decode(ids) == "the hen"


def test_quantized_weights_are_dequantized(model: LlamaForCausalLM, tmp_path: Path) -> None:
    kind = gguf.GGMLQuantizationType.Q8_0
    quantized = write_gguf(tmp_path / "q8.gguf", model, kind=kind)
    checkpoint = import_gguf(quantized, tmp_path / "out")
    name = "model.layers.1.mlp.down_proj.weight"
    raw = gguf.quants.quantize(model.state_dict()[name].numpy(), kind)
    wanted = torch.from_numpy(gguf.quants.dequantize(raw, kind))
    assert torch.equal(checkpoint.read(name), wanted)
    assert not torch.equal(wanted, model.state_dict()[name])
    assert checkpoint.dtype == "float32"


def test_the_same_file_gives_the_same_bytes(file: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        import_gguf(file, tmp_path / name)
    one, other = (
        {f.name: f.read_bytes() for f in (tmp_path / name).iterdir()} for name in ("a", "b")
    )
    assert one == other


def test_progress_counts_the_tensors(file: Path, tmp_path: Path) -> None:
    class Counting(Silent):
        labels: tuple[str, ...] = ()

        def task(self, label: str, total: float | None = None) -> Any:
            self.labels += (f"{label}: {total}",)
            return super().task(label, total)

    told = Counting()
    import_gguf(file, tmp_path, told)
    assert told.labels[0] == f"dequantizing {file.name}: 21"


def test_what_was_replaced_in_other_packages_is_put_back(file: Path) -> None:
    from transformers import modeling_gguf_pytorch_utils as reading
    from transformers.utils import logging

    def state() -> tuple[object, ...]:
        return gguf.GGUFReader, gguf.get_tensor_name_map, reading.tqdm, logging.get_verbosity()

    before = state()
    gguf_config(file)
    assert state() == before


# --- what is refused -----------------------------------------------------------------------------


def cut_at(share: float) -> Callable[[Path], None]:
    return lambda path: os.truncate(path, int(path.stat().st_size * share))


def patched(at: int, content: bytes) -> Callable[[Path], None]:
    def patch(path: Path) -> None:
        whole = bytearray(path.read_bytes())
        whole[at : at + len(content)] = content
        path.write_bytes(bytes(whole))

    return patch


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (cut_at(0), "cannot be read as GGUF"),
        (patched(0, b"GGML"), "begins with b'GGML'"),
        (patched(4, struct.pack("<I", 1)), "is GGUF version 1"),
        (patched(4, struct.pack(">I", 3)), "little endian"),
        (cut_at(0.001), "is truncated: its header goes on"),
        (cut_at(0.02), "is truncated: its header goes on"),
        (cut_at(0.5), "is truncated at"),
        (cut_at(0.999), "is truncated at"),
        (patched(8, struct.pack("<Q", 2**60)), "entries, at most"),
        (patched(16, struct.pack("<Q", 2**60)), "entries, at most"),
        (patched(24, struct.pack("<Q", 2**63)), "announces a text of"),
    ],
)
def test_a_damaged_file_is_refused(
    file: Path, tmp_path: Path, damage: Callable[[Path], None], said: str
) -> None:
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(file.read_bytes())
    damage(broken)
    for call in (lambda: gguf_config(broken), lambda: import_gguf(broken, tmp_path / "out")):
        with pytest.raises(CheckpointError) as caught:
            call()
        assert said in str(caught.value)
        assert str(broken) in caught.value.where
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "kind", "said"),
    [
        ({"architecture": "whatever"}, UnsupportedArch, "got 'whatever', which transformers"),
        ({"architecture": "mamba"}, UnsupportedArch, "no architecture table describes"),
        ({"numbers": {"split.count": 3}}, CheckpointError, "llama-gguf-split --merge"),
        (
            {"tensors": {"rope_freqs.weight": np.ones(4, np.float32)}},
            UnsupportedArch,
            "scales the rotary embedding",
        ),
        (
            {"strings": {"llama.rope.scaling.type": "yarn"}},
            UnsupportedArch,
            "scales the rotary embedding",
        ),
        ({"without": "blk.1.ffn_up.weight"}, CheckpointError, "is not in the file (1 tensors"),
    ],
)
def test_a_model_that_would_not_be_exact_is_refused(
    model: LlamaForCausalLM,
    tmp_path: Path,
    changes: dict[str, Any],
    kind: type[PruneExportError],
    said: str,
) -> None:
    other = write_gguf(tmp_path / "other.gguf", model, **changes)
    with pytest.raises(kind) as caught:
        import_gguf(other, tmp_path / "out")
    assert said in str(caught.value)
    assert caught.value.fix
    assert not (tmp_path / "out").exists()


def test_too_little_memory_is_refused_before_the_work(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Little:
        available = 1000

    monkeypatch.setattr(psutil, "virtual_memory", Little)
    with pytest.raises(PlanError, match="of memory to be dequantized, 1000 B are available"):
        import_gguf(file, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_config_is_kept_for_the_next_plan(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reading it takes seconds where the vocabulary is large."""
    monkeypatch.setattr(filled, "user_cache", lambda: tmp_path)
    made = gguf_config(file)
    kept = filled._file(filled._beginning(file))
    assert kept is not None
    monkeypatch.setattr("prune_export.checkpoint.gguf.read_gguf_header", None)
    assert gguf_config(file) == made
    monkeypatch.undo()
    monkeypatch.setattr(filled, "user_cache", lambda: tmp_path)
    longer = tmp_path / "longer.gguf"
    longer.write_bytes(file.read_bytes() + b"\0" * 32)
    for damaged in ("", "[]", "{}"):
        kept.write_text(damaged)
        assert filled.kept_gguf_config(file) is None
        assert gguf_config(file) == made
    assert filled.kept_gguf_config(longer) is None


def test_a_missing_package_names_its_extra(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(filled, "user_cache", lambda: tmp_path)
    real = builtins.__import__

    def without(name: str, *rest: Any, **more: Any) -> Any:
        if name == "gguf":
            raise ImportError(name)
        return real(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(MissingExtra, match=r'pip install "prune-export\[gguf\]"'):
        gguf_config(file)


def test_sizes_that_transformers_gives_other_names_are_refused(tmp_path: Path) -> None:
    """It reads falcon's sizes under llama's names, and builds one of falcon's default sizes."""
    file = write_gguf(tmp_path / "falcon.gguf", tiny_model(), architecture="falcon")
    with pytest.raises(UnsupportedArch) as caught:
        gguf_config(file)
    assert "intermediate_size, num_key_value_heads, rms_norm_eps" in caught.value.problem
    assert "no falcon config has" in caught.value.problem
    assert caught.value.fix == "start from the original safetensors model"
