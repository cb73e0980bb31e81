"""Answers over HTTP, from a server on this machine that does what servers do."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from prune_export.calibrate import Sample, read_samples
from prune_export.errors import PlanError, StageError
from prune_export.generated import ANSWERS, Speaker, generate, server
from prune_export.generated.journal import Journal
from prune_export.generated.prompts import Prompt, prompts_of
from prune_export.generated.server import API_KEY, SEND_TO, refuse_unasked
from prune_export.machine import Machine
from prune_export.progress import Silent
from prune_export.recipe import Generated, Generation

MACHINE = Machine("cpu", 4 << 30, 0, 1)
Reply = Callable[["Asked"], None]


class Asked(BaseHTTPRequestHandler):
    """One request; the server's `script` says how each is answered, in their order."""

    protocol_version = "HTTP/1.1"
    server: Any

    def do_POST(self) -> None:
        length = int(self.headers["content-length"])
        self.body = json.loads(self.rfile.read(length))
        with self.server.lock:
            self.server.asked.append((self.path, dict(self.headers), self.body))
            script = self.server.script
            reply = script.pop(0) if script else answer
        reply(self)

    def say(self, status: int, content: bytes, **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("content-length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:
        del format, args


def answer(asked: Asked, **changes: Any) -> None:
    text = f"I say {asked.body['seed']}."
    chat = "messages" in asked.body
    choice = {"message": {"role": "assistant", "content": text}} if chat else {"text": text}
    said = {
        "model": "m-1", "usage": {"total_tokens": 10},
        "choices": [choice | {"finish_reason": "stop"} | changes],
    }  # fmt: skip
    asked.say(200, json.dumps(said).encode())


def status(code: int, content: bytes = b"{}", **headers: str) -> Reply:
    return lambda asked: asked.say(code, content, **headers)


def cut_off(asked: Asked) -> None:
    """Promises more than it sends, and closes."""
    asked.send_response(200)
    asked.send_header("content-length", "1000")
    asked.end_headers()
    asked.wfile.write(b'{"choices": [')
    asked.close_connection = True


def hang_up(asked: Asked) -> None:
    asked.close_connection = True


def slow(asked: Asked) -> None:
    """Sends a byte at a time, for longer than anybody waits."""
    asked.send_response(200)
    asked.send_header("content-length", "1000000")
    asked.end_headers()
    try:
        while not asked.server.over.wait(0.05):
            asked.wfile.write(b" ")
            asked.wfile.flush()
    except OSError:
        pass
    asked.close_connection = True


@pytest.fixture
def serving(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    found: Any = ThreadingHTTPServer(("127.0.0.1", 0), Asked)
    found.lock, found.asked, found.script = threading.Lock(), [], []
    found.over = threading.Event()
    found.origin = f"http://127.0.0.1:{found.server_port}"
    thread = threading.Thread(target=found.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    for name in ("HTTP_PROXY", "ALL_PROXY", "http_proxy", "all_proxy", API_KEY):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(SEND_TO, found.origin)
    monkeypatch.setattr(server, "BACKOFF_SECONDS", 0.001)
    yield found
    found.over.set()
    found.shutdown()
    found.server_close()
    thread.join()


def source(serving: Any, **keys: Any) -> Generated:
    body = {"from": f"{serving.origin}/v1", "model": "m", "at_once": 1} | keys
    return Generated(generated=Generation(**body), length=16)


def asked_of(
    serving: Any, tmp_path: Path, prompts: int = 4, scratch: str = "scratch", **keys: Any
) -> tuple[list[Sample], dict[str, Any]]:
    out = tmp_path / "out"
    out.mkdir(exist_ok=True)
    told = generate(
        source(serving, **keys), Speaker("m", None),
        [Prompt(f"Question {number}?", document=f"d{number}") for number in range(prompts)],
        tmp_path, out, machine=MACHINE, scratch=tmp_path / scratch, progress=Silent(),
    )  # fmt: skip
    return read_samples(out / ANSWERS), told


def test_each_prompt_is_answered_once_and_all_is_known_of_it(
    serving: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(API_KEY, "hush")
    found, told = asked_of(serving, tmp_path, at_once=3, temperature=0.5, new_tokens=7)
    assert [one.prompt for one in found] == [0, 1, 2, 3]
    assert len({one.answer for one in found}) == 4
    assert found[2].messages == [{"role": "user", "content": "Question 2?"}]
    assert found[2].about["model"] == "m-1"
    path, headers, body = serving.asked[0]
    assert path == "/v1/chat/completions"
    assert headers["Authorization"] == "Bearer hush"
    assert (body["model"], body["max_tokens"], body["temperature"]) == ("m", 7, 0.5)
    assert (told["answers"], told["tokens"], told["served"]) == (4, 40, {"m-1": 4})
    assert "terms of use" in told["terms"]
    assert "hush" not in json.dumps(told) + (tmp_path / "out" / ANSWERS).read_text()


def test_more_answers_than_prompts_go_round_with_other_seeds(serving: Any, tmp_path: Path) -> None:
    found, _ = asked_of(serving, tmp_path, prompts=2, answers=5)
    assert [(one.draw, one.prompt) for one in found] == [(0, 0), (0, 1), (1, 0), (1, 1), (2, 0)]
    assert len({one.answer for one in found}) == 5


def test_prompts_may_be_gone_on_with(serving: Any, tmp_path: Path) -> None:
    found, _ = asked_of(serving, tmp_path, template=False)
    assert serving.asked[0][0] == "/v1/completions"
    assert serving.asked[0][2]["prompt"] == "Question 0?"
    assert (found[0].messages, found[0].text) == (None, "Question 0?")


PASSING: dict[str, Reply] = {
    "too many": status(429, b'{"error": {"message": "slow down"}}', Retry_After="0"),
    "a date to wait for": status(429, b"{}", Retry_After="Wed, 21 Oct 2015 07:28:00 GMT"),
    "a date that is none": status(503, b"{}", Retry_After="soon"),
    "overloaded": status(529, b"<html>"),
    "broken JSON": status(200, b'{"choices": [{'),
    "no object": status(200, b"[1, 2]"),
    "no choices": status(200, b"{}"),
    "empty choices": status(200, b'{"choices": []}'),
    "no message": status(200, b'{"choices": [{}]}'),
    "a number": status(200, b'{"choices": [{"message": {"content": 3}}]}'),
    "no UTF-8": status(200, b'\xff\xfe{"choices"'),
    "cut off": cut_off,
    "hung up": hang_up,
}


@pytest.mark.parametrize("name", PASSING)
def test_what_may_pass_is_tried_again(name: str, serving: Any, tmp_path: Path) -> None:
    serving.script += [PASSING[name], PASSING[name]]
    found, _ = asked_of(serving, tmp_path, prompts=2, attempts=3)
    assert [one.prompt for one in found] == [0, 1]
    assert len(serving.asked) == 4
    serving.script += [PASSING[name]] * 2
    with pytest.raises(StageError, match="gave no answer in 2 attempts") as caught:
        asked_of(serving, tmp_path, scratch="other", attempts=2)
    assert "what was answered is kept" in str(caught.value)


def test_a_slow_server_is_waited_for_so_long_and_no_longer(serving: Any, tmp_path: Path) -> None:
    serving.script += [slow]
    found, _ = asked_of(serving, tmp_path, prompts=1, seconds=0.3)
    assert len(found) == 1
    serving.script += [slow]
    with pytest.raises(StageError, match=r"not done in 0\.3 s"):
        asked_of(serving, tmp_path, prompts=1, scratch="other", seconds=0.3, attempts=1)


@pytest.mark.parametrize(
    ("reply", "says"),
    [
        (status(401, b'{"error": {"message": "no key"}}'), "it wants a key"),
        (status(403), "it wants a key"),
        (status(404, b'{"error": "no such model"}'), "no such path or model"),
        (status(400, b'{"error": {"message": "seed is unknown"}}'), "seed is unknown"),
        (status(302, Location="http://127.0.0.1:1/"), "sends elsewhere"),
    ],
)
def test_what_will_not_pass_ends_at_once(
    reply: Reply, says: str, serving: Any, tmp_path: Path
) -> None:
    serving.script += [reply]
    with pytest.raises(StageError, match=says):
        asked_of(serving, tmp_path)
    assert len(serving.asked) == 1


def test_what_was_answered_is_not_asked_for_again(serving: Any, tmp_path: Path) -> None:
    serving.script += [answer, answer, status(401)]
    with pytest.raises(StageError):
        asked_of(serving, tmp_path)
    journal = tmp_path / "scratch" / "answers.jsonl"
    assert len(journal.read_bytes().splitlines()) == 2
    with journal.open("ab") as file:
        file.write(b'{"prompt": 2, "draw": 0, "ans')  # killed within a line
    found, _ = asked_of(serving, tmp_path)
    assert len(serving.asked) == 5
    assert [one.prompt for one in found] == [0, 1, 2, 3]
    unbroken, _ = asked_of(serving, tmp_path, scratch="other")
    assert [one.answer for one in unbroken] == [one.answer for one in found]


def test_no_more_tokens_are_asked_for_than_may_be(serving: Any, tmp_path: Path) -> None:
    with pytest.raises(StageError, match="2 answers took 20 tokens, and `most_tokens` is 15"):
        asked_of(serving, tmp_path, most_tokens=15)
    assert len(serving.asked) == 2
    found, _ = asked_of(serving, tmp_path, most_tokens=1000)
    assert len(found) == 4
    assert len(serving.asked) == 4


def test_the_last_answer_may_take_the_last_tokens(serving: Any, tmp_path: Path) -> None:
    found, _ = asked_of(serving, tmp_path, most_tokens=40)
    assert len(found) == 4
    again, _ = asked_of(serving, tmp_path, most_tokens=40)
    assert again == found
    assert len(serving.asked) == 4


def test_answers_that_are_empty_or_withheld_are_counted(serving: Any, tmp_path: Path) -> None:
    serving.script += [
        lambda asked: answer(asked, message={"content": None}),
        lambda asked: answer(asked, finish_reason="content_filter"),
        lambda asked: answer(asked, finish_reason="length"),
    ]
    found, told = asked_of(serving, tmp_path)
    assert [one.empty for one in found] == [True, True, False, False]
    assert (told["empty"], told["cut_off"]) == (2, 1)


@pytest.mark.parametrize(
    ("address", "says"),
    [
        ("http://elsewhere.example/v1", "nobody has allowed"),
        ("http://127.0.0.1:1/v1", "nobody has allowed"),
        ("http://user:secret@127.0.0.1/v1", "a password"),
        ("http://127.0.0.1/v1?key=secret", "a query"),
        ("ftp://127.0.0.1/v1", "no http"),
        ("http:///v1", "no http|no address"),
    ],
)
def test_only_where_the_user_says_is_anything_sent(
    address: str, says: str, serving: Any, tmp_path: Path
) -> None:
    with pytest.raises(PlanError, match=says) as caught:
        refuse_unasked(Generation(speaker=address, model="m"))
    assert "secret" not in str(caught.value)
    with pytest.raises(PlanError):
        asked_of(serving, tmp_path, **{"from": address})
    assert serving.asked == []


def test_an_allowed_address_is_the_whole_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SEND_TO, "http://a.example, https://b.example:8443/v1")
    refuse_unasked(Generation(speaker="https://b.example:8443/v1", model="m"))
    for other in ("https://a.example/v1", "http://a.example.evil.example/v1", "https://b.example"):
        with pytest.raises(PlanError):
            refuse_unasked(Generation(speaker=other, model="m"))


@contextmanager
def written(folder: Path, name: str, text: str) -> Iterator[Generation]:
    (folder / name).write_text(text, encoding="utf-8")
    yield Generation(prompts=(name,), column="messages" if "messages" in text else "prompt")


def test_prompts_of_files(tmp_path: Path) -> None:
    with written(tmp_path, "a.txt", "Eins?\n\nZwei? Ä\nEins?\n") as asked:
        found = prompts_of(asked, tmp_path)
        assert [one.text for one in found] == ["Eins?", "Zwei? Ä"]
        rest = prompts_of(asked, tmp_path, frozenset({found[0].document}))
        assert [one.text for one in rest] == ["Zwei? Ä"]
        with pytest.raises(PlanError, match="no prompt that no other data use"):
            prompts_of(asked, tmp_path, frozenset(one.document for one in found))
    talk = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]
    with written(tmp_path, "b.jsonl", json.dumps({"messages": talk})) as asked:
        assert prompts_of(asked, tmp_path)[0].as_messages() == talk[:1]
    with (
        written(tmp_path, "c.jsonl", json.dumps({"messages": talk[1:]})) as asked,
        pytest.raises(PlanError, match="only what an assistant says"),
    ):
        prompts_of(asked, tmp_path)


def test_the_journal_forgets_what_is_behind(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    journal.add(Sample(prompt=n, draw=0, answer=f"ä{n}", ended=True) for n in range(5))
    journal.keep_first(3)
    again = Journal(tmp_path)
    assert [one.answer for one in again.samples] == ["ä0", "ä1", "ä2"]
    again.add([Sample(prompt=9, draw=0, answer="x", ended=False)])
    assert Journal(tmp_path).samples[-1].prompt == 9
