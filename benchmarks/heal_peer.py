"""Heals the same student on the same windows here and with TRL's SFTTrainer, and compares the cost.

    python benchmarks/heal_peer.py CHECKPOINT healing.jsonl --peer VENV/bin/python

LoRA of the same rank on all linear weights of the blocks, next tokens, the same batch, length and
dtype, one thread. Each run has a process of its own, in turns. What a step costs is the difference
of the processor time of two runs of different length over their steps, so that loading, measuring
and writing do not count; the peak is the resident set of the whole process. VENV has trl beside all
that this package needs.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("healing", type=Path)
    parser.add_argument("--peer", type=Path, required=True, help="the Python that has trl")
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--micro-batch", type=int, default=2)
    parser.add_argument("--steps", type=int, nargs=2, default=(2, 8))
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        name, steps = args.one.split(":")
        print(json.dumps({"ours": _ours, "trl": _trl}[name](args, int(steps))))
        return
    from _result import save

    runs: dict[str, list[dict[str, Any]]] = {"ours": [], "trl": []}
    for _ in range(args.rounds):
        for steps in args.steps:
            for name, found in runs.items():
                found.append(_alone(args, name, steps) | {"steps": steps})
                print(name, found[-1], flush=True)
    short, long = args.steps
    tokens = args.batch * args.length
    table = {}
    for name, found in runs.items():
        each = {
            steps: median(run["cpu_s"] for run in found if run["steps"] == steps)
            for steps in args.steps
        }
        step = (each[long] - each[short]) / (long - short)
        table[name] = {
            "cpu_s_a_step": step,
            "tokens_a_cpu_s": tokens / step,
            "peak_bytes": max(run["peak_bytes"] for run in found),
        }
    ours, trl = table["ours"], table["trl"]
    speed = ours["tokens_a_cpu_s"] / trl["tokens_a_cpu_s"]
    memory = ours["peak_bytes"] / trl["peak_bytes"]
    print(f"tokens a processor second: {speed:.2f} x TRL's; peak memory: {memory:.2f} x TRL's")
    about = {key: str(value) for key, value in vars(args).items() if key not in ("peer", "one")}
    about |= {"checkpoint": args.checkpoint.name, "healing": args.healing.name}
    save(
        f"heal-peer-{args.dtype}",
        {"settings": about, "peer": runs["trl"][0]["version"], "results": table,
         "speed_ratio": speed, "memory_ratio": memory, "runs": runs},
    )  # fmt: skip


def _alone(args: argparse.Namespace, name: str, steps: int) -> dict[str, Any]:
    python = str(args.peer) if name == "trl" else sys.executable
    own = [
        "--length", args.length, "--batch", args.batch, "--micro-batch", args.micro_batch,
        "--rank", args.rank, "--dtype", args.dtype, "--one", f"{name}:{steps}",
    ]  # fmt: skip
    command = [python, __file__, args.checkpoint, args.healing, "--peer", args.peer, *own]
    done = subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, check=False
    )
    if done.returncode:
        sys.exit(done.stderr)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def _windows(args: argparse.Namespace) -> Any:
    from prune_export.calibrate import token_set
    from prune_export.recipe import LocalText

    source = LocalText(files=(args.healing.name,), samples=64, length=args.length, packing="packed")
    return token_set(source, args.checkpoint, args.healing.resolve().parent)


def _used(began: float, **more: Any) -> dict[str, Any]:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"cpu_s": time.process_time() - began, "peak_bytes": peak, **more}


def _ours(args: argparse.Namespace, steps: int) -> dict[str, Any]:
    from prune_export.contracts import Work
    from prune_export.heal.lora import Lora
    from prune_export.machine import Machine
    from prune_export.progress import Silent

    tokens = _windows(args)
    healer = Lora(
        steps=steps, batch=args.batch, micro_batch=args.micro_batch, rank=args.rank, targets="all",
        dropout=0.0, warmup=0, schedule="constant", learning_rate=1e-4, compute_dtype=args.dtype,
        gradient_checkpointing=False,
    )  # fmt: skip
    machine = Machine("cpu", 16 << 30, 0, 1)
    with tempfile.TemporaryDirectory() as folder:
        began = time.process_time()
        work = Work(machine, Silent(), Path(folder, "scratch"))
        record = healer.heal(args.checkpoint, tokens, Path(folder, "out"), work)
        return _used(began, loss=[row[1] for row in record.log["loss"]])


def _trl(args: argparse.Namespace, steps: int) -> dict[str, Any]:
    import torch
    import transformers
    import trl
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    data = Dataset.from_dict({"input_ids": _windows(args).ids.tolist()})
    with tempfile.TemporaryDirectory() as folder:
        began = time.process_time()
        dtype = getattr(torch, args.dtype)
        config = trl.SFTConfig(
            output_dir=folder, max_steps=steps, per_device_train_batch_size=args.micro_batch,
            gradient_accumulation_steps=args.batch // args.micro_batch, learning_rate=1e-4,
            lr_scheduler_type="constant", max_length=args.length, packing=False, use_cpu=True,
            bf16=args.dtype == "bfloat16", gradient_checkpointing=False, report_to=[],
            save_strategy="no", logging_steps=1, disable_tqdm=True,
            dataset_kwargs={"skip_prepare_dataset": True},
        )  # fmt: skip
        trainer = trl.SFTTrainer(
            model=AutoModelForCausalLM.from_pretrained(args.checkpoint, dtype=dtype),
            args=config,
            train_dataset=data,
            processing_class=AutoTokenizer.from_pretrained(args.checkpoint),
            peft_config=LoraConfig(
                r=args.rank, lora_alpha=args.rank, target_modules="all-linear", lora_dropout=0.0,
                task_type="CAUSAL_LM",
            ),
        )  # fmt: skip
        trainer.train()
        losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
        return _used(began, loss=losses, version=trl.__version__)


if __name__ == "__main__":
    main()
