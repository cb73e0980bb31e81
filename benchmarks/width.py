"""What width methods and Taylor take: seconds beside a plain pass, and memory.

    python benchmarks/width.py MODEL calibration.jsonl --save

The floor is the sweep itself with nothing to edit: the same windows through the same blocks. Each
method has a process of its own; within it, floor and method alternate, and medians are compared.
`scores` gathers scores alone; `cut` scores, cuts and refits in one sweep beside the dense model's
states, `cut own` without these; of the cuts, the time of the small solves is said apart. For
gradients the floor is the gradient pass that keeps nothing.
`… beside autograd` are whole gradient scores beside transformers' own model, in memory and not
counting its loading: forward and backward over the same windows in the same batches, with the
gradient of every parameter. `least_ratio` is what the multiplications by matrices alone make of it,
as a streamed pass computes each block again before it goes back through it.
Blocks are alike, so `--blocks 4` measures the first four alone (Taylor, which protects the first
four and the last two unless it is of all blocks, needs more). Ratios are of processor time, which
other work on the machine disturbs less; wall time is kept too.
"""

from __future__ import annotations

import argparse
import functools
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from math import prod
from pathlib import Path
from typing import Any

import torch
from _result import save
from heal import _windows
from transformers import AutoModelForCausalLM

from prune_export.arch import Arch
from prune_export.calibrate import LINEAR_GROUPS, CalibrationContext, ModelView, TokenSet
from prune_export.calibrate.streaming.driver import BATCH_TOKENS
from prune_export.checkpoint import Checkpoint
from prune_export.machine import Machine
from prune_export.methods.depth.taylor import Taylor
from prune_export.methods.width.llm_pruner import LlmPruner
from prune_export.methods.width.minitron import Minitron
from prune_export.methods.width.structured_wanda import StructuredWanda
from prune_export.pruning.width import width_passes
from prune_export.surgery import Drop, rewrite

BESIDE = " beside autograd"
CASES = (
    "minitron scores",
    "minitron cut",
    "minitron cut own",
    "structured_wanda scores",
    "llm_pruner gradients",
    f"llm_pruner{BESIDE}",
    f"taylor{BESIDE}",
    f"taylor of all blocks{BESIDE}",
)


def main() -> None:
    asked = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    asked.add_argument("model", type=Path)
    asked.add_argument("calibration", type=Path)
    asked.add_argument("--samples", type=int, default=32)
    asked.add_argument("--length", type=int, default=512)
    asked.add_argument("--blocks", type=int, help="measure a model of the first blocks alone")
    asked.add_argument("--rounds", type=int, default=3)
    asked.add_argument("--threads", type=int, default=2)
    asked.add_argument("--cases", nargs="*", default=list(CASES))
    asked.add_argument("--name", default="width")
    asked.add_argument("--save", action="store_true", help="keep the result in benchmarks/results")
    asked.add_argument("--one", help=argparse.SUPPRESS)
    given = asked.parse_args()
    if given.one:
        print(json.dumps(measured(given, given.one)))
        return
    rows = []
    for case in given.cases:
        command = [sys.executable, __file__, *sys.argv[1:], "--one", case]
        found = subprocess.run(command, check=True, stdout=subprocess.PIPE)
        rows.append(json.loads(found.stdout))
        print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    payload = {
        "model": given.model.name,
        "tokens": given.samples * given.length,
        "length": given.length,
        "rounds": given.rounds,
        "blocks": given.blocks,
        "rows": rows,
    }
    if given.save:
        print(save(given.name, payload))


class _Nothing:
    """An editor that watches nothing: the sweep is a plain forward pass."""

    key = "nothing"

    def watch(self, *args: Any) -> None:
        return None


class _NoGradients:
    """Reads the gradients of every matrix and keeps nothing of them."""

    key = "nothing"
    kinds = ("sum",)

    def wants(self, layer: int, name: str) -> bool:
        del layer
        return name.endswith("weight")

    def keep(self, *args: Any) -> dict[str, torch.Tensor]:
        return {"none": torch.zeros(1)}


def measured(given: argparse.Namespace, case: str) -> dict[str, Any]:
    checkpoint = Checkpoint.open(given.model)
    arch = checkpoint.arch()
    with tempfile.TemporaryDirectory() as folder:
        if given.blocks:
            drop = Drop(tuple(range(given.blocks, arch.layers)))
            checkpoint = rewrite(checkpoint, arch, [drop], Path(folder, "short"), ram_bytes=2**30)
        return timed(given, case, checkpoint)


