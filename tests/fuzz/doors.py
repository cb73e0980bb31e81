"""The doors that damaged inputs are fed to. To add one: a valid input, and what reads it.

Each `make` writes a whole valid folder, each `call` reads it as the package does.
"""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

from mutate import Door

from prune_export.checkpoint import Checkpoint, card_license, packed_in, read_gguf_header
from prune_export.checkpoint.loading import load_ends, load_tokenizer
from prune_export.execution import Options, plan
from prune_export.exporters.aoti import runner as aoti_runner
from prune_export.exporters.ort_genai import runner as ort_genai_runner
from prune_export.exporters.ort_genai import support
from prune_export.hub import publishing
from prune_export.machine import Machine
from prune_export.recipe import Recipe
from prune_export.report import Report, model_card, summary_rows
from prune_export.results.opening import _exports

TESTS = Path(__file__).parents[1]
CONFIGS: Mapping[str, Mapping[str, Any]] = {
    "llama": {"head_dim": 8, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
    "gemma3_text": {"head_dim": 16, "layer_types": ["sliding_attention", "full_attention"],
                    "sliding_window": 8},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
                  "decoder_sparse_step": 1, "mlp_only_layers": []},
    "phi3": {"pad_token_id": 0, "hidden_size": 64, "rope_parameters": {"rope_type": "default"}},
}  # fmt: skip
_SIZES = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
          "num_attention_heads": 4, "num_key_value_heads": 2,
          "max_position_embeddings": 64}  # fmt: skip


def _written(name: str, value: Any) -> Callable[[Path], None]:
    def make(place: Path) -> None:
        text = value if isinstance(value, str | bytes) else json.dumps(value)
        (place / name).write_bytes(text.encode() if isinstance(text, str) else text)

    return make


def _config(model_type: str) -> dict[str, Any]:
    sizes = {} if model_type == "gpt2" else _SIZES
    return {"model_type": model_type, **sizes, **CONFIGS[model_type]}


def _arch(place: Path) -> None:
    Checkpoint.open(place, weights=False).arch().parameters()


def _wrapped(name: str) -> dict[str, Any]:
    """The config of a model of images and text."""
    text = {**_config("llama"), "model_type": {"llava": "llama"}.get(name, f"{name}_text")}
    vision = {"depth": 1, "deepstack_visual_indexes": [0]} if name != "llava" else {}
    return {"model_type": name, "text_config": text, "vision_config": vision,
            "tie_word_embeddings": False}  # fmt: skip


def _packed(place: Path) -> None:
    found = packed_in(place)
    if found is not None:
        found.alone().arch().parameters()


def _genai(place: Path) -> None:
    arch = Checkpoint.open(place, weights=False).arch()
    support.corrections(arch.config)
    support.head_size(arch.config)
    support.refuse(arch)


@cache
def _tiny() -> Path:
    """A saved model of 2 blocks, in two shards, with a tokenizer."""
    from tokenizers import Tokenizer, models
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = Path(mkdtemp(prefix="prune-export-fuzz-model-"))
    config = LlamaConfig(**_SIZES)
    LlamaForCausalLM(config).save_pretrained(folder, max_shard_size="30KB")
    raw = Tokenizer(models.WordLevel({"a": 0, "b": 1, "</s>": 2}, unk_token="a"))
    PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="</s>").save_pretrained(folder)
    return folder


def _saved(place: Path) -> None:
    shutil.copytree(_tiny(), place, dirs_exist_ok=True)


def _single(place: Path) -> None:
    import torch
    from safetensors.torch import save_file

    (place / "config.json").write_text(json.dumps(_config("llama")))
    save_file({"a": torch.ones(3, 4), "b": torch.ones(2)}, place / "model.safetensors",
              metadata={"format": "pt"})  # fmt: skip


def _gguf(place: Path) -> None:
    def text(value: bytes) -> bytes:
        return struct.pack("<Q", len(value)) + value

    pairs = [text(b"general.architecture") + struct.pack("<I", 8) + text(b"llama"),
             text(b"general.alignment") + struct.pack("<II", 4, 32),
             text(b"llama.block_count") + struct.pack("<II", 4, 1),
             text(b"tokens") + struct.pack("<IIQ", 9, 8, 2) + text(b"a") + text(b"b")]  # fmt: skip
    tensor = text(b"token_embd.weight") + struct.pack("<I2QIQ", 2, 8, 4, 0, 0)
    head = b"GGUF" + struct.pack("<IQQ", 3, 1, len(pairs)) + b"".join(pairs) + tensor
    head += b"\0" * (-len(head) % 32)
    (place / "model.gguf").write_bytes(head + b"\0" * 128)


