"""The memory that a sparse method takes for 2 billion weights, over Python and torch.

    python benchmarks/sparse_memory.py --work DIR --method wanda       one method, for the record
    python benchmarks/sparse_memory.py --work DIR --method wanda --smoke

A llama with random bfloat16 weights is written to `--work` first. The method then decides, and the
result is written, in a process of its own, whose peak over what it holds once all is imported is
what counts.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from _measured import measured
from angular_distance import _write

LIMITS = {"magnitude": 2.5, "wanda": 2.5, "ria": 2.5, "sparsegpt": 3.5, "gblm": 3.5}
"""GiB."""


def main() -> None:
    options = _options()
    if options.job:
        work = _write if options.job == "write" else _memory
        print("RESULT " + json.dumps(work(options)))
        return
    options.work.mkdir(parents=True, exist_ok=True)
    large = options.work / ("small" if options.smoke else "two-billion")
    if not (large / "config.json").exists():
        _in_process("write", large)
    found = _in_process("memory", large)
    peak, limit = found["peak_over_imports_bytes"], LIMITS[options.method] * 2**30
    print(
        f"{options.method} {options.pattern}: {peak / 2**30:.2f} GiB over imports for "
        f"{found['parameters'] / 1e9:.2f} billion parameters (limit {limit / 2**30:.1f}, plan "
        f"{found['planned_bytes'] / 2**30:.2f}); {found['processor_seconds']:.0f} CPU s"
    )
    if not options.smoke:
        from _result import save

        print(save(f"sparse-memory-{options.method}", found))
        if peak > limit:
            raise SystemExit(1)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--work", type=Path, required=True, help="where the checkpoint is written")
    parser.add_argument("--method", choices=list(LIMITS), default="wanda")
    parser.add_argument("--pattern", default="2:4", help="kept of each group")
    parser.add_argument("--order", default="sequential")
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--smoke", action="store_true", help="a small model")
    parser.add_argument("--job", choices=["write", "memory"], help=argparse.SUPPRESS)
    parser.add_argument("--at", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def _in_process(job: str, at: Path) -> dict[str, Any]:
    own = [sys.executable, __file__, *sys.argv[1:], "--job", job, "--at", str(at)]
    done = subprocess.run(own, stdout=subprocess.PIPE, text=True, check=True)
    line = next(line for line in done.stdout.splitlines() if line.startswith("RESULT "))
    found: dict[str, Any] = json.loads(line.removeprefix("RESULT "))
    return found


def _memory(options: argparse.Namespace) -> dict[str, Any]:
    import torch
    from transformers import AutoModelForCausalLM, LlamaForCausalLM  # noqa: F401

    from prune_export import registry
    from prune_export.calibrate import CalibrationContext, ModelView, TokenSet, pass_cost
    from prune_export.checkpoint import Checkpoint
    from prune_export.machine import Machine
    from prune_export.sparsity.nm import Nm
    from prune_export.surgery import rewrite

    keep, of = map(int, options.pattern.split(":"))
    keys: dict[str, Any] = {"nm": Nm(keep, of)}
    if options.method != "magnitude":
        keys["order"] = options.order
    method = registry.find("methods", options.method)(**keys)
    vocabulary = json.loads((options.at / "config.json").read_text())["vocab_size"]
    random = torch.Generator().manual_seed(0)
    ids = torch.randint(0, vocabulary, (options.samples, options.length), generator=random)
    tokens = TokenSet.of(ids)
    machine = Machine.detect(device="cpu", threads=options.threads)
    torch.ones(64, 64) @ torch.ones(64, 64)
    out, scratch = options.work / "out", options.work / "scratch"

    def work() -> None:
        checkpoint = Checkpoint.open(options.at)
        arch = checkpoint.arch()
        view = ModelView(arch, checkpoint, {}, CalibrationContext(tokens, machine, scratch))
        rewrite(checkpoint, arch, method.decide(view).edits, out, ram_bytes=1 << 30)

    for folder in (out, scratch):
        shutil.rmtree(folder, ignore_errors=True)
    taken = measured(work)
    for folder in (out, scratch):
        shutil.rmtree(folder, ignore_errors=True)
    checkpoint = Checkpoint.open(options.at)
    arch = checkpoint.arch()
    planned = pass_cost(arch, method.statistics(arch), *ids.shape, machine)
    return {
        "method": options.method,
        "pattern": options.pattern,
        "order": options.order,
        "parameters": arch.parameters(),
        "checkpoint_bytes": checkpoint.nbytes,
        "samples": options.samples,
        "length": options.length,
        "threads": options.threads,
        "planned_bytes": planned.ram_bytes,
        **taken,
    }


if __name__ == "__main__":
    main()
