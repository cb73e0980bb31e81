"""GGUF files hold the model: read back by transformers, and run by llama.cpp where it is there."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from prune_export.errors import PlanError
from prune_export.exporters.gguf.shapes import rope_factors
from prune_export.exporters.gguf.vocabulary import _LLAMA3, _QWEN2, rules_of
from prune_export.exporters.gguf.writing import write_gguf
from prune_export.plugins import load_model, load_tokenizer
from tests.exporters.gguf.conftest import VOCABULARY

Make = Callable[..., Path]
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 16,
}  # fmt: skip
FAMILIES: list[tuple[str, dict[str, Any]]] = [
    ("llama", {}),
    ("llama", {"attention_bias": True, "tie_word_embeddings": True}),
    ("llama", {"head_dim": 16, "num_key_value_heads": 4}),
    ("qwen2", {"use_sliding_window": False}),
    ("qwen3", {"use_sliding_window": False, "head_dim": 128}),  # the only size transformers reads
]


def narrowed(model: Path, out: Path) -> Path:
    """The model with a head group, channels, an attention and an MLP of single blocks zeroed."""
    shutil.copytree(model, out)
    weights = load_file(out / "model.safetensors")
    name = "model.layers.{}.{}.weight".format
    weights[name(1, "mlp.down_proj")][:, 3:20] = 0
    weights[name(2, "self_attn.o_proj")][:, :16] = 0  # both heads of the first group
    weights[name(3, "self_attn.o_proj")][:] = 0
    weights[name(4, "mlp.down_proj")][:] = 0
    save_file(weights, out / "model.safetensors", {"format": "pt"})
    return out


@pytest.mark.parametrize(("model_type", "changes"), FAMILIES)
def test_what_transformers_reads_back_computes_the_same(
    model_of: Make, tmp_path: Path, model_type: str, changes: dict[str, Any]
) -> None:
    if changes.get("attention_bias"):
        pytest.skip("transformers leaves llama's biases out when it reads GGUF")
    model = model_of(model_type, **changes)
    found = write_gguf(model, tmp_path / "model.gguf", "f32")
    assert found.architecture == model_type
    assert found.bytes == (tmp_path / "model.gguf").stat().st_size
    back = AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file="model.gguf", dtype=torch.float32
    ).eval()
    ids = torch.randint(2, VOCABULARY - 30, (1, 24), generator=torch.manual_seed(0))
    with torch.no_grad():
        expected = load_model(model, dtype=torch.float32).eval()(ids).logits
        torch.testing.assert_close(back(ids).logits, expected, rtol=1e-4, atol=1e-4)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path, gguf_file="model.gguf")
    text = "the thin thing in the inn"
    assert tokenizer(text)["input_ids"] == load_tokenizer(model)(text)["input_ids"]


def test_the_same_bytes_each_time_and_no_half_written_file(model_of: Make, tmp_path: Path) -> None:
    files = [tmp_path / name for name in ("a.gguf", "b.gguf")]
    for file in files:
        write_gguf(model_of("llama"), file, "q8_0")
    # The name is the directory's, which is the same.
    assert files[0].read_bytes() == files[1].read_bytes()
    assert {path.name for path in tmp_path.iterdir()} == {"a.gguf", "b.gguf"}


def test_matrices_are_quantized_where_their_rows_allow_it(model_of: Make, tmp_path: Path) -> None:
    write_gguf(model_of("llama"), tmp_path / "q.gguf", "q8_0")
    types = {one.name: one.tensor_type.name for one in gguf.GGUFReader(tmp_path / "q.gguf").tensors}
    assert types["blk.0.attn_q.weight"] == "Q8_0"
    assert types["blk.0.ffn_down.weight"] == "F16"  # rows of 48
    assert types["blk.0.attn_norm.weight"] == "F32"
    weight = load_model(model_of("llama")).model.layers[0].self_attn.v_proj.weight
    (read,) = (one for one in gguf.GGUFReader(tmp_path / "q.gguf").tensors
               if one.name == "blk.0.attn_v.weight")  # fmt: skip
    values = gguf.quants.dequantize(read.data, read.tensor_type)
    assert np.abs(values - weight.detach().numpy()).max() < 0.01 * weight.abs().max().item()


def test_what_is_zero_in_single_blocks_is_left_out(model_of: Make, tmp_path: Path) -> None:
    model = narrowed(model_of("llama"), tmp_path / "narrow")
    found = write_gguf(model, tmp_path / "narrow.gguf", "f32")
    assert found.architecture == "deci"
    assert found.note == "trimmed: 5 heads, 33 channels"
    fields = gguf.GGUFReader(tmp_path / "narrow.gguf").fields
    read = {key: fields[f"deci.{key}"].contents() for key in
            ("feed_forward_length", "attention.head_count", "attention.head_count_kv")}  # fmt: skip
    assert read["feed_forward_length"] == [48, 31, 48, 48, 32, 48]
    assert read["attention.head_count"] == [4, 4, 2, 1, 4, 4]
    assert read["attention.head_count_kv"] == [2, 2, 1, 1, 2, 2]
    whole = write_gguf(model, tmp_path / "whole.gguf", "f32", keep_zeros=True)
    assert whole.architecture == "llama"
    assert whole.bytes > found.bytes


def test_llama3s_angles_are_those_of_transformers(model_of: Make) -> None:
    rotary = load_model(model_of("llama", rope_parameters=LLAMA3)).model.rotary_emb
    plain = 10000.0 ** (-np.arange(0, 8, 2) / 8)
    factors = rope_factors(LLAMA3, 8)
    assert factors is not None
    np.testing.assert_allclose(plain / factors, rotary.inv_freq.numpy(), rtol=1e-6)


def test_rules_of_splitting_are_named_or_refused() -> None:
    def raw(*parts: dict[str, Any], **model: Any) -> dict[str, Any]:
        return {"model": {"type": "BPE"} | model,
                "pre_tokenizer": {"type": "Sequence", "pretokenizers": list(parts)}}  # fmt: skip

    plain, last = {"type": "ByteLevel"}, {"type": "ByteLevel", "use_regex": False}
    digits = {"type": "Digits", "individual_digits": True}
    file = Path("tokenizer.json")
    assert rules_of(raw(plain), file) == "gpt-2"
    assert rules_of(raw(digits, plain), file) == "smollm"
    for pattern, name in ((_LLAMA3, "llama-bpe"), (_QWEN2, "qwen2")):
        assert rules_of(raw({"type": "Split", "pattern": {"Regex": pattern}}, last), file) == name
    for other in (
        raw({"type": "Split", "pattern": {"Regex": "x"}}, last),
        raw({"type": "Metaspace"}),
        raw(plain, byte_fallback=True),
        {"model": {"type": "Unigram"}},
    ):
        with pytest.raises(PlanError, match="splits text by rules"):
            rules_of(other, file)


@pytest.mark.parametrize(
    ("model_type", "changes", "says"),
    [
        ("gpt2", {}, "is not written as GGUF"),
        ("llama", {"hidden_act": "gelu"}, "expected silu"),
        ("mistral", {"sliding_window": 8}, "expected none"),
    ],
)
def test_what_llama_cpp_would_compute_otherwise_is_refused(
    model_of: Make, tmp_path: Path, model_type: str, changes: dict[str, Any], says: str
) -> None:
    with pytest.raises(PlanError, match=says):
        write_gguf(model_of(model_type, **changes), tmp_path / "no.gguf")
    assert not list(tmp_path.iterdir())


LLAMA_CPP: list[tuple[str, dict[str, Any], bool]] = [
    *((name, changes, False) for name, changes in FAMILIES),
    ("qwen3", {"use_sliding_window": False}, False),
    ("llama", {"rope_parameters": LLAMA3}, False),
    ("llama", {}, True),
]


@pytest.mark.parametrize(("model_type", "changes", "narrow"), LLAMA_CPP)
def test_llama_cpp_generates_the_same_32_tokens(
    model_of: Make, tmp_path: Path, model_type: str, changes: dict[str, Any], narrow: bool
) -> None:
    pytest.importorskip("xllamacpp")
    model = model_of(model_type, max_position_embeddings=64, **changes)
    if narrow:
        model = narrowed(model, tmp_path / "narrow")
    found = write_gguf(model, tmp_path / "model.gguf", "f32")
    assert found.architecture == ("deci" if narrow else model_type)
    ids = list(range(40, 52))
    # llama.cpp's server tells nothing of tokens that are no whole character.
    tokenizer = load_tokenizer(model)
    broken = [one for one in range(VOCABULARY) if not tokenizer.decode([one]).isascii()]
    broken += [0, 1, *range(len(tokenizer), VOCABULARY)]
    theirs = llama_cpp(tmp_path / "model.gguf", ids, 32, broken)
    reference = load_model(model, dtype=torch.float32).eval()
    with torch.no_grad():
        ours = reference.generate(
            torch.tensor([ids]), max_new_tokens=32, do_sample=False, suppress_tokens=broken
        )
        scores = reference(ours).logits[0].log_softmax(-1)
    assert [one["id"] for one in theirs] == ours[0, len(ids) :].tolist()
    for place, one in enumerate(theirs, len(ids) - 1):
        assert one["logprob"] == pytest.approx(scores[place, one["id"]].item(), abs=2e-3)


def llama_cpp(file: Path, ids: list[int], new: int, without: list[int]) -> list[dict[str, Any]]:
    """Greedy tokens with their log probabilities, in float32 throughout."""
    import xllamacpp as x

    given = x.CommonParams()
    given.model.path = str(file)
    given.n_ctx, given.n_gpu_layers, given.n_parallel, given.warmup = 64, 0, 1, False
    given.cpuparams.n_threads = given.cpuparams_batch.n_threads = 1
    given.flash_attn_type = x.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    given.cache_type_k = given.cache_type_v = x.ggml_type.GGML_TYPE_F32
    said = x.Server(given).handle_completions(
        {"prompt": ids, "n_predict": new, "temperature": 0, "n_probs": 1, "cache_prompt": False,
         "logit_bias": [[one, False] for one in without]}
    )  # fmt: skip
    answer = json.loads(said) if isinstance(said, str) else said
    found: list[dict[str, Any]] = answer["choices"][0]["logprobs"]["content"]
    return found
