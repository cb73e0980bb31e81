"""The server through OpenAI's own client, over real HTTP on loopback."""

from __future__ import annotations

import json
import os
import queue
import signal
import socket
import subprocess
import sys
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

openai = pytest.importorskip("openai")
pytest.importorskip("prune_export_server.app")

from prune_export_server.app import Service
from prune_export_server.generation import Generator
from prune_export_server.metrics import Metrics
from prune_export_server.text import Words
from prune_export_server.worker import Worker

from prune_export.plugins import load_model, load_tokenizer
from tests.integrations.server.conftest import Gated, listening

PROMPT = "The river runs"
ROOT = Path(__file__).parents[3]


def client(address: str) -> Any:
    return openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0, timeout=120)


@pytest.fixture(scope="module", params=["onnx", "pytorch"])
def api(request: pytest.FixtureRequest) -> Any:
    address = request.getfixturevalue("served" if request.param == "onnx" else "served_pytorch")
    with client(address) as found:
        yield found


@pytest.fixture(scope="module")
def reference(chatty: Path) -> Any:
    return load_model(chatty, dtype=torch.float32).eval(), load_tokenizer(chatty)


def greedy(reference: Any, text: str, new: int) -> str:
    model, tokenizer = reference
    ids = torch.tensor([tokenizer(text)["input_ids"]])
    out = model.generate(ids, max_new_tokens=new, do_sample=False)
    return str(tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True))


def test_greedy_text_is_that_of_transformers_whole_and_streamed(api: Any, reference: Any) -> None:
    expected = greedy(reference, PROMPT, 24)
    asked = {"model": "tiny", "prompt": PROMPT, "max_tokens": 24, "temperature": 0}
    whole = api.completions.create(**asked)
    assert whole.choices[0].text == expected
    assert whole.usage.total_tokens == whole.usage.prompt_tokens + whole.usage.completion_tokens
    chunks = list(api.completions.create(**asked, stream=True,
                                         stream_options={"include_usage": True}))  # fmt: skip
    assert "".join(one.choices[0].text for one in chunks if one.choices) == expected
    assert chunks[-1].usage == whole.usage
    ends = [one.choices[0].finish_reason for one in chunks if one.choices]
    assert ends[-1] == whole.choices[0].finish_reason
    assert set(ends[:-1]) == {None}


def test_chat_uses_the_template_and_tells_log_probabilities(api: Any, reference: Any) -> None:
    text = "user: Hello?\nassistant:"
    asked = {
        "model": "tiny", "messages": [{"role": "user", "content": "Hello?"}], "temperature": 0,
        "max_completion_tokens": 8, "logprobs": True, "top_logprobs": 3,
    }  # fmt: skip
    found = api.chat.completions.create(**asked).choices[0]
    assert found.message.content == greedy(reference, text, 8)
    for entry in found.logprobs.content:
        assert entry.logprob == entry.top_logprobs[0].logprob
        assert len(entry.top_logprobs) == 3
    streamed = list(api.chat.completions.create(**asked, stream=True))
    assert streamed[0].choices[0].delta.role == "assistant"
    text = "".join(one.choices[0].delta.content or "" for one in streamed)
    assert text == found.message.content
    again = [entry for one in streamed for entry in (one.choices[0].logprobs.content or ())]
    assert [one.logprob for one in again] == [one.logprob for one in found.logprobs.content]


@pytest.mark.parametrize("length", [5, 150])  # in one step, and in two
def test_echoed_prompts_are_scored_as_pytorch_scores_them(
    api: Any, reference: Any, length: int
) -> None:
    model, _ = reference
    ids = [int(one) for one in torch.randint(2, 250, (length,), generator=torch.manual_seed(1))]
    found = api.completions.create(
        model="tiny", prompt=ids, max_tokens=0, echo=True, logprobs=2, temperature=0
    ).choices[0].logprobs  # fmt: skip
    with torch.no_grad():
        expected = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    wanted = [expected[i, token].item() for i, token in enumerate(ids[1:])]
    assert found.token_logprobs[0] is None
    assert found.token_logprobs[1:] == pytest.approx(wanted, abs=2e-4)
    best = [max(top.values()) for top in found.top_logprobs[1:]]
    assert best == pytest.approx(expected[:-1].max(-1).values.tolist(), abs=2e-4)


