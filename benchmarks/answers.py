"""Keeps a teacher's answers, and says what that takes beside a forward pass, and what it loses.

    python benchmarks/answers.py DENSE STUDENT text.jsonl --windows 8 --length 256

For 64 and 256 tokens a position: processor seconds beside those of transformers' own forward pass
of the same windows, the peak of memory over Python and torch, bytes a position, and the student's
divergence from what was kept beside that from the teacher itself.
"""

from __future__ import annotations

import argparse
import json
import resource
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from _result import save
from heal import _windows

from prune_export.calibrate import CalibrationContext, KeptAnswers, TokenSet, keep_answers
from prune_export.checkpoint import Checkpoint
from prune_export.machine import Machine
from prune_export.training.losses.distill_loss import Answers, distill_loss
from prune_export.training.losses.objective import Distill


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("dense", type=Path)
    parser.add_argument("student", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(args.threads)
    machine = Machine.detect(device="cpu", threads=args.threads)
    ids = _windows(args.text, args.dense, args.length)[: args.windows]
    tokens, dense = TokenSet.of(ids), Checkpoint.open(args.dense)
    base, rows = _peak(), []
    with tempfile.TemporaryDirectory() as folder:
        for outcomes in (64, 256):
            out = Path(folder, str(outcomes))
            out.mkdir()
            began = time.process_time()
            keep_answers(
                dense, CalibrationContext(tokens, machine), out, outcomes=outcomes,
                temperature=1.0, arch=dense.arch(),
            )  # fmt: skip
            spent = time.process_time() - began
            size = sum(file.stat().st_size for file in out.iterdir())
            rows.append(
                {
                    "tokens": outcomes,
                    "cpu_seconds": spent,
                    "peak_bytes_over_start": _peak() - base,
                    "bytes_a_position": size / (len(ids) * (args.length - 1)),
                }
            )
        teacher, student = (
            AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
            for path in (args.dense, args.student)
        )
        # All windows twice: the first pass also reads the file.
        for _ in range(2):
            began = time.process_time()
            with torch.no_grad():
                said = [teacher(one[None], use_cache=False).logits for one in ids]
            forward = time.process_time() - began
        with torch.no_grad():
            own = [student(one[None], use_cache=False).logits for one in ids]
        live = _mean(own, ids, [Answers(logits=one) for one in said])
        for row in rows:
            kept = KeptAnswers.open(Path(folder, str(row["tokens"])))
            found = [kept.of(torch.tensor([at]), "cpu") for at in range(len(ids))]
            row["divergence"] = _mean(own, ids, [Answers(ids=i, log_p=p) for i, p in found])
            row["times_a_forward"] = row["cpu_seconds"] / forward
    result: dict[str, Any] = {
        "windows": len(ids), "length": args.length, "forward_cpu_seconds": forward,
        "divergence": live, "kept": rows,
    }  # fmt: skip
    print(json.dumps(result, indent=2))
    print(save("answers", result))


def _mean(logits: list[torch.Tensor], ids: torch.Tensor, answers: list[Answers]) -> float:
    with torch.no_grad():
        losses = [
            distill_loss(one, said, own[None], None, Distill())
            for one, said, own in zip(logits, answers, ids, strict=True)
        ]
    return float(torch.stack(losses).mean())


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    main()