def _plan(place: Path) -> None:
    recipe = Recipe.parse(
        "recipe: 1\nstages:\n  - prune: {method: deepest, remove: 1}\nverify: {parity: false}\n"
    )
    machine = Machine.detect(device="cpu", threads=1)
    plan(recipe, str(place), Options(place.parent / "out", place.parent / "store", machine))


def _report(place: Path) -> None:
    report = Report.load(place / "report.json")
    summary_rows(report)
    model_card(report)


def _verification(place: Path) -> None:
    publishing._check_verified(place)


def _recipe(place: Path) -> None:
    Recipe.load(place / "recipe.yaml")


def _full() -> dict[str, Any]:
    found: dict[str, Any] = json.loads((TESTS / "report" / "full.json").read_text("utf-8"))
    for checks in found["verification"]["speed"]:
        for key in ("dense_seconds", "pruned_seconds"):
            checks[key] = checks[key][:8]
    for one in found["verification"]["perplexity"]:
        one["losses"] = one["losses"][:10]
    found["stages"][0]["log"].pop("distance_map", None)
    return found


def _checks() -> dict[str, Any]:
    checks = _full()["verification"]
    for gate in checks["gates"]:
        gate["ok"] = True
    return dict(checks)


CARD = """\
---
license: apache-2.0
tags:
  - a
  - b
model-index:
  - name: x
    results: [{metrics: [{value: 1.5}]}]
date: 2024-01-02
---
# Text
"""
RECIPE = """\
recipe: 1
description: Two blocks.
data:
  calibration: {files: [a.txt], samples: 4, length: 32}
stages:
  - prune: {method: angular_distance, remove: 2}
  - heal: {method: lora, rank: 2, steps: 3, batch: 2, learning_rate: 1.0e-3}
export:
  - onnx: {precision: fp32}
verify:
  quality: {perplexity: calibration}
publish: {repo: a/b}
"""
GENAI = {"search": {"past_present_share_buffer": True}, "model": {"decoder": {"head_size": 16}}}
ABOUT = {"device": "cpu", "dtype": "float32", "cache": [[2, 8], [2, 8]], "torch": "2.13.0"}

DOORS: list[Door] = [
    *(
        Door(f"config-{name}", "config.json", "json", _written("config.json", _config(name)), _arch)
        for name in CONFIGS
    ),
    *(
        Door(f"wrapped-{name}", "config.json", "json",
             _written("config.json", _wrapped(name)), _arch)
        for name in ("llava", "qwen3_vl")
    ),
    Door("packed", "config.json", "json", _written("config.json", {
        **_config("llama"), "dtype": "bfloat16",
        "quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]},
    }), _packed),
    *(
        Door(f"genai-support-{name}", "config.json", "json",
             _written("config.json", _config(name)), _genai)
        for name in ("gemma3_text", "phi3")
    ),
    Door("plan", "config.json", "json", _written("config.json", _config("llama")), _plan, 0.3),
    Door("index", "model.safetensors.index.json", "json", _saved, Checkpoint.open),
    Door("weights", "model.safetensors", "safetensors", _single, Checkpoint.open, 2.0),
    Door("tokenizer-settings", "tokenizer_config.json", "json", _saved, load_tokenizer, 0.3),
    Door("tokenizer", "tokenizer.json", "json", _saved, load_tokenizer, 0.3),
    Door("generation", "generation_config.json", "json",
         _written("generation_config.json", {"eos_token_id": [1, 2]}), load_ends),
    Door("card", "README.md", "text", _written("README.md", CARD), card_license, 2.0),
    Door("gguf", "model.gguf", "gguf", _gguf,
         lambda place: read_gguf_header(place / "model.gguf"), 2.0),
    Door("report", "report.json", "json", lambda place: _written("report.json", _full())(place),
         _report),
    Door("exports", "report.json", "json", lambda place: _written("report.json", _full())(place),
         _exports, 0.5),
    Door("verification", "verify.json", "json",
         lambda place: _written("verify.json", _checks())(place), _verification),
    Door("genai-config", "genai_config.json", "json", _written("genai_config.json", GENAI),
         ort_genai_runner._read_config),
    Door("aoti", "aoti.json", "json", _written("aoti.json", ABOUT),
         lambda place: aoti_runner._read_about(place / "aoti.json")),
    Door("recipe", "recipe.yaml", "text", _written("recipe.yaml", RECIPE), _recipe),
]  # fmt: skip