def test_several_prompts_get_a_choice_each(api: Any, reference: Any) -> None:
    prompts = ["Bread,", "Nobody"]
    found = api.completions.create(model="tiny", prompt=prompts, max_tokens=6, temperature=0)
    assert [one.index for one in found.choices] == [0, 1]
    assert [one.text for one in found.choices] == [greedy(reference, p, 6) for p in prompts]


def test_a_seed_makes_samples_again(api: Any) -> None:
    def said(seed: int) -> str:
        found = api.completions.create(model="tiny", prompt=PROMPT, max_tokens=24, seed=seed,
                                       temperature=1.2, top_p=0.9)  # fmt: skip
        return str(found.choices[0].text)

    assert said(3) == said(3)
    assert len({said(seed) for seed in range(4)}) > 1


def test_a_stop_string_is_not_in_the_text(api: Any, reference: Any) -> None:
    text = greedy(reference, PROMPT, 24)
    stop = text[6:9]
    asked = {"model": "tiny", "prompt": PROMPT, "max_tokens": 24, "temperature": 0, "stop": [stop]}
    whole = api.completions.create(**asked).choices[0]
    assert whole.text == text.partition(stop)[0]
    assert whole.finish_reason == "stop"
    chunks = list(api.completions.create(**asked, stream=True))
    assert "".join(one.choices[0].text for one in chunks) == whole.text


@pytest.mark.parametrize(
    ("change", "status", "says"),
    [
        ({"model": "another"}, 404, "not served here"),
        ({"max_tokens": 10_000}, 400, "more than the 256"),
        ({"temperature": 3}, 400, "temperature"),
        ({"n": 2}, 400, "n: "),
        ({"frequency_penalty": 1}, 400, "frequency_penalty"),
        ({"logit_bias": {"5": 100}}, 400, "not supported"),
        ({"prompt": ""}, 400, "prompt"),
        ({"prompt": [5, 10**6]}, 400, "token id"),
        ({"prompt": []}, 400, "prompts"),
        ({"stop": ["x"] * 17}, 400, "stop strings"),
        ({"stop": "x" * 1001}, 400, "1000 characters"),
        ({"prompt": ["a"] * 65}, 400, "the queue takes 64"),
    ],
)
def test_what_cannot_be_answered_is_refused_with_the_key(
    served: str, change: dict[str, Any], status: int, says: str
) -> None:
    with client(served) as api, pytest.raises(openai.APIStatusError) as refused:
        api.completions.create(**{"model": "tiny", "prompt": PROMPT, "max_tokens": 2} | change)
    assert refused.value.status_code == status
    assert says in str(refused.value)


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"{", 400),
        (b"[1]", 400),
        (b'{"model": "tiny", "prompt": "a", "temperature": NaN}', 400),
        (b"\xff\xfe", 400),
        (b"[" * 100_000, 400),
        (b"x" * (5 << 20), 413),
    ],
)
def test_malformed_bodies_are_refused(served: str, body: bytes, status: int) -> None:
    request = urllib.request.Request(f"{served}/v1/completions", body, method="POST")
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(request, timeout=60)
    assert refused.value.code == status
    assert json.load(refused.value)["error"]["type"] == "invalid_request_error"


def test_null_is_the_default_and_a_seed_may_be_negative(served: str) -> None:
    body = {"model": "tiny", "prompt": "ab", "max_tokens": 2, "seed": -1}
    null = dict.fromkeys(("temperature", "top_p", "stop", "stream", "echo", "logprobs", "n"))
    request = urllib.request.Request(f"{served}/v1/completions", json.dumps(body | null).encode())
    with urllib.request.urlopen(request, timeout=60) as answer:
        assert json.load(answer)["usage"]["completion_tokens"] <= 2


