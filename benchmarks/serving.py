"""What the server costs and withstands: speed beside the plain runtime, load, faults, memory.

    python benchmarks/serving.py out/ --engine ort_genai --save

Everything goes to 127.0.0.1, bounded in count and time. Each part prints one line:

    speed      one stream's tokens per second, and those of the bare runner's loop, in turns
    load       200 requests at once: answered, refused with 429 (asked again until answered), lost
    slow       readers that take a chunk only now and then: others are answered meanwhile
    bodies     malformed bodies: each gets a 4xx, and the server goes on
    vanish     clients that close the connection in mid-stream: the engine is free again
    memory     resident memory after each 500 of 2,000 requests
    signal     SIGTERM with streams open: chunks of those that began, and of those that waited
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import socket
import statistics
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from _result import save

from prune_export import Machine, engines
from prune_export.plugins import load_tokenizer

ROOT = Path(__file__).parents[1]
PROMPT = "The history of the steam engine begins with"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("directory", type=Path)
    parser.add_argument("--engine", default="ort_genai")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=64, help="of each answer of `speed`")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--requests", type=int, default=2000, help="of `memory`")
    parser.add_argument("--parts", nargs="*", default=list(PARTS))
    parser.add_argument("--save", action="store_true")
    given = parser.parse_args()
    found: dict[str, Any] = {}
    for name in given.parts:
        with Server(given) as server:
            found[name] = PARTS[name](server, given)
        print(name, json.dumps(found[name]), flush=True)
    if given.save:
        print(save("serving", {"engine": given.engine, "threads": given.threads, "parts": found}))


class Server:
    """A server process of its own, on any free port."""

    def __init__(self, given: argparse.Namespace) -> None:
        self.name = given.directory.resolve().name
        self.command = [
            sys.executable, "-m", "prune_export_server", str(given.directory), "--port", "0",
            "--engine", given.engine, "--threads", str(given.threads),
        ]  # fmt: skip

    def __enter__(self) -> Server:
        path = os.pathsep.join([str(ROOT), str(ROOT / "integrations" / "server")])
        self.process = subprocess.Popen(
            self.command, stdout=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": path}
        )
        assert self.process.stdout is not None
        self.address = self.process.stdout.readline().split(" at ")[1].strip()
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.terminate()
        self.process.wait(90)

    def post(self, seconds: float = 300, **asked: Any) -> Any:
        """Opens a request; raises urllib's HTTPError for an error."""
        body = {"model": self.name, "prompt": PROMPT, "temperature": 0, "max_tokens": 8} | asked
        request = urllib.request.Request(
            f"{self.address}/completions", json.dumps(body).encode(), method="POST"
        )
        return urllib.request.urlopen(request, timeout=seconds)

    def ask(self, **asked: Any) -> dict[str, Any]:
        with self.post(**asked) as answer:
            return dict(json.load(answer))

    def metric(self, name: str) -> float:
        root = self.address.removesuffix("/v1")
        with urllib.request.urlopen(f"{root}/metrics", timeout=60) as page:
            for line in page.read().decode().splitlines():
                if line.startswith(name + " "):
                    return float(line.split()[1])
        return 0.0


def speed(server: Server, given: argparse.Namespace) -> dict[str, Any]:
    """A stream's rate between its first and last token and the bare loop's, in turns.

    Processor seconds are of a whole request: prompt, tokens, and for the server all of HTTP.
    """
    machine = Machine.detect(threads=given.threads)
    ids = load_tokenizer(given.directory)(PROMPT)["input_ids"]
    process = psutil.Process(server.process.pid)
    served, bare = [], []
    with engines(given.directory)[given.engine].open(machine) as runner:
        for _ in range(given.rounds):
            before = sum(process.cpu_times()[:2])
            rate = _streamed_rate(server, given.tokens)
            served.append((rate, sum(process.cpu_times()[:2]) - before))
            before = time.process_time()
            runner.reset()
            logits, _ = runner.step(np.asarray([ids], np.int64))
            began = time.perf_counter()
            for _ in range(given.tokens - 1):
                token = int(logits[0, -1].argmax())
                logits, _ = runner.step(np.asarray([[token]], np.int64))
            rate = (given.tokens - 1) / (time.perf_counter() - began)
            bare.append((rate, time.process_time() - before))
    ratios = [ours[0] / plain[0] for ours, plain in zip(served, bare, strict=True)]
    costs = [ours[1] / plain[1] for ours, plain in zip(served, bare, strict=True)]
    return {
        "served": statistics.median(one[0] for one in served),
        "bare": statistics.median(one[0] for one in bare),
        "ratio": statistics.median(ratios), "ratios": ratios,
        "processor_seconds_ratio": statistics.median(costs), "processor_seconds_ratios": costs,
    }  # fmt: skip


