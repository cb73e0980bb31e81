# ruff: noqa: E402 (the environment is set before anything reads it)
"""Records what a matrix of tiny recipes makes, byte by byte, so that a mere move shows as none.

    python benchmarks/characterise.py --write before.json
    python benchmarks/characterise.py --check before.json

Every method, healer and exporter that runs here works at least once, through a real `run`, on tiny
random models of three families, with text made from a seed. Of each recipe the file holds the ids
of all artifacts, and the sha256 of every file of theirs and of the result. An exit status of 1 says
that something differs, and what. Takes four minutes of one core. A single thread is used, as sums
in another order have other last bits.

What holds times is compared without them: of JSON, the keys in `TIMES`; of the model card, lines
that say how long something took; of `report.html` and the figures, nothing. `LOOSE` names what no
two runs on one machine make alike, and why.
"""

from __future__ import annotations

import os

for _name, _value in {
    "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE",
    "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error", "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1", "MPLBACKEND": "Agg", "PYTHONHASHSEED": "0",
}.items():  # fmt: skip
    os.environ[_name] = _value

import argparse
import hashlib
import importlib.util
import json
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import torch

from prune_export.errors import PruneExportError
from prune_export.execution import Options, run
from prune_export.machine import Machine
from prune_export.recipe import Recipe

TIMES: Final = frozenset({"seconds", "stamp", "machine", "toolchain", "train_seconds", "sum"})
"""Keys of JSON that say when, how long or on what: left out wherever they stand.

`sum` is a manifest's hash over them."""

LOOSE: Final[dict[str, str]] = {
    "model.engine": "TensorRT picks kernels by timing them",
    "build.log": "it says how long each was",
    "SHA256SUMS": "it sums the files with times in them, too",
    "model.pt2": "a zip of what the compiler wrote, with its times and temporary names",
}
"""Files that hold more than their input decides, and why; that they are there is compared."""

DATA: Final = """\
data:
  calibration: {files: [calibration.txt], samples: 8, length: 32}
  healing: {files: [healing.jsonl], samples: 16, length: 32}
  evaluation: {files: [evaluation.txt], samples: 4, length: 64}
"""
QUIET: Final = "verify: {parity: false, generation: false}\n"

