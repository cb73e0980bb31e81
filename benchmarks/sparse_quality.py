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
`--permuted` adds 2:4 with `permute: true`, in the one-pass order, beside the same without.

What is finished is kept in `--work`, so a run can be stopped (`--minutes`) and called again; the
results file is written once all is there.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

PATTERNS = ("50%", "4:8", "6:8", "2:4")
"""Kept of each group."""

BATCH = 4
"""Windows at a time, for everyone: the 2,048 tokens that our passes take."""


def main() -> None:
    options = _options()
    if options.job:
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
    _report(options, done)


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
    parser.add_argument("--shuffled", nargs="+", default=["sparsegpt 50%"], help="what of")
    parser.add_argument("--jittered", nargs="*", default=[], help="what of, as often as --shuffles")
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
    return parser.parse_args()


def _tasks(options: argparse.Namespace) -> Iterator[tuple[str, dict[str, str]]]:
    yield "tokens", {"job": "tokens"}
    yield "dense", {"job": "dense"}
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
            own = {"method": method, "pattern": pattern, "order": "block", kind: str(again)}
            for who in ("ours", "peer") if options.peer_python else ("ours",):
                yield f"{who} {method} {pattern} block {kind} {again}", {"job": who, **own}


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


def _tokens(options: argparse.Namespace) -> dict[str, Any]:
    import torch

    from prune_export.calibrate import token_set
    from prune_export.recipe import LocalText

    found = {}
    for name, samples in (("calibration", options.samples), ("evaluation", options.windows)):
        source = LocalText(files=(f"{name}.jsonl",), samples=samples, length=options.length)
        made = token_set(source, options.model, options.data)
        torch.save(made.ids, options.work / f"{name}.pt")
        found[name] = {"windows": made.samples, "length": made.length, "hash": made.fingerprint}
    return found


def _calibration(options: argparse.Namespace) -> Any:
    """`[windows, length]`, in the order of this shuffle."""
    import torch

    ids = torch.load(options.work / "calibration.pt")
    if not options.shuffle:
        return ids
    return ids[torch.randperm(len(ids), generator=torch.Generator().manual_seed(options.shuffle))]


def _model(options: argparse.Namespace) -> Path:
    """The dense model; each jitter of it is written once."""
    if not options.jitter:
        return Path(options.model)
    import torch
    from safetensors.torch import load_file, save_file

    folder = Path(options.work, f"model-{options.jitter}")
    if not (folder / "model.safetensors").exists():
        random = torch.Generator().manual_seed(options.jitter)
        tensors = load_file(options.model / "model.safetensors")
        for tensor in tensors.values():
            tensor *= 1 + 1e-6 * torch.randn(tensor.shape, generator=random)
        for file in options.model.glob("*.json"):
            folder.mkdir(parents=True, exist_ok=True)
            shutil.copy(file, folder)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def _forward(options: argparse.Namespace) -> dict[str, Any]:
    """One plain forward pass of transformers' decoder, no head, weights loaded: the floor."""
    plain = _plain(options)
    return {"rounds": [_measured(plain) for _ in range(options.rounds)]}


def _plain(options: argparse.Namespace) -> Callable[[], None]:
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(options.threads)
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32).eval()
    ids = torch.load(options.work / "calibration.pt")

    def plain() -> None:
        with torch.inference_mode():
            for start in range(0, len(ids), BATCH):
                model.base_model(ids[start : start + BATCH], use_cache=False)

    model.base_model(ids[:1])  # warm up
    return plain


def _alternating(options: argparse.Namespace) -> dict[str, Any]:
    """Processor seconds of a pruning and of the floor, in turns; the first pair warms up."""
    plain, pairs = _plain(options), []
    for _ in range(1 + options.rounds):
        floor = _measured(plain)["processor_seconds"]
        pairs.append((_ours(options)["processor_seconds"], floor))
        shutil.rmtree(options.work / "out")
    pairs = pairs[1:]
    return {"pairs": pairs, "forwards": statistics.median(own / floor for own, floor in pairs)}