def _streamed_rate(server: Server, tokens: int) -> float:
    times: list[float] = []
    usage = {"include_usage": True}
    with server.post(max_tokens=tokens, stream=True, stream_options=usage) as answer:
        for line in answer:
            if line.startswith(b"data: {"):
                chunk = json.loads(line[6:])
                if chunk["choices"] and chunk["choices"][0]["text"]:
                    times += [time.perf_counter()]
                count = chunk.get("usage", {}).get("completion_tokens", 0)
    return float(count - 1) / (times[-1] - times[0])


def load(server: Server, given: argparse.Namespace) -> dict[str, Any]:
    """200 at once against a queue of 64: each is answered in the end, with its own text."""
    expected = {n: server.ask(prompt=f"{PROMPT} {n}")["choices"][0]["text"] for n in range(8)}
    refused = [0]
    lock = threading.Lock()

    def one(number: int) -> bool:
        for _ in range(600):
            try:
                found = server.ask(prompt=f"{PROMPT} {number % 8}")
            except urllib.error.HTTPError as error:
                if error.code != 429:
                    raise
                with lock:
                    refused[0] += 1
                time.sleep(0.2 + random.random())
            else:
                return bool(found["choices"][0]["text"] == expected[number % 8])
        return False

    began = time.monotonic()
    with ThreadPoolExecutor(200) as pool:
        right = list(pool.map(one, range(200)))
    return {"right": sum(right), "of": 200, "refused_and_asked_again": refused[0],
            "seconds": time.monotonic() - began}  # fmt: skip


def slow(server: Server, given: argparse.Namespace) -> dict[str, Any]:
    """Ten streams that nobody reads; ten others are answered all the same."""
    del given
    idle = [server.post(max_tokens=64, stream=True) for _ in range(10)]
    answered = sum(bool(server.ask()["choices"]) for _ in range(10))
    whole = sum(answer.read().rstrip().endswith(b"data: [DONE]") for answer in idle)
    return {"answered_meanwhile": answered, "whole_when_read_late": whole, "of": 10}


def bodies(server: Server, given: argparse.Namespace) -> dict[str, Any]:
    """300 seeded mutations of a body."""
    del given
    choose = random.Random(0)
    plain = json.dumps({"model": server.name, "prompt": "a", "max_tokens": 1}).encode()
    codes: dict[str, int] = {}
    for _ in range(300):
        body = bytearray(plain)
        for _ in range(choose.randint(1, 6)):
            place = choose.randrange(len(body))
            body[place : place + choose.randint(0, 3)] = choose.randbytes(choose.randint(0, 3))
        request = urllib.request.Request(f"{server.address}/completions", bytes(body))
        try:
            with urllib.request.urlopen(request, timeout=120) as answer:
                code = str(answer.status)
        except urllib.error.HTTPError as error:
            code = str(error.code)
        codes[code] = codes.get(code, 0) + 1
    return {"codes": codes, "still_answers": bool(server.ask()["choices"])}


def vanish(server: Server, given: argparse.Namespace) -> dict[str, Any]:
    """50 clients that close in mid-stream."""
    del given
    for _ in range(50):
        answer = server.post(max_tokens=200, stream=True)
        answer.readline()
        answer.fp.raw._sock.shutdown(socket.SHUT_RDWR)
        answer.close()
    began = time.monotonic()
    server.ask()
    return {"then_answered_after_seconds": time.monotonic() - began,
            "cancelled": server.metric("prune_export_cancelled_total"),
            "waiting": server.metric("prune_export_waiting")}  # fmt: skip


def memory(server: Server, given: argparse.Namespace) -> dict[str, Any]:
    """Resident MiB after each quarter of the requests, every fifth of them streamed."""
    process = psutil.Process(server.process.pid)
    found = []
    for number in range(given.requests):
        if number % 5 == 0:
            with server.post(max_tokens=4, stream=True) as answer:
                answer.read()
        else:
            server.ask(max_tokens=4, prompt=f"{PROMPT} {number}")
        if (number + 1) % max(1, given.requests // 4) == 0 or number == 50:
            found.append((number + 1, round(process.memory_info().rss / 2**20, 1)))
    return {"resident_mib": found}


def signalled(server: Server, given: argparse.Namespace) -> dict[str, Any]:
    """Eight streams, SIGTERM after the first one's first chunk."""
    del given
    with ThreadPoolExecutor(8) as pool:
        first = threading.Event()

        def read(_: int) -> bool:
            with server.post(max_tokens=150, stream=True) as answer:
                text = answer.readline()
                first.set()
                text += answer.read()
            return bool(text.rstrip().endswith(b"data: [DONE]"))

        streams = [pool.submit(read, number) for number in range(8)]
        first.wait(120)
        waiting = server.metric("prune_export_waiting")
        server.process.send_signal(signal.SIGTERM)
        ends = [one.exception() or one.result() for one in streams]
    whole = sum(one is True for one in ends)
    return {"whole": whole, "of": 8, "waited_then": waiting, "exit": server.process.wait(90)}


PARTS = {
    "speed": speed, "load": load, "slow": slow, "bodies": bodies, "vanish": vanish,
    "memory": memory, "signal": signalled,
}  # fmt: skip


if __name__ == "__main__":
    main()