# name: (family, what follows `data`)
CASES: Final[dict[str, tuple[str, str]]] = {
    "depth": ("llama", """\
stages:
  - prune: {method: angular_distance, remove: 1}
  - prune: {method: block_influence, remove: 1}
  - prune: {method: block_influence, remove: 1, unit: attention, select: iterative}
  - prune: {method: greedy_loss, remove: 1, samples: 2, length: 32, compute_dtype: float32}
  - prune: {method: perplexity, remove: 1, unit: mlp, samples: 2, length: 32, protect_first: 0}
  - prune: {method: taylor, remove: 1, protect_first: 0, protect_last: 0}
  - prune: {method: laco, remove: 1, samples: 2, length: 32}
  - prune: {method: deepest, remove: 1}
  - prune: {method: every_other, remove: 1}
"""),
    "sparse": ("llama", """\
stages:
  - prune: {method: magnitude, sparsity: 0.1, compare: model}
  - prune: {method: wanda, sparsity: 0.2}
  - prune: {method: ria, sparsity: 0.3, compare: matrix}
  - prune: {method: gblm, sparsity: 0.4}
  - prune: {method: sparsegpt, sparsity: 0.45, columns: 16}
  - prune: {method: iterative_magnitude, sparsity: 0.5, rounds: 2, steps: 2, batch: 2, rewind: 1}
  - heal: {method: lora, rank: 2, steps: 2, batch: 2, learning_rate: 1.0e-3}
"""),
    "patterns": ("llama", """\
stages:
  - prune: {method: wanda, nm: {keep: 6, of: 8}, allocation: uniform, permute: true}
  - prune: {method: magnitude, nm: {keep: 4, of: 8}, layers: [0, 1]}
  - prune: {method: sparsegpt, nm: {keep: 2, of: 4}, order: block, layers: [2]}
  - prune: {method: sparsegpt, sparsity: 0.6, allocation: owl, exclude: [down]}
export:
  - onnx: {sliding: true}
"""),
    "width": ("llama", """\
stages:
  - prune: {method: minitron, ffn: 0.25, heads: 0.5, multiple_of: 8}
  - prune: {method: llm_pruner, ffn: 0.2, multiple_of: 8, importance: mixed}
  - prune: {method: structured_wanda, hidden: 0.25, multiple_of: 8}
  - prune: {method: structured_magnitude, ffn: 0.2, multiple_of: 8, per_layer: true}
  - prune: {method: structured_gblm, ffn: 0.3, multiple_of: 8, per_layer: true}
export:
  - onnx: {precision: fp32}
"""),
    "latency": ("llama", """\
stages:
  - prune: {method: ziplm, sparsity: 0.2, multiple_of: 8}
  - prune: {method: ziplm, target: {parameters: 0.8}, uniform: false, multiple_of: 8, tries: 2}
  - prune: {method: slicegpt, sparsity: 0.25}
"""),
    "rotation": ("llama", """\
stages:
  - prune: {method: slicegpt, sparsity: 0.25, rotation: per_junction}
"""),
    "gpt2": ("gpt2", """\
stages:
  - prune: {method: block_influence, remove: 1}
  - prune: {method: wanda, sparsity: 0.3, order: block}
  - prune: {method: sparsegpt, sparsity: 0.5}
  - prune: {method: minitron, ffn: 0.25, multiple_of: 8, head_residual: false}
  - prune: {method: laco, remove: 1, merge: rdsc, samples: 2, length: 32}
  - heal: {method: qlora, bits: 4, rank: 2, steps: 2, batch: 2, learning_rate: 1.0e-3}
export:
  - onnx: {precision: int8}
"""),
    "moe": ("qwen3_moe", """\
stages:
  - prune: {method: gblm, sparsity: 0.3}
  - prune: {method: minitron, experts: 0.25}
  - prune: {method: taylor, remove: 1, protect_first: 0, protect_last: 0}
export:
  - onnx: {precision: fp32}
"""),
    "search": ("llama", """\
stages:
  - search:
      target: {parameters: 0.7, tolerance: 0.2}
      candidates:
        - prune: {method: deepest, sparsity: to_target}
        - - prune: {method: block_influence, remove: 1}
          - prune: {method: magnitude, sparsity: 0.2}
          - prune: {method: deepest, sparsity: to_target}
      validation: evaluation
      heal: {method: lora, rank: 2, steps: 2, batch: 2, learning_rate: 1.0e-3}
"""),
    "engines": ("wide", """\
stages:
  - prune: {method: structured_magnitude, ffn: 0.5, multiple_of: 8, per_layer: true}
export:
  - onnx: {precision: fp16}
  - ort_genai: {precision: int8}
  - aoti: {}
"""),
    "measured": ("llama", """\
stages:
  - prune: {method: deepest, remove: 6}
export:
  - onnx: {precision: fp32}
verify:
  quality: {perplexity: evaluation}
"""),
    "tensorrt": ("llama", """\
stages:
  - prune: {method: deepest, remove: 6}
export:
  - tensorrt: {flavor: rtx, compute_capability: sm120, precision: fp16}
"""),
}  # fmt: skip

NEEDS: Final = {"tensorrt": "tensorrt_rtx_bindings"}

SENTENCES: Final = (
    "The river runs through the old town and past the mill.",
    "Nobody had seen the lighthouse keeper since the storm.",
    "A model that is too large for its machine is of no use to anyone.",
    "She counted the blocks twice and wrote the number down.",
    "Bread, butter and a little salt were all that was left.",
)


def main() -> int:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    one = arguments.add_mutually_exclusive_group(required=True)
    one.add_argument("--write", type=Path, metavar="FILE", help="record what is made")
    one.add_argument("--check", type=Path, metavar="FILE", help="compare with what was recorded")
    arguments.add_argument("--only", nargs="*", default=list(CASES), choices=list(CASES))
    asked = arguments.parse_args()
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    with tempfile.TemporaryDirectory() as folder:
        made = characterised(Path(folder).resolve(), asked.only)
    if asked.write:
        asked.write.write_text(json.dumps(made, indent=1, sort_keys=True) + "\n", encoding="utf-8")
        return 0
    before = json.loads(asked.check.read_text(encoding="utf-8"))
    found = list(differences({name: before.get(name) for name in asked.only}, made))
    print("\n".join(found) or f"the same: {sum(map(len, flat(made)))} entries")
    return 1 if found else 0