def timed(given: argparse.Namespace, case: str, checkpoint: Checkpoint) -> dict[str, Any]:
    arch = checkpoint.arch()
    ids = _windows(given.calibration, given.model, given.length)[: given.samples]
    machine = Machine.detect(device="cpu", threads=given.threads)
    solves: list[float] = []
    plain_refit = width_passes.refit

    def timed_refit(*args: Any, **keys: Any) -> Any:
        began = time.process_time()
        found = plain_refit(*args, **keys)
        solves.append(time.process_time() - began)
        return found

    width_passes.refit = timed_refit
    seconds: dict[str, list[float]] = {"floor": [], "own": [], "solves": []}
    walls: dict[str, list[float]] = {"floor": [], "own": []}
    for number in range(-1, given.rounds):  # round -1 warms up and is not kept
        for kind in ("floor", "own") if number % 2 else ("own", "floor"):
            with tempfile.TemporaryDirectory() as scratch:
                view = ModelView(
                    arch,
                    checkpoint,
                    {},
                    CalibrationContext(TokenSet.of(ids), machine, Path(scratch)),
                )
                solves.clear()
                began, wall = time.process_time(), time.perf_counter()
                work(view, case, kind)
                spent = time.process_time() - began
                wall = time.perf_counter() - wall
            if number >= 0:
                walls[kind].append(wall)
                seconds[kind].append(spent - sum(solves))
                if kind == "own":
                    seconds["solves"].append(sum(solves))
    own, floor = (statistics.median(seconds[kind]) for kind in ("own", "floor"))
    return {
        "case": case,
        "ratio": own / floor,
        "floor_cpu_seconds": floor,
        "own_cpu_seconds": own,
        "solve_cpu_seconds": statistics.median(seconds["solves"]),
        "cpu_samples": seconds,
        "wall_samples": walls,
        "least_ratio": least_ratio(method(case), arch) if case.endswith(BESIDE) else None,
        "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


def method(case: str) -> Any:
    """The method of a case, with settings that any model bears."""
    if case.startswith("taylor"):
        ends = {"protect_first": 0, "protect_last": 0} if "all blocks" in case else {}
        return Taylor(remove=1, **ends)
    cls = {"minitron": Minitron, "structured_wanda": StructuredWanda, "llm_pruner": LlmPruner}
    towards = "own" if case.endswith("own") else "auto"
    return cls[case.split()[0]](ffn=0.25, heads=0.333, towards=towards)


@functools.cache
def whole(path: Path) -> Any:
    """The model as transformers loads it."""
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


def autograd(view: ModelView) -> None:
    """A plain forward and backward pass, with the gradient of every parameter."""
    context, model = view.calibration(), whole(view.checkpoint.path)
    torch.set_num_threads(context.machine.threads)
    model.zero_grad()
    for ids in context.tokens.ids.split(BATCH_TOKENS["cpu"] // context.tokens.length):
        model(ids, labels=ids, use_cache=False).loss.backward()


def least_ratio(method: Any, arch: Arch) -> float:
    """Multiplications by matrices in a streamed gradient pass over those in a plain one."""
    taylor = isinstance(method, Taylor)
    first, last = (method.protect_first, method.protect_last) if taylor else (0, 0)
    sizes = [
        {t.name: prod(arch.shape(t)) for t in arch.block(layer) if t.role in LINEAR_GROUPS}
        for layer in range(arch.layers)
    ]
    blocks = [sum(own.values()) for own in sizes]
    head = arch.sizes["vocab"] * arch.sizes["residual"]
    own = sum(blocks) + 2 * head  # there, and from the loss back to what enters the head
    own += 2 * sum(blocks[first:])  # again, and back to what enters each block
    own += sum(blocks[first : len(blocks) - last])  # back to its weights
    # Nobody asks for the gradient by what enters the lowest of them.
    entered = [t for t in arch.block(first) if LINEAR_GROUPS.get(t.role) == "attention.in"]
    own -= sum(sizes[first][tensor.name] for tensor in entered)
    return own / (3 * (sum(blocks) + head))


def work(view: ModelView, case: str, kind: str) -> None:
    if case.endswith(BESIDE):
        if kind == "floor":
            autograd(view)
        elif case.startswith("taylor"):
            method(case).decide(view)
        else:
            method(case).scores_before(view)
    elif "gradients" in case:
        if kind == "floor":
            view.gradients(_NoGradients())
        else:
            method(case).scores_before(view)
    elif kind == "floor":
        view.sequential(_Nothing())
    elif "scores" in case:
        own = method(case)
        parts = frozenset(own.fractions)
        view.sequential(width_passes.Measure(own.scorer, parts, view.arch, repr(own)))
    else:
        method(case).decide(view)


if __name__ == "__main__":
    main()
