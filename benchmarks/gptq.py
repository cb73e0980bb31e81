"""Perplexity and processor seconds of quantized models, beside llm-compressor's on the same tokens.

    python benchmarks/gptq.py --model MODEL --data DATA --work WORK [--peer-python PYTHON]

`--model` is a checkpoint in float32, `--data` holds `calibration.jsonl` and `evaluation.jsonl`, and
`--peer-python` is the Python of an environment with llm-compressor (left out: ours alone). Every
case is a process of its own and is kept in `--work`, so a killed run goes on; processor seconds are
of the quantization, after imports, to weights on the disk (llm-compressor's: in memory).
The weights of the blocks are quantized; head and embedding stay as they are.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from _measured import measured

CASES: dict[str, dict[str, Any]] = {
    "dense": {},
    "rtn int8, 32": {"rtn": {"bits": 8, "symmetric": True}},
    "rtn int4, 32": {"rtn": {}},
    "rtn int4, 64 symmetric": {"rtn": {"group_size": 64, "symmetric": True}},
    "gptq int8, 32": {"gptq": {"bits": 8, "symmetric": True}},
    "gptq int4, 32": {"gptq": {}},
    "gptq int4, 64 symmetric": {"gptq": {"group_size": 64, "symmetric": True}},
    "llm-compressor gptq int4, 64 symmetric": {"peer": {"group_size": 64, "symmetric": True}},
    "llm-compressor gptq int4, 32": {"peer": {"group_size": 32, "symmetric": False}},
    "llm-compressor gptq int4, 32, searched": {
        "peer": {"group_size": 32, "symmetric": False, "observer": "memoryless_mse"}
    },
    "gptq int4, 64 symmetric, no search": {
        "gptq": {"group_size": 64, "symmetric": True, "search": False}
    },
    "gptq int4, 32, block order": {"gptq": {"order": "block"}},
    "sparsegpt 2:4": {"sparsegpt": {"nm": {"keep": 2, "of": 4}}},
    "sparsegpt 2:4, then gptq int4, 32": {"sparsegpt": {"nm": {"keep": 2, "of": 4}}, "gptq": {}},
    "gptq int4, 32 with 2:4": {"gptq": {"nm": {"keep": 2, "of": 4}}},
    "gptq int4, 128": {"gptq": {"group_size": 128}},
    "gptq int4, 32, no search": {"gptq": {"search": False}},
    "gptq int4, 32, no order": {"gptq": {"act_order": False}},
}


def main() -> None:
    options = _options()
    if options.job:
        print(json.dumps(JOBS[options.job](options)))
        return
    from _result import save

    options.work.mkdir(parents=True, exist_ok=True)
    tokens = _done("tokens", options, job="tokens")
    rows = []
    for name in options.cases or CASES:
        if "peer" in CASES[name] and not options.peer_python:
            continue
        row = _done(name, options, job="peer" if "peer" in CASES[name] else "ours", case=name)
        row |= _done(f"perplexity {name}", options, job="perplexity", case=name)
        rows.append({"case": name, **row})
        print(f"{name:44} {row['perplexity']:8.2f}  {row.get('processor_seconds', 0):7.1f} s")
    settings = {"model": options.model.name, "threads": options.threads, "tokens": tokens}
    print(save("gptq", {**settings, "rows": rows}))


def _done(name: str, options: argparse.Namespace, **asked: str) -> dict[str, Any]:
    """What a process found, or found before."""
    file = options.work / f"{name.replace(':', '-').replace(' ', '_')}.json"
    if not file.exists():
        python = str(options.peer_python) if asked["job"] == "peer" else sys.executable
        command = [python, __file__, *sys.argv[1:]]
        for key, value in asked.items():
            command += [f"--{key}", value]
        threads = {"OMP_NUM_THREADS": str(options.threads), "HF_HUB_OFFLINE": "1"}
        ended = subprocess.run(
            command, check=True, stdout=subprocess.PIPE, text=True, env=os.environ | threads
        )
        file.write_text(ended.stdout.splitlines()[-1])
    found: dict[str, Any] = json.loads(file.read_text())
    return found


def _folder(options: argparse.Namespace) -> Path:
    return Path(options.work, "made", options.case.replace(":", "-").replace(" ", "_"))


def _tokens(options: argparse.Namespace) -> dict[str, Any]:
    import torch

    from prune_export.calibrate import token_set
    from prune_export.recipe import LocalText

    found = {}
    for name, samples, length in (
        ("calibration", options.samples, options.length),
        ("evaluation", options.windows, options.window_length),
    ):
        source = LocalText(files=(f"{name}.jsonl",), samples=samples, length=length)
        made = token_set(source, options.model, options.data)
        torch.save(made.ids, options.work / f"{name}.pt")
        found[name] = {"windows": made.samples, "length": made.length, "hash": made.fingerprint}
    return found


def _ours(options: argparse.Namespace) -> dict[str, Any]:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from prune_export import registry
    from prune_export.calibrate import CalibrationContext, ModelView, TokenSet
    from prune_export.checkpoint import Checkpoint
    from prune_export.checkpoint.grid_file import write_grids
    from prune_export.machine import Machine
    from prune_export.recipe.stages import checker
    from prune_export.surgery import rewrite

    torch.set_num_threads(options.threads)
    with torch.device("meta"):  # imports what the peer has imported before it is timed, too
        AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(options.model))
    tokens = TokenSet.of(torch.load(options.work / "calibration.pt"))
    machine = Machine.detect(device="cpu", threads=options.threads)
    steps = CASES[options.case]
    source, logs = options.model, list[Any]()
    total = {"processor_seconds": 0.0, "seconds": 0.0, "peak_over_imports_bytes": 0}
    before, scratch = (Path(f"{_folder(options)}-{kind}") for kind in ("before", "scratch"))
    for number, (name, keys) in enumerate(steps.items(), 1):
        kind: Any = "methods" if name == "sparsegpt" else "quantize"
        method = checker(registry.find(kind, name)).validate_python(keys)
        out = _folder(options) if number == len(steps) else before
        for folder in (out, scratch):
            shutil.rmtree(folder, ignore_errors=True)
        context = CalibrationContext(tokens, machine, scratch)

        def work(
            method: Any = method, source: Path = source, out: Path = out, context: Any = context
        ) -> None:
            opened = Checkpoint.open(source)
            arch = opened.arch()
            found = method.decide(ModelView(arch, opened, {}, context))
            rewrite(opened, arch, found.edits, out, ram_bytes=1 << 30)
            if found.grids:
                write_grids(out, found.grids)
            logs.append(found.log)

        taken = measured(work)
        shutil.rmtree(scratch, ignore_errors=True)
        for key in ("processor_seconds", "seconds"):
            total[key] += taken[key]
        peak = max(total["peak_over_imports_bytes"], taken["peak_over_imports_bytes"])
        total["peak_over_imports_bytes"] = peak
        source = out
    shutil.rmtree(before, ignore_errors=True)
    told = {key: log[key] for log in logs for key in ("sparsity", "bits_a_weight") if key in log}
    return total | told


def _peer(options: argparse.Namespace) -> dict[str, Any]:
    """llm-compressor's GPTQ with its defaults, but these groups, on a model in memory."""
    import llmcompressor
    import torch
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from llmcompressor.modifiers.gptq import GPTQModifier
    from safetensors.torch import save_file
    from torch.utils.data import DataLoader
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(options.threads)
    keys = CASES[options.case]["peer"]
    weights = QuantizationArgs(
        num_bits=4, type="int", strategy="group", **keys
    )  # fmt: skip
    scheme = QuantizationScheme(targets=["Linear"], weights=weights)
    recipe = GPTQModifier(config_groups={"group_0": scheme}, ignore=["re:.*lm_head"])
    ids = torch.load(options.work / "calibration.pt")
    rows = [{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in ids]
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
    batch = max(1, 2048 // ids.shape[1])

    def work() -> None:
        llmcompressor.oneshot(
            model=model,
            dataset=DataLoader(rows, batch_size=batch),  # type: ignore[arg-type]
            recipe=recipe,
            pipeline="sequential",
        )

    taken = measured(work)
    names = [name for name, _ in model.named_parameters() if name.endswith("proj.weight")]
    state = model.state_dict()
    held = {n: v for n, v in state.items() if n in names or "norm" in n or "embed_tokens" in n}
    codes = [_levels(held[name], keys["group_size"]) for name in names[:4]]
    out = _folder(options)
    out.mkdir(parents=True, exist_ok=True)
    save_file({n: v.contiguous() for n, v in held.items()}, out / "model.safetensors",
              metadata={"format": "pt"})  # fmt: skip
    shutil.copy(options.model / "config.json", out / "config.json")
    return taken | {"version": llmcompressor.__version__, "most_levels": max(codes)}


def _levels(matrix: Any, group_size: int) -> int:
    """The most different values in the groups of some outputs: 16 at most, of 4 bits."""
    groups = matrix[:8].reshape(-1, group_size)
    return max(len(group.unique()) for group in groups)


def _perplexity(options: argparse.Namespace) -> dict[str, Any]:
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(options.threads)
    folder = _folder(options) if CASES[options.case] else options.model
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    losses = []
    with torch.inference_mode():
        for row in torch.load(options.work / "evaluation.pt"):
            logits = model(row[None, :-1], use_cache=False).logits[0]
            losses.append(float(torch.nn.functional.cross_entropy(logits, row[1:])))
    return {"perplexity": math.exp(sum(losses) / len(losses)), "losses": losses}


JOBS = {"tokens": _tokens, "ours": _ours, "peer": _peer, "perplexity": _perplexity}


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", type=Path, required=True, help="model directory, float32")
    parser.add_argument("--data", type=Path, required=True, help="where the two .jsonl lie")
    parser.add_argument("--work", type=Path, required=True, help="where all is written")
    parser.add_argument("--peer-python", type=Path, help="a Python that imports llmcompressor")
    parser.add_argument("--samples", type=int, default=64, help="windows of calibration")
    parser.add_argument("--length", type=int, default=256, help="tokens of each")
    parser.add_argument("--windows", type=int, default=8, help="of the evaluation")
    parser.add_argument("--window-length", type=int, default=1024, help="tokens of each")
    parser.add_argument("--cases", nargs="*", choices=list(CASES), help="these alone")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--job", choices=list(JOBS), help=argparse.SUPPRESS)
    parser.add_argument("--case", help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
