"""Times the portable ONNX export on one core, imports and all, against the number of blocks.

    python benchmarks/onnx_export.py --model SMOLLM2 --work DIRECTORY        # for the record
    python benchmarks/onnx_export.py --work DIRECTORY --runs 1 --blocks 2 8   # does it run?

Every export has a fresh process, pinned to one core: seconds by the wall and by the processor (the
latter is what a busy machine leaves comparable), peak resident memory, and the graph's hash, which
must be the same in every run. `--model` is a checkpoint directory; `--blocks` are synthetic llamas
of that many narrow blocks, which show what a block costs. `--whole` also has torch trace every
block of `--model`, the usual way to export (minutes).

Wanted: `--model` SmolLM2-135M in less than 25 s; a hundred blocks hardly longer than thirty.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path
from time import perf_counter, process_time
from typing import Any

import numpy as np

LIMIT_SECONDS = 25.0
MORE_BLOCKS = 1.5
"""How much longer a hundred blocks may take than thirty."""


def child(kind: str, model: Path, out: Path, precision: str) -> None:
    """Exports once and prints what it took since the interpreter started."""
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    if kind == "whole":
        whole(model, out)
    else:
        stamped(model, out, precision)
    digest = hashlib.sha256((out / "model.onnx").read_bytes())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    found = {"cpu": process_time(), "peak_bytes": peak, "sha256": digest.hexdigest()}
    print(json.dumps(found), flush=True)


def stamped(model: Path, out: Path, precision: Any) -> None:
    import torch

    from prune_export.contracts import Work
    from prune_export.exporters.onnx import Onnx
    from prune_export.machine import Machine
    from prune_export.progress import Silent

    torch.set_num_threads(1)
    machine = Machine(device="cpu", ram_bytes=8 << 30, gpu_bytes=0, threads=1)
    Onnx(precision=precision).export(model, out, Work(machine, Silent(), out))


def whole(model: Path, out: Path) -> None:
    """The usual export: every block traced, with a cache that grows by concatenation."""
    import torch
    from transformers import AutoModelForCausalLM, DynamicCache

    torch.set_num_threads(1)
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    config = loaded.config
    shape = (2, config.num_key_value_heads, 5, config.head_dim)
    past = [(torch.zeros(shape), torch.zeros(shape)) for _ in range(config.num_hidden_layers)]

    class Cached(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = loaded

        def forward(self, input_ids: Any, attention_mask: Any, position_ids: Any, past: Any) -> Any:
            cache = DynamicCache(ddp_cache_data=past)
            logits = self.model(
                input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids,
                past_key_values=cache, use_cache=True,
            ).logits  # fmt: skip
            return logits, [(layer.keys, layer.values) for layer in cache.layers]

    dim = torch.export.Dim
    batch, new, old = dim("batch"), dim("sequence"), dim("past_sequence", min=0)
    cached = ({0: batch, 2: old}, {0: batch, 2: old})
    program = torch.onnx.export(
        Cached().eval(),
        (
            torch.zeros(2, 3, dtype=torch.long),
            torch.ones(2, 8, dtype=torch.long),
            torch.arange(5, 8).repeat(2, 1),
            past,
        ),
        dynamic_shapes=(
            {0: batch, 1: new},
            {0: batch, 1: dim.DYNAMIC},
            {0: batch, 1: new},
            [cached] * config.num_hidden_layers,
        ),
        dynamo=True,
        opset_version=23,
        verbose=False,
    )
    assert program is not None
    out.mkdir(parents=True, exist_ok=True)
    program.save(out / "model.onnx", external_data=True)


def synthetic(blocks: int, out: Path) -> Path:
    """A random llama of narrow blocks, small enough that only the blocks' number costs."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    if not (out / "config.json").is_file():
        config = LlamaConfig(
            vocab_size=512, hidden_size=64, intermediate_size=128, num_hidden_layers=blocks,
            num_attention_heads=4, num_key_value_heads=2, bos_token_id=None, eos_token_id=None,
        )  # fmt: skip
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(out)
    return out


