"""Runs a recipe to the end, by the real command, on a random model of each new kind.

    python benchmarks/kinds.py --work /tmp/kinds            # all kinds; about two minutes each
    python benchmarks/kinds.py --work /tmp/kinds --only hybrid

A kind is something that the first families did not have: blocks that differ, experts beside shared
ones, latent attention, a language model within one of images and text, a type without a table. Each
model is pruned, healed, exported to `onnx` and verified: reload by stock transformers, parity,
perplexity, speed of dense and pruned engines in turns. Models are random, so qualities say nothing
but that engine and checkpoint agree. The result is kept in `benchmarks/results`.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import torch
from _result import save
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

from prune_export.arch.table import table_for, tables

_PLAIN: Final = {"hidden_size": 64, "num_hidden_layers": 8, "max_position_embeddings": 512}
KINDS: Final[Mapping[str, tuple[str, Mapping[str, Any]]]] = {
    "hybrid of short convolutions": ("lfm2", {}),
    "hybrid of gated delta nets": ("qwen3_next", {}),
    "hybrid of Mamba": ("jamba", {}),
    "shared experts": ("qwen2_moe", {}),
    "latent attention, dense first blocks": ("deepseek_v3", {}),
    "images and text": ("gemma3", {}),
    "a type without a table": ("biogpt", _PLAIN),
}

RECIPE: Final = """\
recipe: 1
description: Drop a fifth of the blocks, heal a little, export.
data:
  calibration: {files: [text.txt], samples: 16, length: 64}
  healing: {files: [healing.txt], samples: 32, length: 64}
  evaluation: {files: [evaluation.txt], samples: 8, length: 64}
stages:
  - prune: {method: angular_distance, remove: 1}
  - heal: {method: full, steps: 10, batch: 4, learning_rate: 1.0e-4}
export:
  - onnx: {precision: fp32}
verify:
  quality: {perplexity: evaluation}
  speed: {workloads: [{batch: 1, prompt: 16, new: 16}], minutes: 0.5}
"""


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--work", type=Path, required=True, metavar="DIR")
    arguments.add_argument("--only", default="", metavar="WORD", help="kinds whose name has it")
    given = arguments.parse_args()
    data = given.work / "data"
    write_text(data)
    (given.work / "recipe.yaml").write_text(RECIPE, encoding="utf-8")
    rows = []
    for kind, (model_type, changes) in KINDS.items():
        if given.only in kind:
            rows.append(ran(given.work, data, kind, model_type, changes))
            print(json.dumps(rows[-1]), flush=True)
    if not given.only:
        print(save("kinds", {"recipe": RECIPE, "rows": rows}))
    if not all(row["ok"] for row in rows):
        sys.exit(1)


def ran(
    work: Path, data: Path, kind: str, model_type: str, changes: Mapping[str, Any]
) -> dict[str, Any]:
    """Runs the recipe on one model; what was found, and the processor seconds of the command."""
    model, out = work / model_type, work / f"{model_type}-out"
    if not (model / "config.json").is_file():
        write_model(model_type, changes, model)
    command = [
        sys.executable, "-m", "prune_export", "run", str(work / "recipe.yaml"),
        "--model", str(model), "--data-root", str(data), "--store", str(work / "store"),
        "--out", str(out), "--threads", "1", "--device", "cpu", "--quiet",
    ]  # fmt: skip
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    row: dict[str, Any] = {
        "kind": kind, "model_type": model_type, "ok": done.returncode == 0,
        "cpu_seconds": round(resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before, 1),
    }  # fmt: skip
    if not row["ok"]:
        return row | {"said": done.stderr.strip()[-600:]}
    found = json.loads((out / "verify.json").read_text(encoding="utf-8"))
    return row | {
        "reload": found["reload"]["ok"],
        "parity": {one["engine"]: one["ok"] for one in found["parity"]},
        "perplexity": {one["name"]: round(one["value"], 3) for one in found["perplexity"]},
        "parameters": sum(parameter.numel() for parameter in loaded(out, model_type).parameters()),
    }


def loaded(path: Path, model_type: str) -> Any:
    """The result as stock transformers loads it."""
    auto = AutoModelForImageTextToText if model_type == "gemma3" else AutoModelForCausalLM
    return auto.from_pretrained(path)


def write_model(model_type: str, changes: Mapping[str, Any], out: Path) -> None:
    """Writes a random model with a tokenizer of bytes."""
    ends = {"bos_token_id": 256, "eos_token_id": 257, "pad_token_id": 257}
    sizes = {"vocab_size": 320, "max_position_embeddings": 512, **ends}
    torch.manual_seed(0)
    if model_type == "gemma3":
        text = {**table_for("gemma3_text").tiny.config, **sizes, "num_hidden_layers": 6}
        vision = {
            "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
            "num_attention_heads": 2, "image_size": 8, "patch_size": 4, "vision_use_head": False,
        }  # fmt: skip
        config = AutoConfig.for_model(
            "gemma3", text_config={"model_type": "gemma3_text", **text}, vision_config=vision,
            mm_tokens_per_image=4, image_token_index=300, boi_token_index=301,
            eoi_token_index=302,
        )  # fmt: skip
        model = AutoModelForImageTextToText.from_config(config)
    else:
        own = table_for(model_type).tiny.config if model_type in tables() else {}
        config = AutoConfig.for_model(model_type, **{**own, **sizes, **changes})
        model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(out)
    write_tokenizer(out)


def write_tokenizer(out: Path) -> None:
    """Writes a tokenizer whose tokens are the 256 bytes, a first and a last one."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "<s>", "</s>"]
    raw = Tokenizer(models.BPE(vocab={word: at for at, word in enumerate(words)}, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(
        tokenizer_object=raw, bos_token="<s>", eos_token="</s>", pad_token="</s>"
    ).save_pretrained(out)


def write_text(data: Path) -> None:
    """Writes three texts of the same words, each in an order of its own."""
    words = "a model that is too big or slow for where it must run is cut and healed".split()  # noqa: SIM905
    data.mkdir(parents=True, exist_ok=True)
    for seed, name in enumerate(("text.txt", "healing.txt", "evaluation.txt")):
        dice = random.Random(seed)
        lines = [" ".join(dice.choices(words, k=12)) + "." for _ in range(400)]
        (data / name).write_text("\n".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main()
