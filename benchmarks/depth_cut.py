"""Depth cut of a sharded checkpoint against `cp` of the bytes that are kept.

    python benchmarks/depth_cut.py                # 3 GiB, 5 rounds a condition
    python benchmarks/depth_cut.py --gib 0.25 --rounds 1

Makes a synthetic llama checkpoint (random bf16 bits) of several shards, drops 40 % of its blocks
with `surgery.rewrite` in a process of its own, and copies a directory of exactly the same result
with `cp -r` from an equal process. The two alternate, and which goes first does too. Four
conditions: the input in the page cache or dropped from it, and the output only handed to the kernel
or forced to the disk (`fsync` in the rewrite, `sync FILE…` after `cp`). Timed is the call of
`rewrite`, everything that it checks included; `process_seconds` has Python's start and its imports
too. Peak memory is the child's own high-water mark (VmHWM), interpreter and imports included.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

BLOCK_PARAMETERS = 2 * 2048 * 2048 + 2 * 512 * 2048 + 3 * 8192 * 2048 + 2 * 2048
HEAD_PARAMETERS = 2 * 32000 * 2048 + 2048
CONDITIONS = [(cache, disk) for cache in ("warm", "cold") for disk in ("kernel", "disk")]


def main() -> None:
    asked = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    asked.add_argument("--gib", type=float, default=3.0, help="least size of the checkpoint")
    asked.add_argument("--rounds", type=int, default=5, help="pairs of runs for each condition")
    asked.add_argument("--dir", type=Path, default=None, help="where to work (default: temporary)")
    asked.add_argument("--save", action="store_true", help="keep the result in benchmarks/results")
    given = asked.parse_args()
    with tempfile.TemporaryDirectory(dir=given.dir, prefix="depth-cut-") as place:
        payload = measure(Path(place), given.gib, given.rounds)
    if given.save:
        from _result import save

        print(save("depth-cut", payload))
    print(json.dumps({key: payload[key] for key in ("summary", "peak_rss_bytes")}, indent=2))


def measure(place: Path, gib: float, rounds: int) -> dict[str, Any]:
    source, kept, out = place / "source", place / "kept", place / "out"
    layers = max(5, math.ceil((gib * 2**30 / 2 - HEAD_PARAMETERS) / BLOCK_PARAMETERS))
    child("make", str(source), str(layers))
    run("rewrite", source, kept, kept, "disk")
    samples: list[dict[str, Any]] = []
    for cache, disk in CONDITIONS:
        for number in range(-1, rounds):  # round -1 warms up and is not kept
            for kind in ("rewrite", "cp") if number % 2 else ("cp", "rewrite"):
                shutil.rmtree(out, ignore_errors=True)
                os.sync()
                set_cache(source if kind == "rewrite" else kept, cache)
                found = run(kind, source, kept, out, disk)
                if number >= 0:
                    row = {"cache": cache, "output": disk, "round": number, "kind": kind}
                    samples.append(row | found)
                    print(json.dumps(samples[-1]), file=sys.stderr, flush=True)
                if kind == "rewrite":
                    refuse_difference(kept, out)
    kept_bytes = sum(file.stat().st_size for file in kept.iterdir())
    rewrites = [sample for sample in samples if sample["kind"] == "rewrite"]
    return {
        "source_bytes": sum(file.stat().st_size for file in source.iterdir()),
        "kept_bytes": kept_bytes,
        "shards": len(list(source.glob("*.safetensors"))),
        "layers": layers,
        "rounds": rounds,
        "peak_rss_bytes": max(sample["peak_rss_bytes"] for sample in rewrites),
        "summary": [summarize(samples, cache, disk, kept_bytes) for cache, disk in CONDITIONS],
        "samples": samples,
    }


def summarize(samples: list[dict[str, Any]], cache: str, disk: str, size: int) -> dict[str, Any]:
    here = [row for row in samples if (row["cache"], row["output"]) == (cache, disk)]
    of = {
        kind: [row["seconds"] for row in here if row["kind"] == kind] for kind in ("cp", "rewrite")
    }
    ratios = [cp / own for cp, own in zip(of["cp"], of["rewrite"], strict=True)]
    middle = {kind: statistics.median(seconds) for kind, seconds in of.items()}
    cpu = {
        kind: statistics.median(row["cpu_seconds"] for row in here if row["kind"] == kind)
        for kind in ("cp", "rewrite")
    }
    return {
        "cache": cache,
        "output": disk,
        "n": len(ratios),
        "cp_seconds_median": middle["cp"],
        "rewrite_seconds_median": middle["rewrite"],
        "rewrite_bytes_per_second": size / middle["rewrite"],
        "throughput_ratio": middle["cp"] / middle["rewrite"],
        "pair_ratios_min_median_max": [min(ratios), statistics.median(ratios), max(ratios)],
        "cpu_seconds_ratio": cpu["cp"] / cpu["rewrite"],
        "process_seconds_median": statistics.median(
            row["process_seconds"] for row in here if row["kind"] == "rewrite"
        ),
    }


def run(kind: str, source: Path, kept: Path, out: Path, disk: str) -> dict[str, Any]:
    start = time.perf_counter()
    found = child(kind, str(source), str(kept), str(out), disk)
    return found | {"process_seconds": time.perf_counter() - start}


def child(*arguments: str) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, __file__, "--child", *arguments], check=True, stdout=subprocess.PIPE
    )
    return dict(json.loads(done.stdout))


def set_cache(directory: Path, cache: str) -> None:
    """Brings the files into the page cache, or drops them from it (they must be clean for that)."""
    for file in directory.iterdir():
        with file.open("rb", buffering=0) as stream:
            if cache == "cold":
                os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            else:
                while stream.read(2**24):
                    pass


def refuse_difference(one: Path, other: Path) -> None:
    subprocess.run(["diff", "-rq", str(one), str(other)], check=True)


def make(out: Path, layers: int) -> dict[str, Any]:
    """A llama checkpoint of random bits in shards of 512 MiB."""
    import torch

    from prune_export.arch import Arch
    from prune_export.checkpoint import Planned, write_checkpoint
    from prune_export.checkpoint.config import full_config

    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "bfloat16",
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "num_hidden_layers": layers,
        "vocab_size": 32000,
        "tie_word_embeddings": False,
    }
    arch = Arch.from_config(full_config(config, out))
    generator = torch.Generator().manual_seed(0)

    def bits(shape: tuple[int, ...]) -> torch.Tensor:
        drawn = torch.randint(-(2**15), 2**15, shape, dtype=torch.int16, generator=generator)
        return drawn.view(torch.bfloat16)

    shapes = {tensor.name: arch.shape(tensor) for tensor in arch.stored()}
    planned = [Planned(name, "BF16", of, partial(bits, of)) for name, of in shapes.items()]
    write_checkpoint(out, config, planned, max_shard_bytes=2**29)
    return {}


def timed(kind: str, source: Path, kept: Path, out: Path, disk: str) -> dict[str, Any]:
    """Drops 40 % of the blocks, from the middle, or copies `kept`; seconds and peak memory.

    Both kinds do the same before the clock starts. A virtual machine hands memory that was free for
    a second or two back to its host and must fetch it again, so whoever starts later pays more.
    """
    from prune_export.checkpoint import Checkpoint
    from prune_export.surgery import Drop, rewrite

    opened = Checkpoint.open(source)
    arch = opened.arch()
    count = round(0.4 * arch.layers)
    first = (arch.layers - count) // 2
    drop = Drop(tuple(range(first, first + count)))
    start, cpu = time.perf_counter(), cpu_seconds()
    if kind == "rewrite":
        rewrite(
            opened, arch, [drop], out,
            ram_bytes=2**30, max_shard_bytes=2**29, fsync=disk == "disk",
        )  # fmt: skip
    else:
        subprocess.run(["cp", "-r", str(kept), str(out)], check=True)
        if disk == "disk":
            subprocess.run(["sync", *map(str, out.iterdir())], check=True)
    seconds, cpu = time.perf_counter() - start, cpu_seconds() - cpu
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return {
        "seconds": seconds,
        "cpu_seconds": cpu,
        "peak_rss_bytes": int(status.split("VmHWM:")[1].split()[0]) * 1024,
        "ru_maxrss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


def cpu_seconds() -> float:
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        match sys.argv[2:]:
            case ["make", out, layers]:
                print(json.dumps(make(Path(out), int(layers))))
            case [kind, source, kept, out, disk]:
                print(json.dumps(timed(kind, Path(source), Path(kept), Path(out), disk)))
    else:
        main()
