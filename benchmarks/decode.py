"""Times decoding after a depth cut, engine by engine, against what the bytes that are left allow.

    python benchmarks/decode.py --model SMOLLM2 --work DIRECTORY            # for the record
    python benchmarks/decode.py --model SMOLLM2 --work DIRECTORY --quick    # does it run at all

`--model` is a checkpoint directory; it is cut from its middle to `--keep` blocks by this package's
surgery, and both are exported: `onnx` (fp32), `ort_genai` (fp32 and int8) and, as the yardstick,
onnxruntime-genai's own command line builder, nothing of ours in between. What is built lies in
`--work` and is used again. Three questions:

(a) Is the cut model faster by at least 95 % of dense / pruned bytes read per token?
(b) Do our engines decode no slower than the builder's own output? `ort_genai` is compared with it
    as run by the same code (`builder`) and by onnxruntime-genai (`genai runtime`), which append to
    the cache in place. `onnx` is a graph of standard operators, which return a new cache: it is
    judged against the builder's graph run in that way too (`builder, cache handed on`), and what
    appending in place would save (its copy is 4 % of a step of SmolLM2) is shown without verdict.
(c) Are both at least 1.5 times as fast as PyTorch eager?

Every engine has its own process, stopped (SIGSTOP) while another works. A round times each engine
once, in random order; only ratios within a round are used, and medians of them. The interval is a
95 % bootstrap over launches (fresh processes) and rounds. Raw samples are kept in the result.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from _decode_engines import HANDED, OURS, Engine, sets_of

AT_LEAST = {"bound": 0.95, "builder": 0.98, HANDED: 0.98, "genai runtime": 0.98, "pytorch": 1.5}
"""Two processes of one engine differ by up to 2 % in a median of rounds: (b) allows for that."""
IN_PLACE = ("builder", "genai runtime")


# --- the child: one engine -------------------------------------------------------------------


def open_runner(kind: str, path: Path, threads: int) -> Any:
    from prune_export.machine import Machine

    machine = Machine(device="cpu", ram_bytes=16 << 30, gpu_bytes=0, threads=threads)
    if kind == "pytorch":
        from prune_export.verify.pytorch import PyTorch

        return PyTorch(logits="last").open(path, machine)
    if kind == "onnx":
        from prune_export.exporters.onnx import Onnx

        return Onnx().open(path, machine)
    if kind == HANDED:
        from prune_export.exporters._shared.ort_runner import OrtRunner

        decoder = json.loads((path / "genai_config.json").read_text("utf-8"))["model"]["decoder"]
        return OrtRunner(path / "model.onnx", machine, head_size=int(decoder["head_size"]))
    if kind == "genai runtime":
        from prune_export.exporters.ort_genai.runner import OgRunner

        return OgRunner(path, machine)
    from prune_export.exporters.ort_genai import OrtGenai

    return OrtGenai().open(path, machine)


def serve(kind: str, path: Path, threads: int) -> None:
    """Opens the engine and times it whenever a line of token ids comes in."""
    with open_runner(kind, path, threads) as runner:
        print("ready", flush=True)
        for line in sys.stdin:
            request = json.loads(line)
            ids, prompt = np.array([request["ids"]], np.int64), request["prompt"]
            runner.reset()
            runner.step(ids[:, :8])
            runner.step(ids[:, 8:9])
            runner.reset()
            prefill = runner.step(ids[:, :prompt])[1]
            steps = [runner.step(ids[:, i : i + 1])[1] for i in range(prompt, ids.shape[1])]
            print(json.dumps({"prefill": prefill, "steps": steps}), flush=True)


# --- the parent ------------------------------------------------------------------------------


@contextmanager
def served(engine: Engine, threads: int) -> Iterator[Callable[[list[int], int], dict[str, Any]]]:
    """A function that times `engine` in its own process, which is stopped in between."""
    here = Path(__file__).resolve()
    paths = [str(here.parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(paths),
        "OMP_NUM_THREADS": str(threads),
        "OMP_WAIT_POLICY": "PASSIVE",
        "GOMP_SPINCOUNT": "0",
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_VERBOSITY": "error",
        "TQDM_DISABLE": "1",
    }
    command = [sys.executable, str(here), "--serve", engine.kind, str(engine.path), str(threads)]
    with tempfile.TemporaryFile("w+", encoding="utf-8") as log:
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            env=environment,
        )
        stdin, stdout = process.stdin, process.stdout
        assert stdin is not None
        assert stdout is not None

        def answer() -> str:
            line = stdout.readline()
            if not line:
                log.seek(0)
                raise SystemExit(f"{engine.name} ended:\n{log.read()[-2000:]}")
            process.send_signal(signal.SIGSTOP)
            return line

        def timed(ids: list[int], prompt: int) -> dict[str, Any]:
            process.send_signal(signal.SIGCONT)
            stdin.write(json.dumps({"ids": ids, "prompt": prompt}) + "\n")
            stdin.flush()
            found: dict[str, Any] = json.loads(answer())
            return found

        try:
            answer()
            yield timed
        finally:
            process.kill()
            process.wait()


def measure(engines: list[Engine], ids: list[int], options: argparse.Namespace) -> None:
    """Fills in the engines' samples; all of them are in memory at once."""
    random = np.random.default_rng(options.seed)
    for launch in range(options.launches):
        with ExitStack() as stack:
            timers = [stack.enter_context(served(e, options.threads)) for e in engines]
            for timed in timers:
                timed(ids[: options.prompt + 4], options.prompt)
            for engine in engines:
                engine.steps.append([])
                engine.prefill.append([])
            for at in range(options.rounds):
                for index in random.permutation(len(engines)):
                    found = timers[index](ids, options.prompt)
                    engines[index].steps[-1].append(found["steps"])
                    engines[index].prefill[-1].append(found["prefill"])
                print(f"  launch {launch + 1}, round {at + 1}", file=sys.stderr, flush=True)


