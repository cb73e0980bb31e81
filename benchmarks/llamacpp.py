"""Speed of our engines beside llama.cpp on the same model: what people run on CPUs.

    python benchmarks/llamacpp.py --gguf MODEL.gguf --peer-python PYTHON ENGINE… [--save]

Each ENGINE is an engine's directory in a result (`out/genai`, `out/onnx`), with its record;
`--peer-python` is the Python of an environment with xllamacpp. Engines and llama.cpp take turns,
each in a process of its own that only works when it is asked, round after round, each round in
another order; threads do not spin, but for llama.cpp's, which always do.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import median, quantiles
from typing import Any

LLAMA_CPP = "llama.cpp"


def main() -> None:
    asked = _options()
    if asked.serve:
        serve(asked)
        return
    from _result import save

    names = [LLAMA_CPP, *(str(place) for place in asked.engines)]
    children = {name: _child(asked, name) for name in names}
    rows: dict[str, dict[str, list[float]]] = {n: {"prefill": [], "decode": []} for n in names}
    order = random.Random(0)
    for _ in range(asked.rounds + 1):
        for name in order.sample(names, len(names)):
            found = _ask(children[name])
            for phase, seconds in found.items():
                rows[name][phase].append(seconds)
    for child in children.values():
        child.stdin.close()  # type: ignore[union-attr]
        child.wait()
    found = {name: {p: s[1:] for p, s in own.items()} for name, own in rows.items()}  # warm-up
    for name, own in found.items():
        print(f"{name:40} " + "  ".join(f"{p} {_told(s)}" for p, s in own.items()))
    if asked.save:
        settings = {"prompt": asked.prompt, "new": asked.new, "threads": asked.threads}
        kept = {"gguf": asked.gguf.name, **settings, "tokens_per_second": found}
        print(save("llamacpp", kept))


def _told(rates: Sequence[float]) -> str:
    low, _, high = quantiles(rates, n=4) if len(rates) > 1 else (rates[0],) * 3
    return f"{median(rates):7.1f} tokens/s ({low:.1f}-{high:.1f})"


def _child(asked: argparse.Namespace, name: str) -> subprocess.Popen[str]:
    python = str(asked.peer_python) if name == LLAMA_CPP else sys.executable
    return subprocess.Popen(
        [python, __file__, "--serve", name, *sys.argv[1:]],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip


def _ask(child: subprocess.Popen[str]) -> dict[str, float]:
    assert child.stdin is not None
    assert child.stdout is not None
    child.stdin.write("go\n")
    child.stdin.flush()
    found: dict[str, float] = json.loads(next(line for line in child.stdout if line[:1] == "{"))
    return found


def serve(asked: argparse.Namespace) -> None:
    """Answers each line on the standard input with tokens a second, prompt and answer."""
    work = _llama_cpp(asked) if asked.serve == LLAMA_CPP else _engine(asked)
    for _ in sys.stdin:
        print(json.dumps(work()), flush=True)


def _llama_cpp(asked: argparse.Namespace) -> Any:
    import xllamacpp

    given = xllamacpp.CommonParams()
    given.model.path = str(asked.gguf)
    given.n_ctx, given.n_gpu_layers, given.n_parallel = asked.prompt + asked.new + 8, 0, 1
    given.cpuparams.n_threads = given.cpuparams_batch.n_threads = asked.threads
    server = xllamacpp.Server(given)
    ids = list(range(1000, 1000 + asked.prompt))

    def work() -> dict[str, float]:
        said = server.handle_completions(
            {"prompt": ids, "n_predict": asked.new, "temperature": 0, "cache_prompt": False,
             "ignore_eos": True, "timings_per_token": True}
        )  # fmt: skip
        answer = json.loads(said) if isinstance(said, str) else said
        times = answer["timings"]
        return {
            "prefill": times["prompt_per_second"],
            "decode": times["predicted_per_second"],
        }

    return work


def _engine(asked: argparse.Namespace) -> Any:
    import numpy as np

    from prune_export.contracts import BuildRecord
    from prune_export.machine import Machine
    from prune_export.verify import Engine

    place = Path(asked.serve)
    report = json.loads((place.parent / "report.json").read_text(encoding="utf-8"))
    records = [BuildRecord.from_json(one) for one in report["exports"]]
    known = {one["exporter"]: one.get("directory") for one in report["exports"]}
    record = next(
        one for one in records if Path(str(known[one.exporter])).name == place.name
    )  # fmt: skip
    machine = Machine.detect(device="cpu", threads=asked.threads)
    runner = Engine.of(record, place, trusted=True).open(machine)
    runner.__enter__()
    ids = np.arange(1000, 1000 + asked.prompt + asked.new, dtype=np.int64)[None]

    def work() -> dict[str, float]:
        runner.reset()
        first = runner.step(ids[:, : asked.prompt])[1]
        steps = [
            runner.step(ids[:, at : at + 1])[1]
            for at in range(asked.prompt, asked.prompt + asked.new)
        ]
        return {"prefill": asked.prompt / first, "decode": asked.new / sum(steps)}

    return work


def _options() -> argparse.Namespace:
    asked = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    asked.add_argument("engines", type=Path, nargs="+", help="directories of engines in results")
    asked.add_argument("--gguf", type=Path, required=True, help="the same model, for llama.cpp")
    asked.add_argument("--peer-python", type=Path, required=True, help="it imports xllamacpp")
    asked.add_argument("--prompt", type=int, default=128)
    asked.add_argument("--new", type=int, default=32)
    asked.add_argument("--rounds", type=int, default=8)
    asked.add_argument("--threads", type=int, default=2)
    asked.add_argument("--save", action="store_true", help="keep it in benchmarks/results")
    asked.add_argument("--serve", help=argparse.SUPPRESS)
    return asked.parse_args()


if __name__ == "__main__":
    main()
