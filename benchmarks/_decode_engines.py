"""What `decode.py` times: the engines of the dense and the cut model, built once and kept."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np

PARTS = ("dense", "cut")
OURS = ("onnx", "ort_genai")
HANDED = "builder, cache handed on"


@dataclass
class Engine:
    """One thing to time: `kind` says how to open it, `part` which of the two models it is."""

    kind: str
    precision: str
    part: str
    path: Path
    weight_bytes: int = 0
    steps: list[list[list[float]]] = field(default_factory=list)
    """Seconds of each decoding step, by launch and round."""
    prefill: list[list[float]] = field(default_factory=list)

    @property
    def name(self) -> str:
        return f"{self.kind} {self.precision} {self.part}"

    def rounds(self) -> list[np.ndarray]:
        """Median step of each round, one array a launch."""
        return [np.array([np.median(steps) for steps in launch]) for launch in self.steps]


def cut(model: Path, keep: int, out: Path) -> Path:
    """`model` without blocks of its middle, so that `keep` are left."""
    from prune_export.checkpoint import Checkpoint
    from prune_export.surgery import Drop, rewrite

    if (out / "config.json").is_file():
        return out
    source = Checkpoint.open(model)
    arch = source.arch()
    first = arch.layers - keep - 2
    drop = Drop(tuple(range(first, first + arch.layers - keep)))
    out.mkdir(parents=True, exist_ok=True)
    rewrite(source, arch, [drop], out, ram_bytes=2 << 30)
    return out


def built(exporter: Any, checkpoint: Path, out: Path, scratch: Path, threads: int) -> int:
    """Exports unless `out` is complete; the bytes that a decoding step reads."""
    from prune_export.contracts import Work
    from prune_export.machine import Machine
    from prune_export.progress import Silent

    record = out.with_suffix(".json")
    if not record.is_file():
        out.mkdir(parents=True, exist_ok=True)
        machine = Machine.detect(device="cpu", threads=threads)
        scratch.mkdir(parents=True, exist_ok=True)
        made = exporter.export(checkpoint, out, Work(machine, Silent(), scratch))
        print(f"{out.name}: {made.seconds:.1f} s; {'; '.join(made.notes)}", flush=True)
        record.write_text(json.dumps(asdict(made), default=str), encoding="utf-8")
    found: int = json.loads(record.read_text(encoding="utf-8"))["weight_bytes"]
    return found


def built_by_builder(checkpoint: Path, precision: str, out: Path, scratch: Path) -> int:
    """onnxruntime-genai's command line builder with its defaults; bytes a decoding step reads."""
    from prune_export.exporters.ort_genai.graph import decode_bytes

    done = out.with_suffix(".done")
    if not done.is_file():
        command = ["-i", str(checkpoint), "-o", str(out), "-p", precision, "-e", "cpu"]
        command += ["-c", str(scratch / "cache")]
        start = perf_counter()
        subprocess.run(
            [sys.executable, "-m", "onnxruntime_genai.models.builder", *command],
            check=True,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env=os.environ | {"HF_HUB_OFFLINE": "1"},
        )
        print(f"{out.name}: {perf_counter() - start:.1f} s", flush=True)
        done.touch()
    return decode_bytes(out / "model.onnx")


def sets_of(options: argparse.Namespace) -> list[list[Engine]]:
    """What is timed together: dense and cut of one kind for (a), all kinds of one part for (b, c).

    Few at once, so that they fit into memory and a round is short.
    """
    from prune_export.exporters.onnx import Onnx
    from prune_export.exporters.ort_genai import OrtGenai

    work, threads = options.work, options.threads
    scratch = work / "scratch"
    models = {"dense": options.model, "cut": cut(options.model, options.keep, work / "cut")}
    sets: list[list[Engine]] = []
    for precision in options.precisions:
        parts: dict[str, list[Engine]] = {}
        for part, model in models.items():
            group = parts.setdefault(part, [])
            if precision == "fp32":
                out = work / f"onnx-{part}"
                read = built(Onnx(logits="last"), model, out, scratch, threads)
                group.append(Engine("onnx", precision, part, out, read))
            out = work / f"ort_genai-{precision}-{part}"
            read = built(OrtGenai(precision=precision), model, out, scratch, threads)
            group.append(Engine("ort_genai", precision, part, out, read))
            out = work / f"builder-{precision}-{part}"
            read = built_by_builder(model, precision, out, scratch)
            group.append(Engine("builder", precision, part, out, read))
            if precision == "fp32":
                group.append(Engine(HANDED, precision, part, out, read))
            group.append(Engine("genai runtime", precision, part, out, read))
            group.append(Engine("pytorch", "fp32", part, model))
        ours = [e.kind for e in parts["dense"] if e.kind in OURS]
        sets += [
            [replace(e, steps=[], prefill=[]) for part in PARTS for e in parts[part] if e.kind == k]
            for k in ours
        ]
        sets += list(parts.values())
    return sets