def measure(name: str, arguments: list[str], runs: int, out: Path) -> dict[str, Any]:
    """`runs` exports in fresh processes; seconds, bytes and one hash."""
    here = Path(__file__).resolve()
    paths = [str(here.parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(paths), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1",
        "OMP_WAIT_POLICY": "PASSIVE", "TRANSFORMERS_VERBOSITY": "error", "TQDM_DISABLE": "1",
    }  # fmt: skip
    found: list[dict[str, Any]] = []
    for _ in range(runs):
        shutil.rmtree(out, ignore_errors=True)
        start = perf_counter()
        command = [sys.executable, "-W", "ignore", str(here), "--child", *arguments, str(out)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"{name} failed:\n{done.stderr[-2000:]}")
        found.append({"wall": perf_counter() - start, **json.loads(done.stdout.splitlines()[-1])})
    hashes = {run["sha256"] for run in found}
    row = {
        "name": name,
        "wall_seconds": [run["wall"] for run in found],
        "cpu_seconds": [run["cpu"] for run in found],
        "peak_bytes": [run["peak_bytes"] for run in found],
        "same_bytes": len(hashes) == 1,
    }
    print(
        f"{name:<24} {np.median(row['wall_seconds']):7.1f} s wall "
        f"{np.median(row['cpu_seconds']):7.1f} s cpu "
        f"{max(row['peak_bytes']) / 2**20:7.0f} MiB  same bytes: {row['same_bytes']}",
        flush=True,
    )
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, help="a checkpoint directory, such as SmolLM2-135M")
    parser.add_argument("--work", type=Path, help="where models and graphs are written")
    parser.add_argument("--blocks", type=int, nargs="*", default=[30, 100])
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--precision", nargs="*", default=["fp32"])
    parser.add_argument("--whole", action="store_true", help="also trace every block, for contrast")
    parser.add_argument("--save", action="store_true", help="keep the result in results/")
    parser.add_argument("--child", nargs=4, metavar=("KIND", "PRECISION", "MODEL", "OUT"))
    options = parser.parse_args()
    if options.child:
        kind, precision, model, out = options.child
        child(kind, Path(model), Path(out), precision)
        return
    if options.work is None:
        parser.error("--work is needed")
    out = options.work / "exported"
    rows = [
        measure(f"{options.model.name} {p}", ["stamped", p, str(options.model)], options.runs, out)
        for p in (options.precision if options.model else [])
    ]
    for blocks in options.blocks:
        model = synthetic(blocks, options.work / f"llama-{blocks}")
        rows.append(measure(f"{blocks} blocks", ["stamped", "fp32", str(model)], options.runs, out))
    if options.whole and options.model:
        name = f"{options.model.name} whole"
        rows.append(measure(name, ["whole", "fp32", str(options.model)], 1, out))
    shutil.rmtree(out, ignore_errors=True)
    report(rows, options)


def report(rows: list[dict[str, Any]], options: argparse.Namespace) -> None:
    """Prints whether the aims are met and keeps the samples; exit code 1 when one is not."""
    checks: dict[str, bool] = {}
    if options.model:
        wall = float(np.median(rows[0]["wall_seconds"]))
        checks[f"{rows[0]['name']} under {LIMIT_SECONDS:g} s ({wall:.1f} s)"] = wall < LIMIT_SECONDS
    cpu = {row["name"]: float(np.median(row["cpu_seconds"])) for row in rows}
    if "30 blocks" in cpu and "100 blocks" in cpu:
        more = cpu["100 blocks"] / cpu["30 blocks"]
        checks[f"100 blocks cost {more:.2f} times 30 blocks"] = more < MORE_BLOCKS
    checks["every run wrote the same graph"] = all(row["same_bytes"] for row in rows)
    for what, met in checks.items():
        print(("met    " if met else "NOT MET"), what)
    if options.save:
        from _result import save

        payload = {"threads": 1, "runs": options.runs, "rows": rows, "checks": checks}
        print(save("onnx-export", payload))
    if not all(checks.values()):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
