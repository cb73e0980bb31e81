"""What heals best for a processor second: settings side by side, each a short training.

    python benchmarks/recovery.py PRUNED DENSE healing.jsonl evaluation.jsonl --rows rows.jsonl \
        "full steps=20 learning_rate=2e-4" "qlora steps=20 learning_rate=2e-3 rank=16 targets=all" …
    python benchmarks/recovery.py --table rows.jsonl --save

Unlike `heal.py`, nothing is merged or written, so that more settings fit into an hour: the student
is measured as it was trained (a 4-bit one with its quantization). Each setting is a process's only
work on one thread; its row is appended as soon as it is there, and a setting that has a row is left
out. Windows are of 512 tokens to train on and of 1,024 to measure with; a step takes two of them
where the setting does not say otherwise. Seconds are processor seconds of the steps alone.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import yaml
from pydantic import TypeAdapter

from prune_export import registry
from prune_export.calibrate import token_set
from prune_export.checkpoint import Checkpoint
from prune_export.contracts import Work
from prune_export.machine import Machine
from prune_export.progress import Silent
from prune_export.recipe import LocalText
from prune_export.training.adapters.targets import linear_weights, targets
from prune_export.training.full_weights import trained_tensors
from prune_export.training.loop import Run, held_out_loss, own_randomness, train
from prune_export.training.model import quiet
from prune_export.training.settings import Quantization
from prune_export.training.shared import student_of
from prune_export.training.state import State
from prune_export.training.teacher import objective_of
from prune_export.training.zeros import kept_zeros


def main() -> None:
    asked = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    asked.add_argument("pruned", type=Path, nargs="?")
    asked.add_argument("dense", type=Path, nargs="?")
    asked.add_argument("healing", type=Path, nargs="?")
    asked.add_argument("evaluation", type=Path, nargs="?")
    asked.add_argument("settings", nargs="*")
    asked.add_argument("--windows", type=int, default=6, help="evaluation windows of 1,024")
    asked.add_argument("--rows", type=Path, default=Path("recovery.jsonl"))
    asked.add_argument("--table", type=Path, help="print the rows of a file")
    asked.add_argument("--save", action="store_true", help="keep them in benchmarks/results")
    given = asked.parse_args()
    if given.table:
        rows = _rows(given.table)
        for row in rows:
            print(f"{row['perplexity']:8.2f} {row['cpu_seconds']:7.0f} s  {row['setting']}")
        if given.save:
            from _result import save

            print(save("recovery", {"rows": rows}))
        return
    known = {row["setting"] for row in _rows(given.rows)}
    for setting in ["", *given.settings]:
        if setting not in known:
            row = {"setting": setting, **_measured(given, setting)}
            with given.rows.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
            print(json.dumps(row), flush=True)


def _rows(file: Path) -> list[dict[str, Any]]:
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    return [json.loads(line) for line in lines]


def _measured(given: argparse.Namespace, setting: str) -> dict[str, Any]:
    """Trains one setting, or none, and measures what it brought."""
    kind, *pairs = (setting or "full steps=1").split()
    body = {"batch": 2, **yaml.safe_load("\n".join(p.replace("=", ": ", 1) for p in pairs))}
    body |= {key: float(value) for key, value in body.items() if _is_number(value)}
    healer = TypeAdapter(registry.find("heal", kind)).validate_python(body)
    held = _windows(given.evaluation, given.dense, 1024, given.windows)
    machine = Machine.detect(device="cpu", threads=1)
    dtype = "bfloat16" if healer.compute_dtype == "auto" else healer.compute_dtype
    run = Run("cpu", 1, dtype, healer.micro_batch or healer.batch, False, 0)
    with own_randomness(1), quiet(), tempfile.TemporaryDirectory() as scratch:
        source, packed = Checkpoint.open(given.pruned), None
        arch = source.arch(ignore_keys=source.full_config())
        if kind == "full":
            own = trained_tensors(arch, healer.train_embeddings)
            written = linear_weights(arch)
        else:
            own = written = targets(healer.targets, arch)
        if kind == "qlora":
            packed = Quantization(healer.double_quant, healer.merge_into)
        zeros = kept_zeros(source, [tensor.name for tensor in written], healer.keep_zeros)
        names = [tensor.name for tensor in own]
        student = student_of(healer, packed, source, names, run, zeros)
        state, seconds = State(), 0.0
        if setting:
            work = Work(machine, Silent(), Path(scratch))
            goal = objective_of(healer.distill, None, given.dense, "cpu", run.dtype)
            text = _windows(given.healing, given.dense, 512, None)
            began = time.process_time()
            state = train(
                student, text, healer, run, state, work=work, key="recovery", objective=goal
            )
            seconds = time.process_time() - began
        loss = held_out_loss(student.model, held, 1, "cpu")
    losses = [round(loss, 4) for _, loss, _ in state.losses]
    return {
        "perplexity": math.exp(loss),
        "cpu_seconds": seconds,
        "steps": state.step,
        "tokens": state.step * healer.batch * 512,
        "compute_dtype": dtype,
        "losses": losses,
    }


def _windows(file: Path, dense: Path, length: int, samples: int | None) -> torch.Tensor:
    source = LocalText(files=(file.name,), samples=samples, length=length)
    return token_set(source, dense, file.parent).ids


def _is_number(value: Any) -> bool:
    try:
        float(value)
    except (TypeError, ValueError):
        return False
    return isinstance(value, str)


if __name__ == "__main__":
    main()