def characterised(folder: Path, names: list[str]) -> dict[str, Any]:
    """Everything that these cases make, each with a store of its own."""
    write_text(folder)
    models = {family: folder / family for family in sorted({CASES[name][0] for name in names})}
    for family, path in models.items():
        save_model(family, path)
    made = {}
    for name in names:
        if name in NEEDS and importlib.util.find_spec(NEEDS[name]) is None:
            print(f"{name}: left out, {NEEDS[name]} is not installed", file=sys.stderr)
            continue
        began = time.monotonic()
        family, text = CASES[name]
        made[name] = one_case(folder / f"case-{name}", text, models[family], folder)
        print(f"{name}: {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)
    return made


def one_case(work: Path, text: str, model: Path, root: Path) -> dict[str, Any]:
    """Ids and hashes of what one recipe makes, or how it is refused."""
    text = f"recipe: 1\n{DATA}{text}" + ("" if "verify:" in text else QUIET)
    options = Options(work / "out", work / "store", Machine("cpu", 4 << 30, 0, 1))
    try:
        run(Recipe.parse(text, root=root), str(model), options)
    except PruneExportError as error:
        return {"refused": str(error).replace(str(root), "ROOT")}
    artifacts = {
        folder.name: hashes(folder)
        for folder in sorted((work / "store").iterdir())
        if (folder / "manifest.json").is_file()
    }
    return {"artifacts": artifacts, "out": hashes(work / "out")}


def hashes(folder: Path) -> dict[str, str]:
    """The sha256 of every file below, those with times in them being read without."""
    found = {}
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        name = str(file.relative_to(folder))
        if file.name in LOOSE or name == "report.html" or name.startswith("figures/"):
            found[name] = "there"
        elif file.suffix == ".json":
            value = without_times(json.loads(file.read_text(encoding="utf-8")))
            found[name] = digest(json.dumps(value, sort_keys=True).encode())
        elif name == "README.md":
            lines = file.read_text(encoding="utf-8").splitlines()
            found[name] = digest("\n".join(one for one in lines if "took" not in one).encode())
        else:
            found[name] = digest(file.read_bytes())
    return found


def without_times(value: Any) -> Any:
    if isinstance(value, dict):
        return {
            key: without_times(one)
            for key, one in value.items()
            if key not in TIMES and key.rpartition("/")[2] not in LOOSE
        }
    return [without_times(one) for one in value] if isinstance(value, list) else value


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def flat(made: Mapping[str, Any], before: str = "") -> Iterator[dict[str, str]]:
    for key, value in made.items():
        if isinstance(value, dict):
            yield from flat(value, f"{before}{key}  ")
        else:
            yield {f"{before}{key}": value}


def differences(before: Mapping[str, Any], after: Mapping[str, Any]) -> Iterator[str]:
    """A line for each entry that is gone, new, or another."""
    old = {key: value for one in flat(before) for key, value in one.items() if value is not None}
    new = {key: value for one in flat(after) for key, value in one.items()}
    for key in sorted(old.keys() | new.keys()):
        if key not in new:
            yield f"gone     {key}"
        elif key not in old:
            yield f"new      {key}" + (f": {new[key]}" if key.endswith("refused") else "")
        elif old[key] != new[key]:
            yield f"differs  {key}"


def write_text(folder: Path) -> None:
    """Texts of which none shares a document with another."""
    for seed, name, paragraphs in ((1, "calibration.txt", 60), (3, "evaluation.txt", 30)):
        (folder / name).write_text("\n".join(prose(seed, paragraphs)), encoding="utf-8")
    lines = (json.dumps({"text": line}) for line in prose(2, 60))
    (folder / "healing.jsonl").write_text("\n".join(lines), encoding="utf-8")


def prose(seed: int, paragraphs: int) -> list[str]:
    chosen = torch.Generator().manual_seed(seed)
    orders = [torch.randperm(len(SENTENCES), generator=chosen) for _ in range(paragraphs)]
    return [
        f"{seed}.{number} " + " ".join(SENTENCES[at] for at in order.tolist())
        for number, order in enumerate(orders)
    ]


def save_model(family: str, path: Path) -> None:
    """A random model with a tokenizer of bytes, every parameter of it random."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate(["<s>", "</s>", *alphabet])}
    raw = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    ends = {"vocab_size": len(vocabulary), "bos_token_id": 0, "eos_token_id": 1,
            "pad_token_id": None}  # fmt: skip
    config = AutoConfig.for_model({"wide": "llama"}.get(family, family), **ends, **SIZES[family])
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2 if parameter.dim() > 1 else 0.1)
            if parameter.dim() == 1:
                parameter.add_(0.8)
    model.save_pretrained(path)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="</s>")
    tokenizer.save_pretrained(path)


SIZES: Final[dict[str, dict[str, Any]]] = {
    "llama": {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 9,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256,
        "tie_word_embeddings": True,
    },
    "wide": {
        "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32,
        "max_position_embeddings": 256, "tie_word_embeddings": True,
    },
    "gpt2": {"n_embd": 32, "n_layer": 5, "n_head": 4, "n_inner": 64, "n_positions": 256},
    "qwen3_moe": {
        "hidden_size": 32, "intermediate_size": 64, "moe_intermediate_size": 32,
        "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
        "num_experts": 4, "num_experts_per_tok": 2, "max_position_embeddings": 256,
        "tie_word_embeddings": False, "decoder_sparse_step": 1, "mlp_only_layers": [],
    },
}  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
