"""What heals best for a processor second: settings side by side, each a short training.

    python benchmarks/recovery.py PRUNED DENSE healing.jsonl evaluation.jsonl --rows rows.jsonl \
        "full steps=20 learning_rate=2e-4" "qlora steps=20 learning_rate=2e-3 rank=16 targets=all" \
        "full steps=20 learning_rate=2e-4 objective='{distill: {cross_entropy: 0.3}}'" …
    python benchmarks/recovery.py --table rows.jsonl --save

Unlike `heal.py`, nothing is written, so that more settings fit into an hour: all weights are
measured as they were trained, and adapters after they were added to the checkpoint's own weights
(with `as_trained` beside it: a 4-bit student with its quantization). Counted are also those of the
12 built-in prompts whose greedy continuations repeat themselves. A teacher is DENSE, and runs
beside. Each setting is a process's only work on one thread; its row is appended as soon as it is
there, and a setting that has a row is left out. `none` measures PRUNED as it is. Windows are of 512
tokens to train on and of 1,024 to measure with; a step takes two of them where the setting does not
say otherwise. Seconds are processor seconds of the steps alone.
"""

from __future__ import annotations

import argparse
import json
import math
import shlex
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
from prune_export.checkpoint.loading import load_ends, load_model, load_tokenizer
from prune_export.contracts import Work
from prune_export.machine import Machine
from prune_export.progress import Silent
from prune_export.recipe import LocalText
from prune_export.training.adapters.targets import linear_weights, targets
from prune_export.training.full_weights import Whole, trained_tensors
from prune_export.training.loop import Run, held_out_loss, own_randomness, train
from prune_export.training.model import compute_dtype, quiet
from prune_export.training.settings import Quantization
from prune_export.training.shared import student_of
from prune_export.training.state import State
from prune_export.training.teacher import objective_of
from prune_export.training.zeros import kept_zeros
from prune_export.verify.generation import PROMPTS, judge


def main() -> None:
    asked = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    asked.add_argument("pruned", type=Path, nargs="?")
    asked.add_argument("dense", type=Path, nargs="?")
    asked.add_argument("healing", type=Path, nargs="?")
    asked.add_argument("evaluation", type=Path, nargs="?")
    asked.add_argument("settings", nargs="*")
    asked.add_argument("--windows", type=int, default=12, help="evaluation windows of 1,024")
    asked.add_argument("--start", help="what PRUNED is called in the rows")
    asked.add_argument("--rows", type=Path, default=Path("recovery.jsonl"))
    asked.add_argument("--table", type=Path, help="print the rows of a file")
    asked.add_argument("--save", action="store_true", help="keep them in benchmarks/results")
    given = asked.parse_intermixed_args()
    if given.table:
        rows = _rows(given.table)
        for row in rows:
            print(
                f"{row['perplexity']:8.2f} {row['repetitive']:3} of 12 {row['cpu_seconds']:7.0f} s"
                f"  {row['start']}: {row['setting']}"
            )
        if given.save:
            from _result import save

            print(save("recovery-settings", {"rows": rows}))
        return
    start = given.start or given.pruned.name
    known = {row["setting"] for row in _rows(given.rows) if row["start"] == start}
    for setting in given.settings:
        if setting not in known:
            row = {"start": start, "setting": setting, **_measured(given, setting)}
            with given.rows.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
            print(json.dumps(row), flush=True)


def _rows(file: Path) -> list[dict[str, Any]]:
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    return [json.loads(line) for line in lines]


def _measured(given: argparse.Namespace, setting: str) -> dict[str, Any]:
    """Trains one setting, or none, and measures what it brought."""
    kind, *pairs = shlex.split(setting if setting != "none" else "full steps=1")
    body = {"batch": 2, **yaml.safe_load("\n".join(p.replace("=", ": ", 1) for p in pairs))}
    body |= {key: float(value) for key, value in body.items() if _is_number(value)}
    healer = TypeAdapter(registry.find("heal", kind)).validate_python(body)
    held = _windows(given.evaluation, given.dense, 1024, given.windows)
    machine = Machine.detect(device="cpu", threads=1)
    dtype = str(compute_dtype(healer.compute_dtype, machine)).removeprefix("torch.")
    run = Run("cpu", 1, dtype, healer.micro_batch or healer.batch, False, 0)
    found: dict[str, Any] = {}
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
        if setting != "none":
            work = Work(machine, Silent(), Path(scratch))
            goal = objective_of(healer.distill, None, given.dense, "cpu", run.dtype)
            text = _windows(given.healing, given.dense, 512, None)
            began = time.process_time()
            state = train(
                student, text, healer, run, state, work=work, key="recovery", objective=goal
            )
            seconds = time.process_time() - began
            del goal
        model = student.model
        if not isinstance(student, Whole):
            found["as_trained"] = math.exp(_loss(model, held))
            model = _merged(given.pruned, student, healer.scaling)
        found["perplexity"] = math.exp(_loss(model, held))
        found["repetitive"] = _repetitive(model, given.dense)
    losses = [round(loss, 4) for _, loss, _ in state.losses]
    return {
        **found,
        "windows": given.windows,
        "cpu_seconds": seconds,
        "steps": state.step,
        "tokens": state.step * healer.batch * 512,
        "compute_dtype": dtype,
        "losses": losses,
    }


def _loss(model: Any, held: torch.Tensor) -> float:
    """The loss on held-out windows, with bfloat16 products whatever the weights are in."""
    with torch.autocast("cpu", torch.bfloat16):
        return held_out_loss(model, held, 1, "cpu")


def _merged(pruned: Path, student: Any, scaling: float) -> Any:
    """The checkpoint's own weights with the adapters added, as a heal writes them."""
    model = load_model(pruned, dtype=torch.float32)
    weights = dict(model.named_parameters())
    with torch.no_grad():
        for name, (a, b) in student.factors().items():
            weights[name] += scaling * (b @ a)
    return model.eval()


def _repetitive(model: Any, tokenizer: Path) -> int:
    """How many of the built-in prompts' greedy continuations repeat themselves."""
    spoken = load_tokenizer(tokenizer)
    ends = {spoken.eos_token_id, *load_ends(tokenizer)}
    fed = [
        spoken.apply_chat_template(
            [{"role": "user", "content": prompt}], add_generation_prompt=True, return_dict=False
        )
        for prompt in PROMPTS
    ]
    width = max(map(len, fed))
    ids = torch.tensor([[0] * (width - len(one)) + one for one in fed])
    seen = torch.tensor([[0] * (width - len(one)) + [1] * len(one) for one in fed])
    with torch.no_grad():
        made = model.generate(
            ids, attention_mask=seen, max_new_tokens=64, do_sample=False, pad_token_id=0
        )
    said = [
        row[: next((at for at, token in enumerate(row) if token in ends), len(row))]
        for row in made[:, width:].tolist()
    ]
    return judge("healed", PROMPTS, said, [spoken.decode(one) for one in said]).repetitive


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
