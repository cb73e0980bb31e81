"""Perplexity, time and memory of the sparse methods, beside llm-compressor's on the same tokens.

    python benchmarks/sparse_quality.py --model DIR --data DIR --work DIR --peer-python PYTHON

`--model` is a checkpoint, `--data` holds `calibration.jsonl` and `evaluation.jsonl`, and
`--peer-python` is the Python of an environment with llm-compressor (left out: ours alone). Every
pruning runs in a process of its own, from a directory to a directory. Its seconds and its peak of
memory, over what the process holds once all is imported, are of that work; of llm-compressor's
they leave out reading and saving the model. All perplexities are measured by the same code.

Where two pruners do the same arithmetic in another order, a few weights at the edge fall to the
other side, and what follows from them is another draw of equal quality. `--shuffles` tells how far
such draws lie apart: the windows come in another order, which changes nothing but the rounding of
sums. A pair of weights whose scores are equal to the last bit may still fall the same way in all of
them, so `--jittered` moves every weight of the dense model by about 1e-6 of itself instead.
`--alternating` runs a pruning and a plain forward pass in turns, in one process, and takes the
median of the pairs: what a machine's drift does to one it does to the other.
`--draws` does something else instead: it prunes `--drawn` from as many choices of calibration
windows, in `--orders`, and as the authors' codes do it (`_sparse_released.py`). Those lie apart by
more than rounding, so that means over them tell more. All of a draw happens in one process.
`--permuted` adds 2:4 with `permute: true`, in the one-pass order, beside the same without.

What is finished is kept in `--work`, so a run can be stopped (`--minutes`) and called again; the
results file is written once all is there.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from _sparse_jobs import BATCH, JOBS

PATTERNS = ("50%", "4:8", "6:8", "2:4")
"""Kept of each group."""


def main() -> None:
    options = _options()
    if options.job:
        import torch

        torch.set_float32_matmul_precision(options.precision)
        print("RESULT " + json.dumps(JOBS[options.job](options)))
        return
    options.work.mkdir(parents=True, exist_ok=True)
    began, done = time.monotonic(), {}
    for name, own in _tasks(options):
        if options.only and own["job"] in ("ours", "peer") and own["job"] != options.only:
            continue
        file = options.work / f"{name.replace(':', '-').replace('%', '')}.json"
        if not file.exists():
            if time.monotonic() - began > 60 * options.minutes:
                print(f"stopped after {options.minutes} minutes, before {name}")
                return
            found = _in_process(own, options)
            file.write_text(json.dumps(found))
            print(name, {k: v for k, v in found.items() if k != "losses"}, flush=True)
        done[name] = json.loads(file.read_text())
    if options.only:
        return
    if options.draws:
        _report_draws(options, done)
    else:
        _report(options, done)


def _report_draws(options: argparse.Namespace, done: dict[str, Any]) -> None:
    from _result import save

    rows = [row for name, own in done.items() if name.startswith("draw ") for row in own["rows"]]
    by: dict[tuple[str, str], list[float]] = {}
    for row in rows:
        case, pruner = f"{row['method']} {row['pattern']}", f"{row['who']} {row['order']}"
        by.setdefault((case, pruner), []).append(row["perplexity"])
    for (case, pruner), found in by.items():
        drawn = " ".join(f"{one:.2f}" for one in found)
        print(f"{case:16} {pruner:20} mean {sum(found) / len(found):8.2f}  of {drawn}")
    known = {key: done[key] for key in ("tokens", "dense")}
    settings = {
        "model": options.model.name,
        "threads": options.threads,
        "batch": BATCH,
        "precision": options.precision,
    }
    methods = dict.fromkeys(case.split()[0] for case in options.drawn)
    print(save(f"sparse-draws-{'-'.join(methods)}", {**settings, **known, "rows": rows}))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", type=Path, required=True, help="model directory, float32")
    parser.add_argument("--data", type=Path, required=True, help="where the two .jsonl lie")
    parser.add_argument("--work", type=Path, required=True, help="where all is written")
    parser.add_argument("--peer-python", type=Path, help="a Python that imports llmcompressor")
    parser.add_argument("--methods", nargs="+", default=["magnitude", "wanda", "ria", "sparsegpt"])
    parser.add_argument("--patterns", nargs="+", default=list(PATTERNS))
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--windows", type=int, default=16, help="of the evaluation")
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--shuffles", type=int, default=0, help="of the windows' order, besides")
    parser.add_argument("--shuffled", nargs="*", default=["sparsegpt 50%"], help="what of")
    parser.add_argument("--jittered", nargs="*", default=[], help="what of, as often as --shuffles")
    parser.add_argument("--draws", type=int, default=0, help="of the calibration windows")
    parser.add_argument("--drawn", nargs="*", default=["gblm 4:8"], help="what of")
    parser.add_argument("--orders", nargs="*", default=["sequential", "block", "released"])
    parser.add_argument(
        "--precision", default="highest", help="torch's, of float32 products: `medium` is faster"
    )
    parser.add_argument("--permuted", nargs="*", default=[], help="methods of 2:4 to permute too")
    parser.add_argument("--alternating", nargs="*", default=[], help="what to take the time of so")
    parser.add_argument("--rounds", type=int, default=3, help="of the plain forward pass")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--minutes", type=float, default=1e6, help="start nothing after so long")
    parser.add_argument("--only", choices=["ours", "peer"], help="do these, and write no results")
    parser.add_argument("--job", choices=list(JOBS), help=argparse.SUPPRESS)
    parser.add_argument("--method", help=argparse.SUPPRESS)
    parser.add_argument("--pattern", help=argparse.SUPPRESS)
    parser.add_argument("--order", help=argparse.SUPPRESS)
    parser.add_argument("--shuffle", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--jitter", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--draw", type=int, default=0, help=argparse.SUPPRESS)
    return parser.parse_args()


def _tasks(options: argparse.Namespace) -> Iterator[tuple[str, dict[str, str]]]:
    yield "tokens", {"job": "tokens"}
    yield "dense", {"job": "dense"}
    if options.draws:
        for draw in range(1, options.draws + 1):
            yield f"draw {draw}", {"job": "draw", "draw": str(draw)}
        return
    yield "forward", {"job": "forward"}
    for pattern in options.patterns:
        for method in options.methods:
            for order in ("sequential", "block") if method in COMPARED else ("sequential",):
                own = {"method": method, "pattern": pattern, "order": order}
                yield f"ours {method} {pattern} {order}", {"job": "ours", **own}
            if options.peer_python and method in COMPARED:
                own = {"method": method, "pattern": pattern, "order": "block"}
                yield f"peer {method} {pattern} block", {"job": "peer", **own}
    for method in options.permuted:
        own = {"method": method, "pattern": "2:4", "order": "permuted"}
        yield f"ours {method} 2:4 permuted", {"job": "ours", **own}
    for case in options.alternating:
        method, pattern = case.split()
        own = {"method": method, "pattern": pattern, "order": "sequential"}
        yield f"alternating {method} {pattern}", {"job": "alternating", **own}
    for kind, cases in (("shuffle", options.shuffled), ("jitter", options.jittered)):
        for again, case in itertools.product(range(1, options.shuffles + 1), cases):
            method, pattern = case.split()
            pruners = [("ours", "sequential"), ("ours", "block"), ("peer", "block")]
            for who, order in pruners[: None if options.peer_python else 2]:
                own = {"method": method, "pattern": pattern, "order": order, kind: str(again)}
                yield f"{who} {method} {pattern} {order} {kind} {again}", {"job": who, **own}


COMPARED = ("wanda", "sparsegpt")


def _in_process(own: dict[str, str], options: argparse.Namespace) -> dict[str, Any]:
    python = str(options.peer_python) if own["job"] == "peer" else sys.executable
    given = [argument for key, value in own.items() for argument in (f"--{key}", value)]
    environment = os.environ | {"OMP_NUM_THREADS": str(options.threads)}
    if own["job"] == "peer":
        environment.pop("PYTHONPATH", None)
    done = subprocess.run(
        [python, __file__, *sys.argv[1:], *given],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        env=environment,
    )
    line = next(line for line in done.stdout.splitlines() if line.startswith("RESULT "))
    found: dict[str, Any] = json.loads(line.removeprefix("RESULT "))
    if own["job"] in ("ours", "peer"):
        found |= _in_process({"job": "evaluate"}, options)
        shutil.rmtree(options.work / "out")
    return found


def _report(options: argparse.Namespace, done: dict[str, Any]) -> None:
    rounds = sorted(one["processor_seconds"] for one in done["forward"]["rounds"])
    plain, rows = rounds[len(rounds) // 2], []
    print(f"dense {done['dense']['perplexity']:.2f}; a plain forward pass {plain:.1f} CPU s")
    alternating = {}
    for name, own in done.items():
        who, _, rest = name.partition(" ")
        if who == "alternating":
            alternating[rest] = own
            print(f"{name}: {own['forwards']:.2f} plain forward passes")
        if who not in ("ours", "peer"):
            continue
        method, pattern, order, *again = rest.split()
        row = {"who": who, "method": method, "pattern": pattern, "order": order, **own}
        if again:
            row[again[0]] = int(again[1])
        row["forwards"] = own["processor_seconds"] / plain
        text = f"{who:4} {method:12} {pattern:4} {' '.join([order, *again]):12} "
        text += f"{own['perplexity']:8.2f}"
        text += f"  {own['processor_seconds']:6.1f} CPU s = {row['forwards']:.2f} forwards"
        text += f"  {own['peak_over_imports_bytes'] / 2**30:.2f} GiB"
        peer = done.get(" ".join(["peer", method, pattern, "block", *again]))
        if who == "ours" and peer:
            row["perplexity_over_peer"] = own["perplexity"] / peer["perplexity"]
            row["time_over_peer"] = own["processor_seconds"] / peer["processor_seconds"]
            text += f"  x{row['perplexity_over_peer']:.4f} perplexity"
            text += f", x{row['time_over_peer']:.2f} CPU s of llm-compressor's"
        rows.append(row)
        print(text)
    from _result import save

    known = {key: done[key] for key in ("tokens", "dense", "forward")}
    settings = {"model": options.model.name, "threads": options.threads, "batch": BATCH}
    known["alternating"] = alternating
    print(save("sparse-quality", {**settings, **known, "rows": rows}))


if __name__ == "__main__":
    main()
