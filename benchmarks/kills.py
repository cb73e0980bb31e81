"""Kills healing, a teacher's cache and generated data at random moments: same bytes after resume?

    python benchmarks/kills.py [--kills 20] [--text DIR]

Each kind of work is done unbroken, twice. Then, each time in a store of its own, a process doing it
is killed (SIGKILL) after a random part of the second one's time, and another goes on to the end.
One that was done before is no kill, and another moment is drawn. All files of all artifacts are
compared. Processes are forked from one that has imported what they need, so that
the moment lies in the work and not in Python's start.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from _result import save
from kill_and_resume import tiny

from prune_export import registry
from prune_export.execution.context import RunContext
from prune_export.execution.inputs import base_from_directory
from prune_export.execution.said import make_data
from prune_export.execution.stages import run_heal
from prune_export.machine import Machine
from prune_export.progress import Silent
from prune_export.recipe import Recipe
from prune_export.store import Store

TEXT = "{files: [healing.jsonl], samples: 128, length: 64}"
LONG = "{files: [healing.jsonl], samples: 400, length: 64}"
SAID = "{generated: {from: dense, prompts: none, new_tokens: 32}, samples: 8, length: 32}"
ONCE = "{method: lora, rank: 2, batch: 2, steps: 1OBJECTIVE}"
SHORT = "batch: 4, steps: 14, save_every: 2, learning_rate: 1.0e-3"
BESIDE, KEPT = (f"objective: {{distill: {{cache: {how}}}}}" for how in ("live", "16"))
OWN = "objective: {distill: {on_policy: 0.5, new_tokens: 16}}"
KINDS = {
    # what is killed: (healing data, heal stage)
    "cache": (LONG, ONCE.replace("OBJECTIVE", f", {KEPT}")),
    "lora": (TEXT, f"{{method: lora, rank: 4, layerdrop: 0.2, {SHORT}}}"),
    "qlora": (TEXT, f"{{method: qlora, rank: 4, {SHORT}}}"),
    "full, distilled live": (TEXT, f"{{method: full, {SHORT}, {BESIDE}}}"),
    "full, distilled from a cache": (TEXT, f"{{method: full, {SHORT}, {KEPT}}}"),
    "full, on-policy": (TEXT, f"{{method: full, {SHORT}, {OWN}}}"),
    "generated data": (SAID, ONCE.replace("OBJECTIVE", "")),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--text", type=Path, default=Path(".demo"), help="has healing.jsonl")
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    chance = random.Random(chosen.seed)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        model = tiny(root / "model", chosen.text)
        shutil.copy(chosen.text / "healing.jsonl", root / "healing.jsonl")
        for healer in registry.names("heal"):  # a child is to import nothing any more
            registry.find("heal", healer)
        work(root, model, root / "warm", "lora")  # imports all that a child needs
        wanted: dict[str, dict[str, str]] = {}
        seconds: dict[str, float] = {}
        for kind in KINDS:
            for place in ("first", "whole"):  # the first one reads from a cold disk
                began = time.monotonic()
                forked(lambda k=kind, to=root / place / kind: work(root, model, to, k))
                seconds[kind] = time.monotonic() - began
            wanted[kind] = files_in(root / "whole" / kind)
            if files_in(root / "first" / kind) != wanted[kind]:
                sys.exit(f"{kind}: two unbroken runs differ")
            print(f"{kind}: {seconds[kind]:.1f} s, {len(wanted[kind])} files", flush=True)
        rows = []
        names = list(KINDS)
        while len(rows) < chosen.kills:
            kind = names[len(rows) % len(names)]
            store = root / "killed" / str(len(rows))
            at = chance.uniform(0.05, 0.95) * seconds[kind]
            died = forked(lambda k=kind, s=store: work(root, model, s, k), at)
            if not died:
                shutil.rmtree(store)
                continue
            left = reached(store)
            forked(lambda k=kind, s=store: work(root, model, s, k))
            got = files_in(store)
            other = sorted(
                name for name in {*got, *wanted[kind]} if got.get(name) != wanted[kind].get(name)
            )
            equal = not other
            rows.append({"kind": kind, "after_s": round(at, 2), "at": left, "equal": equal})
            if other:
                rows[-1]["unequal_files"] = other
            print(
                f"{len(rows):3}  {kind:<30} after {at:5.1f} s in {left or 'nothing':<20} {equal}",
                flush=True,
            )
            shutil.rmtree(store)
            same = sum(bool(row["equal"]) for row in rows)
            # After each, as on a busy machine there may be less time than was thought.
            save("kills", {"unbroken_s": seconds, "equal": same, "kills": rows})
    print(f"{same} of {len(rows)} equal")
    sys.exit(same != len(rows))


def work(root: Path, model: Path, store: Path, kind: str) -> None:
    """Does one kind of work, or goes on with it."""
    data, heal = KINDS[kind]
    text = f"recipe: 1\ndata: {{healing: {data}}}\nstages: [{{heal: {heal}}}]\n"
    recipe = Recipe.parse(text, root=root)
    context = RunContext(Store(store), Machine("cpu", 4 << 30, 0, 1), Silent())
    base = base_from_directory(context, str(model), model, None)
    made = make_data(context, "healing", recipe.data["healing"], root, base)
    (stage,) = recipe.stages
    run_heal(context, stage, base.path, base.id, made, base if stage.entry.taught else None)


def forked(task: Callable[[], None], seconds: float | None = None) -> bool:
    """Does a task in a process of its own; True if it was killed after `seconds`."""
    child = os.fork()
    if not child:
        try:
            task()
        except BaseException as error:  # nothing of it may go on in the child
            sys.stderr.write(f"{type(error).__name__}: {error}\n")
            os._exit(1)
        os._exit(0)
    end = time.monotonic() + (seconds if seconds is not None else 1e9)
    while time.monotonic() < end:
        if os.waitpid(child, os.WNOHANG)[0]:
            return False
        time.sleep(0.01)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return True


def files_in(store: Path) -> dict[str, str]:
    """The hashes of all files of all finished artifacts."""
    found = {}
    for manifest in sorted(store.rglob("manifest.json")):
        known = json.loads(manifest.read_text(encoding="utf-8"))
        for name, digest in known["files"].items():
            found[f"{manifest.parent.name}/{name}"] = str(digest["sha256"])
    return found


def reached(store: Path) -> str:
    """The artifact that was being made when the process died."""
    partial = sorted(path.name.removesuffix(".partial") for path in store.rglob("*.partial"))
    return next((name[:20] for name in partial if not name.startswith(".")), "")


if __name__ == "__main__":
    main()