def _ours(options: argparse.Namespace) -> dict[str, Any]:
    import transformers.modeling_utils  # noqa: F401

    from prune_export import registry
    from prune_export.calibrate import Means, ModelView, TokenSet
    from prune_export.checkpoint import Checkpoint
    from prune_export.machine import Machine
    from prune_export.nm import Nm
    from prune_export.surgery import rewrite

    cls = registry.find("methods", options.method)
    pattern: dict[str, Any] = {"sparsity": 0.5}
    if ":" in options.pattern:
        keep, of = map(int, options.pattern.split(":"))
        pattern = {"nm": Nm(keep, of)}
    if options.order == "permuted":
        pattern["permute"] = True
    elif options.method != "magnitude":
        pattern["order"] = options.order
    method = cls(**pattern)
    tokens, model = TokenSet.of(_calibration(options)), _model(options)
    machine = Machine.detect(device="cpu", threads=options.threads)
    logs: list[Any] = []

    def work() -> None:
        checkpoint = Checkpoint.open(model)
        arch = checkpoint.arch()
        means = Means(tokens, machine, options.work / "scratch")
        decision = method.decide(ModelView(arch, checkpoint, {}, means))
        logs.append(decision.log)
        rewrite(checkpoint, arch, decision.edits, options.work / "out", ram_bytes=1 << 30)

    shutil.rmtree(options.work / "scratch", ignore_errors=True)
    measured = _measured(work)
    shutil.rmtree(options.work / "scratch", ignore_errors=True)
    return measured | {"sparsity": logs[0]["sparsity"], "mask_digest": logs[0]["mask_digest"]}


def _peer(options: argparse.Namespace) -> dict[str, Any]:
    """llm-compressor on a model that is loaded, saved without its own compression."""
    import llmcompressor
    import torch
    from llmcompressor.modifiers.pruning import SparseGPTModifier, WandaPruningModifier
    from safetensors.torch import save_file
    from torch.utils.data import DataLoader
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(options.threads)
    kind = {"wanda": WandaPruningModifier, "sparsegpt": SparseGPTModifier}[options.method]
    structure, sparsity = "0:0", 0.5
    if ":" in options.pattern:
        keep, of = map(int, options.pattern.split(":"))
        structure, sparsity = f"{of - keep}:{of}", 1 - keep / of  # theirs counts zeros
    recipe = kind(sparsity=sparsity, mask_structure=structure, ignore=["re:.*lm_head"])
    ids, model = _calibration(options), _model(options)
    rows = [{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in ids]
    models: list[Any] = []

    def load() -> None:
        models.append(AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32))

    def work() -> None:
        llmcompressor.oneshot(
            model=models[0],
            dataset=DataLoader(rows, batch_size=BATCH),  # type: ignore[arg-type]
            recipe=recipe,
            pipeline="sequential",
        )

    with _Peak() as peak:
        load()
        measured = _measured(work)
    weights = {
        name: value for name, value in models[0].state_dict().items() if "lm_head" not in name
    }
    out = options.work / "out"
    out.mkdir(parents=True)
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    for file in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(options.model / file, out / file)
    matrices = [value for name, value in weights.items() if name.endswith("proj.weight")]
    zeros = sum(int((value == 0).sum()) for value in matrices)
    return measured | {
        "peak_over_imports_bytes": peak.bytes,
        "sparsity": zeros / sum(value.numel() for value in matrices),
        "version": llmcompressor.__version__,
    }


def _evaluate(options: argparse.Namespace, at: Path | None = None) -> dict[str, Any]:
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(options.threads)
    model = AutoModelForCausalLM.from_pretrained(
        at or options.work / "out", dtype=torch.float32
    ).eval()
    losses = []
    with torch.inference_mode():
        for window in torch.load(options.work / "evaluation.pt"):
            logits = model(window[None], use_cache=False).logits[0, :-1]
            losses.append(float(torch.nn.functional.cross_entropy(logits, window[1:])))
    mean = sum(losses) / len(losses)
    return {"perplexity": float(torch.tensor(mean, dtype=torch.float64).exp()), "losses": losses}


def _dense(options: argparse.Namespace) -> dict[str, Any]:
    return _evaluate(options, options.model)


JOBS: dict[str, Callable[[argparse.Namespace], dict[str, Any]]] = {
    "tokens": _tokens,
    "forward": _forward,
    "alternating": _alternating,
    "dense": _dense,
    "ours": _ours,
    "peer": _peer,
    "evaluate": _evaluate,
}


class _Peak:
    """The most memory that this process holds over what it held at the start."""

    def __enter__(self) -> _Peak:
        import psutil

        self._process = psutil.Process()
        self._before = self._most = self._process.memory_info().rss
        self._over = threading.Event()
        self._watcher = threading.Thread(target=self._watch, daemon=True)
        self._watcher.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._watcher.join()
        self.bytes = self._most - self._before

    def _watch(self) -> None:
        while not self._over.wait(0.01):
            self._most = max(self._most, self._process.memory_info().rss)


def _measured(work: Callable[[], None]) -> dict[str, Any]:
    with _Peak() as peak:
        wall, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF)
        work()
        after = resource.getrusage(resource.RUSAGE_SELF)
    return {
        "seconds": time.perf_counter() - wall,
        "processor_seconds": after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime,
        "peak_over_imports_bytes": peak.bytes,
    }


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