def test_offsets_of_a_stream_are_those_of_the_whole_answer(served: str) -> None:
    asked = {"model": "tiny", "prompt": "Grüße", "max_tokens": 6, "temperature": 0, "echo": True,
             "logprobs": 1}  # fmt: skip
    with client(served) as api:
        whole = api.completions.create(**asked).choices[0]
        chunks = list(api.completions.create(**asked, stream=True))
    parts = [one.choices[0].logprobs for one in chunks]
    offsets = [offset for part in parts if part for offset in part.text_offset]
    assert offsets == whole.logprobs.text_offset
    assert len(offsets) == len(whole.logprobs.tokens)


class Impossible(Gated):
    """An engine for which token 5 is certain, or that gives no numbers at all."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.value = value
        self.let(10**6)

    def step(self, ids: np.ndarray) -> tuple[np.ndarray, float]:
        logits = np.full((*ids.shape, 258), self.value, np.float32)
        if not np.isnan(self.value):
            logits[..., 5] = 1.0
        return logits, 0.0


@pytest.fixture
def impossible(request: pytest.FixtureRequest, chatty: Path) -> Any:
    tokenizer = load_tokenizer(chatty)
    engine = Impossible(request.param)
    worker = Worker(
        lambda: (Generator(engine, [257], 64), tokenizer),  # type: ignore[arg-type]
        most_waiting=2,
    )
    worker.start()
    words = Words(load_tokenizer(chatty))
    service = Service("tiny", worker, load_tokenizer(chatty), words, 258, 64, 600,
                      Metrics(lambda: 0, lambda: 0))  # fmt: skip
    with listening(service) as address:
        yield address


def _strictly(text: str) -> Any:
    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is not JSON")

    return json.loads(text, parse_constant=refuse)


@pytest.mark.parametrize("impossible", [-np.inf], indirect=True)
@pytest.mark.parametrize("stream", [True, False])
def test_what_cannot_come_is_told_in_json_all_the_same(impossible: str, *, stream: bool) -> None:
    body = {"model": "tiny", "prompt": [5, 6, 7], "max_tokens": 2, "logprobs": 3, "echo": True,
            "stream": stream}  # fmt: skip
    request = urllib.request.Request(f"{impossible}/v1/completions", json.dumps(body).encode())
    with urllib.request.urlopen(request, timeout=60) as answer:
        text = answer.read().decode()
    lines = [line[6:] for line in text.splitlines() if line.startswith("data: {")] or [text]
    told = [_strictly(line)["choices"][0]["logprobs"] for line in lines]
    values = [value for one in told if one for value in one["token_logprobs"]]
    assert values == [None, -9999.0, -9999.0, 0.0, 0.0]


@pytest.mark.parametrize("impossible", [np.nan], indirect=True)
@pytest.mark.parametrize("temperature", [0, 1])
def test_an_engine_without_numbers_is_an_error_and_no_text(
    impossible: str, temperature: float
) -> None:
    with client(impossible) as api, pytest.raises(openai.InternalServerError, match="not finite"):
        api.completions.create(model="tiny", prompt="ab", max_tokens=2, temperature=temperature)


def test_a_fault_of_the_server_is_json_and_counted(
    chatty: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Broken(Worker):
        def submit(self, jobs: Any) -> None:
            raise KeyError("a fault")

    tokenizer = load_tokenizer(chatty)
    worker = Broken(
        lambda: (Generator(Impossible(0.0), [257], 64), tokenizer),  # type: ignore[arg-type]
        most_waiting=2,
    )
    worker.start()
    metrics = Metrics(lambda: 0, lambda: 0)
    service = Service("tiny", worker, tokenizer, Words(tokenizer), 258, 64, 600, metrics)
    with listening(service) as address, client(address) as api:
        with pytest.raises(openai.InternalServerError, match="KeyError"):
            api.completions.create(model="tiny", prompt="ab")
        worker.close()
        with pytest.raises(openai.InternalServerError, match="does not run"):
            api.completions.create(model="tiny", prompt="ab")
    assert b'status="500"' in metrics.page()
    assert "a fault" in caplog.text


def test_models_health_and_metrics(served: str) -> None:
    def read(path: str) -> str:
        with urllib.request.urlopen(f"{served}{path}", timeout=60) as found:
            return str(found.read().decode())

    assert json.loads(read("/v1/models"))["data"][0]["id"] == "tiny"
    assert json.loads(read("/v1/models/tiny"))["max_model_len"] == 256
    assert json.loads(read("/health"))["status"] == "ok"
    page = read("/metrics")
    assert 'prune_export_requests_total{path="/v1/models",status="200"}' in page
    assert "prune_export_waiting 0.0" in page


@pytest.mark.slow
@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_vanishes_frees_the_engine(chatty: Path, *, stream: bool) -> None:
    gated = Gated()
    tokenizer = load_tokenizer(chatty)
    ended: queue.Queue[str] = queue.Queue()
    worker = Worker(
        lambda: (Generator(gated, [257], 64), tokenizer),  # type: ignore[arg-type]
        most_waiting=2, told=lambda name, value: ended.put(name),
    )  # fmt: skip
    worker.start()
    gated.began.get(timeout=60)
    metrics = Metrics(lambda: 0, lambda: 0)
    service = Service(
        "tiny", worker, load_tokenizer(chatty), Words(tokenizer), 258, 64, 600, metrics
    )
    with listening(service) as address:
        host, _, port = address.removeprefix("http://").partition(":")
        body = json.dumps({"model": "tiny", "prompt": "ab", "max_tokens": 50, "stream": stream,
                           "temperature": 0}).encode()  # fmt: skip
        head = f"POST /v1/completions HTTP/1.1\r\nHost: here\r\nContent-Length: {len(body)}\r\n\r\n"
        with socket.create_connection((host, int(port)), timeout=60) as connection:
            connection.sendall(head.encode() + body)
            gated.began.get(timeout=60)
            gated.let(2)
            if stream:
                assert connection.recv(100).startswith(b"HTTP/1.1 200")
        # The event loop hears of it by itself; the engine at its next step.
        while (said := _next(ended, gated)) != "cancelled":
            assert said != "generated_tokens"
        gated.let(1000)
        with client(address) as api:
            found = api.completions.create(
                model="tiny", prompt="ab", max_tokens=3, temperature=0
            )  # fmt: skip
        assert found.usage.completion_tokens == 3


def _next(ended: queue.Queue[str], gated: Gated) -> str:
    """The next thing that the worker tells, with the engine let go on one step at a time."""
    for _ in range(40):
        try:
            return ended.get(timeout=1)
        except queue.Empty:
            gated.let(1)
    raise AssertionError("the engine was not told")


@pytest.mark.slow
def test_a_signal_in_mid_stream_loses_nothing(engine: Path) -> None:
    path = os.pathsep.join([str(ROOT), str(ROOT / "integrations" / "server")])
    server = subprocess.Popen(
        [sys.executable, "-m", "prune_export_server", str(engine), "--port", "0", "--threads", "1"],
        stdout=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": path},
    )  # fmt: skip
    try:
        assert server.stdout is not None
        address = server.stdout.readline().split(" at ")[1].strip()
        with openai.OpenAI(base_url=address, api_key="none", max_retries=0) as api:
            asked = {"model": "tiny", "prompt": PROMPT, "max_tokens": 200, "temperature": 0}
            expected = api.completions.create(**asked).choices[0].text
            stream = api.completions.create(**asked, stream=True)
            text = next(stream).choices[0].text
            server.send_signal(signal.SIGTERM)
            chunks = list(stream)
        assert text + "".join(one.choices[0].text for one in chunks) == expected
        assert chunks[-1].choices[0].finish_reason is not None
        assert server.wait(60) in (0, -signal.SIGTERM)
    finally:
        server.kill()
        server.communicate()