def ratio(above: Engine, below: Engine, seed: int = 0) -> dict[str, float]:
    """Median of the rounds' ratios of seconds, and its 95 % bootstrap interval."""
    pairs = [np.log(a / b) for a, b in zip(above.rounds(), below.rounds(), strict=True)]
    random = np.random.default_rng(seed)
    draws = []
    for _ in range(2000):
        chosen = [pairs[i] for i in random.integers(0, len(pairs), len(pairs))]
        draws.append(np.median(np.concatenate([random.choice(p, len(p)) for p in chosen])))
    low, high = np.exp(np.quantile(draws, [0.025, 0.975]))
    middle = float(np.exp(np.median(np.concatenate(pairs))))
    return {"ratio": middle, "low": float(low), "high": float(high)}


# --- what it says ----------------------------------------------------------------------------


def judged(group: list[Engine]) -> list[dict[str, Any]]:
    """The answers that a set of engines gives."""
    by = {(engine.kind, engine.part): engine for engine in group}
    found: list[dict[str, Any]] = []
    for kind, part in by:
        if kind not in OURS:
            continue
        engine = by[kind, part]
        if part == "dense" and (kind, "cut") in by:
            pruned = by[kind, "cut"]
            bound = engine.weight_bytes / pruned.weight_bytes
            row: dict[str, Any] = {"question": "a"}
            row["what"] = f"{kind} {engine.precision}: dense / cut"
            wanted = AT_LEAST["bound"] * bound
            found.append(row | ratio(engine, pruned) | {"bound": bound, "wanted": wanted})
        for other, question in (*((kind, "b") for kind in (*IN_PLACE, HANDED)), ("pytorch", "c")):
            if (other, part) not in by or (kind == "ort_genai" and other == HANDED):
                continue
            row = {"question": question, "what": f"{other} / {engine.name}"}
            judged_here = kind == "ort_genai" or other not in IN_PLACE
            wanted = AT_LEAST[other] if judged_here else None
            found.append(row | ratio(by[other, part], engine) | {"wanted": wanted})
    for row in found:
        row["ok"] = row["wanted"] is None or row["ratio"] >= row["wanted"]
    return found


def tokens_of(model: Path, text: Path | None, count: int) -> list[int]:
    """Token ids to feed: of `text` if given, else of this file."""
    from transformers import AutoTokenizer

    source = (text or Path(__file__)).read_text(encoding="utf-8")[: count * 20]
    ids = AutoTokenizer.from_pretrained(model)(source)["input_ids"]
    return [int(i) for i in np.resize(ids, count)]


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True, help="checkpoint directory")
    parser.add_argument("--work", type=Path, required=True, help="what is built is kept here")
    parser.add_argument("--text", type=Path, help="text whose tokens are fed")
    parser.add_argument("--keep", type=int, default=18, help="blocks left by the cut")
    parser.add_argument("--precisions", nargs="+", default=["fp32", "int8"])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--launches", type=int, default=3, help="times that processes are started")
    parser.add_argument("--rounds", type=int, default=10, help="rounds in each launch")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="one launch of 3 short rounds")
    options = parser.parse_args()
    if options.quick:
        options.launches, options.rounds, options.new = 1, 3, 16
    return options


def main() -> int:
    options = parsed()
    options.work = options.work.resolve()
    options.work.mkdir(parents=True, exist_ok=True)
    options.model = options.model.resolve()
    ids = tokens_of(options.model, options.text, options.prompt + options.new)
    sets = sets_of(options)
    answers = []
    for group in sets:
        print(f"{', '.join(engine.name for engine in group)}: {options.threads} threads")
        measure(group, ids, options)
        for engine in group:
            median = float(np.median(np.concatenate(engine.rounds())))
            print(
                f"  {engine.name:26} {1 / median:7.1f} tokens/s decode"
                f"  {options.prompt / np.median(np.concatenate(engine.prefill)):8.1f} prefill"
                f"  {engine.weight_bytes / 1e6:7.1f} MB/token"
            )
        answers += judged(group)
        for row in judged(group):
            bound = f", bound {row['bound']:.3f}" if "bound" in row else ""
            wanted = f", wanted {row['wanted']:.3f}" if row["wanted"] else ", for information"
            verdict = "ok" if row["ok"] else "MISSED"
            print(
                f"  ({row['question']}) {row['what']:54} {row['ratio']:.3f} "
                f"[{row['low']:.3f}, {row['high']:.3f}]{bound}{wanted}"
                f"{f'  {verdict}' if row['wanted'] else ''}"
            )
    if not options.quick:
        from _result import save

        settings = {key: value for key, value in vars(options).items() if key not in HIDDEN}
        engines = [
            [{k: v for k, v in asdict(engine).items() if k != "path"} for engine in group]
            for group in sets
        ]
        name = f"decode-{options.threads}threads"
        print(save(name, {"settings": settings, "answers": answers, "sets": engines}))
    return 0 if options.quick or all(row["ok"] for row in answers) else 1


HIDDEN = ("model", "work", "text", "quick")
"""Settings that are paths of this machine, or say nothing."""

if __name__ == "__main__":
    if sys.argv[1:2] == ["--serve"]:
        serve(sys.argv[2], Path(sys.argv[3]), int(sys.argv[4]))
    else:
        raise SystemExit(main())
