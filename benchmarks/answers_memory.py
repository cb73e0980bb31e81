"""The memory that keeping a teacher's answers takes for 2 billion weights, over Python and torch.

    python benchmarks/answers_memory.py --work DIR            for the record
    python benchmarks/answers_memory.py --work DIR --smoke    a small model

A llama with random bfloat16 weights is written to `--work` first. The pass then runs in a process
of its own, whose peak over what it holds once all is imported is what counts.
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

LIMIT_BYTES = int(1.5 * 2**30)


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
    peak = found["peak_over_imports_bytes"]
    print(
        f"{peak / 2**30:.2f} GiB over imports for {found['parameters'] / 1e9:.2f} billion "
        f"parameters (limit {LIMIT_BYTES / 2**30:.1f}, plan {found['planned_bytes'] / 2**30:.2f}); "
        f"{found['processor_seconds']:.0f} CPU s, {found['bytes_a_position']:.0f} bytes a position"
    )
    if not options.smoke:
        from _result import save

        print(save("answers-memory", found))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--work", type=Path, required=True, help="where the checkpoint is written")
    parser.add_argument("--outcomes", type=int, default=64, help="tokens kept a position")
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--threads", type=int, default=1)
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

    from prune_export.calibrate import TokenSet, answers_cost, keep_answers
    from prune_export.checkpoint import Checkpoint
    from prune_export.machine import Machine

    torch.set_num_threads(options.threads)
    vocabulary = json.loads((options.at / "config.json").read_text())["vocab_size"]
    random = torch.Generator().manual_seed(0)
    ids = torch.randint(0, vocabulary, (options.samples, options.length), generator=random)
    tokens = TokenSet.of(ids)
    machine = Machine.detect(device="cpu", threads=options.threads)
    torch.ones(64, 64) @ torch.ones(64, 64)
    checkpoint = Checkpoint.open(options.at)
    arch, out = checkpoint.arch(), options.work / "out"
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()

    def work() -> None:
        keep_answers(
            checkpoint, tokens, out, outcomes=options.outcomes, temperature=1.0, arch=arch,
            machine=machine,
        )  # fmt: skip

    taken = measured(work)
    written = sum(file.stat().st_size for file in out.iterdir())
    shutil.rmtree(out)
    planned = answers_cost(arch, *ids.shape, options.outcomes, machine)
    return {
        "parameters": arch.parameters(),
        "checkpoint_bytes": checkpoint.nbytes,
        "outcomes": options.outcomes,
        "samples": options.samples,
        "length": options.length,
        "threads": options.threads,
        "planned_bytes": planned.ram_bytes,
        "bytes_a_position": written / (options.samples * (options.length - 1)),
        **taken,
    }


if __name__ == "__main__":
    main()
