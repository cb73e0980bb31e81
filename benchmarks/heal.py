"""Heals a checkpoint with several settings, each alone, and says what each took and brought.

    python benchmarks/heal.py PRUNED DENSE healing.jsonl evaluation.jsonl \
        "qlora rank=16 targets=all steps=100 batch=2 learning_rate=2e-3" "lora …" …

For each: seconds, peak memory beside what `cost` predicted, and the perplexity on the evaluation
text of the dense, the pruned and the healed model, with the share of the lost log-perplexity that
came back. Every run has a process of its own; the peak is that process's resident set. A setting
with `objective=distill`, or `objective={"distill":{"cache":"live"}}`, learns from the dense model.
With `--cpu-seconds` each setting takes as many steps as that much processor time allows, by what
four steps take: so settings that cost unlike are compared at one price.
"""

from __future__ import annotations

import argparse
import json
import math
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml
from _result import save
from pydantic import TypeAdapter

from prune_export import registry
from prune_export.calibrate import CalibrationContext, TokenSet, keep_answers
from prune_export.checkpoint import Checkpoint
from prune_export.contracts import HealRecord, Teacher, Work
from prune_export.machine import Machine
from prune_export.progress import Silent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("pruned", type=Path)
    parser.add_argument("dense", type=Path)
    parser.add_argument("healing", type=Path)
    parser.add_argument("evaluation", type=Path)
    parser.add_argument("settings", nargs="*")
    parser.add_argument("--length", type=int, default=256, help="tokens in a training window")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--windows", type=int, default=20, help="evaluation windows of 1024")
    parser.add_argument("--cpu-seconds", type=float, help="processor seconds of each training")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--name", default="heal")
    args = parser.parse_args()
    if args.one:
        print(json.dumps(_one(args, args.one)))
        return
    ends = {which: _alone(args, str(getattr(args, which))) for which in ("dense", "pruned")}
    print(f"dense {ends['dense']['perplexity']:.2f}, pruned {ends['pruned']['perplexity']:.2f}")
    lost = math.log(ends["pruned"]["perplexity"] / ends["dense"]["perplexity"])
    rows, saved = [], None
    for setting in args.settings:
        row = _alone(args, setting)
        row["recovered"] = math.log(ends["pruned"]["perplexity"] / row["perplexity"]) / lost
        rows.append(row)
        print(
            f"{setting}\n    {row['seconds']:.0f} s ({row['cpu_seconds']:.0f} CPU-s), "
            f"{row['tokens']} tokens, perplexity {row['perplexity']:.2f}, "
            f"{row['recovered']:.0%} of the loss recovered; peak {row['peak_bytes'] / 2**30:.2f} "
            f"GiB, predicted {row['predicted_bytes'] / 2**30:.2f} GiB",
            flush=True,
        )
        saved = save(args.name, {"length": args.length, "ends": ends, "runs": rows})
    print(saved)


def _alone(args: argparse.Namespace, what: str) -> dict[str, Any]:
    files = [str(getattr(args, name)) for name in ("pruned", "dense", "healing", "evaluation")]
    options = ["--length", str(args.length), "--threads", str(args.threads)]
    options += ["--windows", str(args.windows), "--one", what]
    if args.cpu_seconds:
        options += ["--cpu-seconds", str(args.cpu_seconds)]
    command = [sys.executable, __file__, *files, *options]
    found = subprocess.run(command, check=True, stdout=subprocess.PIPE)
    result: dict[str, Any] = json.loads(found.stdout)
    return result


def _one(args: argparse.Namespace, what: str) -> dict[str, Any]:
    if Path(what).is_dir():
        return {"perplexity": _perplexity(Path(what), args)}
    kind, *pairs = what.split()
    body = yaml.safe_load("\n".join(pair.replace("=", ": ", 1) for pair in pairs)) or {}
    body |= {key: float(value) for key, value in body.items() if _is_number(value)}
    healer = TypeAdapter(registry.find("heal", kind)).validate_python(body)
    tokens = TokenSet.of(_windows(args.healing, args.dense, args.length))
    machine = Machine.detect(device="cpu", threads=args.threads)
    arch = Checkpoint.open(args.pruned).arch()
    cost = healer.cost(arch, tokens.ids.numel(), args.length, machine)
    if healer.taught:
        dense = Checkpoint.open(args.dense).arch()
        cost, _ = healer.taught_cost(arch, dense, tokens.samples, args.length, machine)
    with tempfile.TemporaryDirectory() as folder:

        def healed(entry: Any, name: str) -> tuple[HealRecord, float]:
            """The record, and the processor seconds that it took."""
            before = time.process_time()
            teacher = Teacher(args.dense, "dense", partial(_answers, args, tokens, machine, folder))
            work = Work(machine, Silent(), Path(folder, f"{name}-scratch"), teacher=teacher)
            found = entry.heal(args.pruned, tokens, Path(folder, name), work)
            return found, time.process_time() - before

        if args.cpu_seconds:
            healed(replace(healer, steps=1), "first")  # what is done once in a process
            (_, short), (_, long) = (healed(replace(healer, steps=n), f"try{n}") for n in (1, 5))
            healer = replace(healer, steps=max(5, round(args.cpu_seconds / ((long - short) / 4))))
        out = Path(folder, "out")
        record, _ = healed(healer, "out")
        used = resource.getrusage(resource.RUSAGE_SELF)
        return {
            "setting": what,
            "seconds": record.seconds,
            "cpu_seconds": used.ru_utime + used.ru_stime,
            "tokens": record.trained_tokens,
            "peak_bytes": used.ru_maxrss * 1024,
            "predicted_bytes": cost.ram_bytes,
            "held_out": record.log["held_out"],
            "steps": record.steps,
            "loss": record.log["loss"],
            "training": record.log["training"],
            "perplexity": _perplexity(out, args),
        }


def _answers(
    args: argparse.Namespace,
    tokens: TokenSet,
    machine: Machine,
    folder: str,
    outcomes: int,
    temperature: float,
) -> Path:
    out = Path(folder, f"answers-{outcomes}-{temperature}")
    if not out.exists():
        out.mkdir()
        dense = Checkpoint.open(args.dense)
        keep_answers(
            dense, CalibrationContext(tokens, machine), out, outcomes=outcomes,
            temperature=temperature, arch=dense.arch(),
        )  # fmt: skip
    return out


def _is_number(value: object) -> bool:
    """YAML 1.1 reads `2e-3` as text."""
    try:
        return isinstance(value, str) and math.isfinite(float(value))
    except ValueError:
        return False


def _perplexity(path: Path, args: argparse.Namespace) -> float:
    from transformers import AutoModelForCausalLM

    from prune_export.training.loop import held_out_loss
    from prune_export.training.model import quiet

    torch.set_num_threads(args.threads)
    windows = _windows(args.evaluation, args.dense, 1024)[: args.windows]
    with quiet():
        model = AutoModelForCausalLM.from_pretrained(path)
        return math.exp(held_out_loss(model, windows, 1, "cpu"))


def _windows(file: Path, tokenizer: Path, length: int) -> torch.Tensor:
    """The articles of a JSONL file, joined by the end token, in full windows."""
    from transformers import AutoTokenizer

    known = AutoTokenizer.from_pretrained(tokenizer)
    ids: list[int] = []
    for line in file.read_text(encoding="utf-8").splitlines():
        ids += [*known(json.loads(line)["text"])["input_ids"], known.eos_token_id]
    return torch.tensor(ids[: len(ids) // length * length]).view(-1, length)


if __name__ == "__main__":
    main()
