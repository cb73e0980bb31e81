"""Angular distances against one plain forward pass, and the memory they take for 2 billion weights.

    python benchmarks/angular_distance.py --model MODEL --work DIR     the figures for the record
    python benchmarks/angular_distance.py --work DIR --smoke           the same on small models

Each measurement runs in a process of its own. For time, one process does both jobs in turns, on the
same tokens, in float32 and in the same batches: the whole streamed pass, opening and reading the
checkpoint included, and transformers' decoder (no head) with its weights already loaded. For
memory, a process reports its peak over what it holds once torch and transformers are imported; the
checkpoint, bfloat16 and random, is written to `--work` first.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

LIMIT_RATIO, LIMIT_BYTES = 1.15, 1.5 * 1024**3


def main() -> None:
    options = _options()
    if options.job:
        jobs: dict[str, Callable[[argparse.Namespace], dict[str, Any]]] = {
            "write": _write,
            "time": _time,
            "memory": _memory,
        }
        print("RESULT " + json.dumps(jobs[options.job](options)))
        return
    work: Path = options.work
    work.mkdir(parents=True, exist_ok=True)
    large = work / ("small" if options.smoke else "two-billion")
    if not (large / "config.json").exists():
        _in_process("write", options, large)
    model = options.model or work / "small"
    timed = _in_process("time", options, model)
    held = _in_process("memory", options, large)
    found = {"time": timed, "memory": held}
    ratio, peak = timed["ratio_median"], held["peak_over_imports_bytes"]
    print(
        f"time: {ratio:.3f} of one plain forward pass ({timed['tokens']} tokens, "
        f"{timed['rounds']} rounds; limit {LIMIT_RATIO})\n"
        f"memory: {peak / 2**30:.2f} GiB over imports for {held['parameters'] / 1e9:.2f} billion "
        f"parameters (limit {LIMIT_BYTES / 2**30:.1f} GiB; over a bare Python: "
        f"{held['peak_bytes'] / 2**30:.2f} GiB)"
    )
    if not options.smoke:
        from _result import save

        print(save("angular-distance", found))
        if ratio > LIMIT_RATIO or peak > LIMIT_BYTES:
            raise SystemExit(1)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", type=Path, help="model directory to time; 135M or more")
    parser.add_argument("--work", type=Path, required=True, help="where the checkpoint is written")
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--memory-samples", type=int, default=8, help="windows for the 2B model")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--smoke", action="store_true", help="small models, few tokens")
    parser.add_argument("--job", choices=["write", "time", "memory"], help=argparse.SUPPRESS)
    parser.add_argument("--at", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.smoke:
        options.samples, options.length, options.memory_samples, options.rounds = 4, 128, 4, 1
    return options


def _in_process(job: str, options: argparse.Namespace, at: Path) -> dict[str, Any]:
    own = [sys.executable, __file__, *sys.argv[1:], "--job", job, "--at", str(at)]
    done = subprocess.run(own, stdout=subprocess.PIPE, text=True, check=True)
    line = next(line for line in done.stdout.splitlines() if line.startswith("RESULT "))
    found: dict[str, Any] = json.loads(line.removeprefix("RESULT "))
    return found


def _write(options: argparse.Namespace) -> dict[str, Any]:
    """A llama with random bfloat16 weights, written tensor by tensor."""
    import torch
    from safetensors.torch import save_file
    from transformers import LlamaConfig

    from prune_export.arch import Arch

    shape = {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 28,
             "num_attention_heads": 16, "num_key_value_heads": 4,
             "vocab_size": 128_256}  # fmt: skip
    if options.smoke:
        shape |= {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 8,
                  "num_attention_heads": 4, "num_key_value_heads": 2,
                  "vocab_size": 1024}  # fmt: skip
    config = LlamaConfig(**shape, tie_word_embeddings=True, dtype="bfloat16")
    options.at.mkdir(parents=True, exist_ok=True)
    arch = Arch.from_config(config.to_dict())
    torch.manual_seed(0)
    shards: dict[int | None, dict[str, torch.Tensor]] = {}
    index: dict[str, str] = {}
    for tensor in arch.stored():
        size = arch.shape(tensor)
        value = torch.ones(size) if len(size) == 1 else torch.randn(size) * 0.02
        shards.setdefault(tensor.layer, {})[tensor.name] = value.to(torch.bfloat16)
        last = tensor is arch.stored()[-1]
        for layer in [layer for layer in shards if last or layer != tensor.layer]:
            file = f"model-{'ends' if layer is None else layer}-{len(index)}.safetensors"
            held = shards.pop(layer)
            save_file(held, options.at / file, metadata={"format": "pt"})
            index |= dict.fromkeys(held, file)
    total = {"total_size": 2 * arch.parameters()}
    (options.at / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": total, "weight_map": index})
    )
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(options.at)
    return {"parameters": arch.parameters()}


def _pass(options: argparse.Namespace, samples: int) -> Callable[[], None]:
    """The work that is measured: from a directory to the matrix of distances."""
    from prune_export.calibrate import AngularDistance, CalibrationContext, gather
    from prune_export.checkpoint import Checkpoint
    from prune_export.machine import Machine

    tokens = _tokens(options, samples)

    def run() -> None:
        machine = Machine.detect(device="cpu", threads=options.threads)
        gather(
            Checkpoint.open(options.at), [AngularDistance()], CalibrationContext(tokens, machine)
        )

    return run


def _tokens(options: argparse.Namespace, samples: int) -> Any:
    import torch

    from prune_export.calibrate import TokenSet

    vocabulary = json.loads((options.at / "config.json").read_text())["vocab_size"]
    random = torch.Generator().manual_seed(0)
    return TokenSet.of(torch.randint(0, vocabulary, (samples, options.length), generator=random))


def _time(options: argparse.Namespace) -> dict[str, Any]:
    import torch
    from transformers import AutoModelForCausalLM

    from prune_export.calibrate.streaming.driver import BATCH_TOKENS

    torch.set_num_threads(options.threads)
    model = AutoModelForCausalLM.from_pretrained(options.at, dtype=torch.float32).eval()
    streamed = _pass(options, options.samples)
    ids = _tokens(options, options.samples).ids
    batch = max(1, BATCH_TOKENS["cpu"] // options.length)

    def plain() -> None:
        with torch.inference_mode():
            for start in range(0, len(ids), batch):
                model.base_model(ids[start : start + batch], use_cache=False)

    model.base_model(ids[:1])  # warm up
    rounds = [(_seconds(plain), _seconds(streamed)) for _ in range(options.rounds)]
    ratios = [ours / theirs for (theirs, _), (ours, _) in rounds]
    return {
        "model": options.at.name,
        "parameters": sum(one.numel() for one in model.parameters()),
        "tokens": ids.numel(),
        "samples": options.samples,
        "length": options.length,
        "batch": batch,
        "threads": options.threads,
        "rounds": options.rounds,
        "plain_seconds": [theirs for (theirs, _), _ in rounds],
        "streamed_seconds": [ours for _, (ours, _) in rounds],
        "plain_processor_seconds": [theirs for (_, theirs), _ in rounds],
        "streamed_processor_seconds": [ours for _, (_, ours) in rounds],
        "ratio_median": statistics.median(ratios),
        "ratio_low": min(ratios),
        "ratio_high": max(ratios),
    }


def _seconds(work: Callable[[], None]) -> tuple[float, float]:
    wall, processor = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - wall, time.process_time() - processor


def _memory(options: argparse.Namespace) -> dict[str, Any]:
    import torch
    from transformers import AutoModelForCausalLM, LlamaForCausalLM  # noqa: F401

    import prune_export.calibrate  # noqa: F401
    from prune_export.checkpoint import Checkpoint

    torch.ones(64, 64) @ torch.ones(64, 64)
    process = psutil.Process()
    before = process.memory_info().rss
    peak, over = [before], threading.Event()

    def watch() -> None:
        while not over.wait(0.01):
            peak[0] = max(peak[0], process.memory_info().rss)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    wall, processor = _seconds(_pass(options, options.memory_samples))
    over.set()
    watcher.join()
    return {
        "parameters": Checkpoint.open(options.at).arch().parameters(),
        "checkpoint_bytes": Checkpoint.open(options.at).nbytes,
        "samples": options.memory_samples,
        "length": options.length,
        "threads": options.threads,
        "imports_bytes": before,
        "peak_bytes": peak[0],
        "peak_over_imports_bytes": peak[0] - before,
        "seconds": wall,
        "processor_seconds": processor,
    }


if __name__ == "__main__":
    main()
