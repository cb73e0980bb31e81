"""A server that speaks OpenAI's protocol and answers over HTTP.

Prompts go to the address that the recipe names and to no other: redirects are not followed. A
recipe may be a stranger's, and its prompts a user's own files, so that the user says where they may
go: `PRUNE_EXPORT_SEND_TO` in the environment lists addresses, and `PRUNE_EXPORT_API_KEY` is the key
that goes with them.

Source: the chat completions and completions of OpenAI's HTTP API, as vLLM, llama.cpp and others
serve them too.
"""

from __future__ import annotations

import datetime
import email.utils
import json
import os
import time
from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from prune_export.calibrate import Sample
from prune_export.errors import PlanError, StageError
from prune_export.generated.journal import Journal
from prune_export.generated.prompts import Prompt
from prune_export.progress import Task
from prune_export.recipe import Generation
from prune_export.sampling import seed_of
from prune_export.system.files import shown

if TYPE_CHECKING:  # imported where a server is asked, which a plan seldom is about
    import httpx2

SEND_TO: Final = "PRUNE_EXPORT_SEND_TO"
API_KEY: Final = "PRUNE_EXPORT_API_KEY"
TERMS: Final = (
    "a server's answers may be bound by its operator's terms of use, some of which forbid to train "
    "other models on them"
)

BACKOFF_SECONDS: Final = 1.0
_LONGEST_PAUSE_SECONDS: Final = 300.0
_LARGEST_ANSWER: Final = 16 * 1024**2
_AGAIN: Final = frozenset({408, 409, 425, 429, 500, 502, 503, 504, 529})
"""Of these a later attempt may succeed."""

_WHERE: Final = "data  generated"


class _Passing(Exception):
    """A failure after which another attempt may do, `pause` seconds later if the server says so."""

    def __init__(self, problem: str, pause: float | None = None) -> None:
        super().__init__(problem)
        self.pause = pause


def refuse_unasked(generation: Generation) -> None:
    """Refuses an address that is none, that holds a secret, or that the user has not named.

    Raises:
        PlanError: naming what to set.
    """
    import httpx2

    where, address = "generated.from", shown(generation.speaker)
    try:
        url = httpx2.URL(generation.speaker)
    except httpx2.InvalidURL as error:
        raise PlanError(where, f"`{address}` is no address: {error}", "correct it") from None
    if url.scheme not in ("http", "https") or not url.host:
        raise PlanError(
            where, f"`{address}` is no http(s) address", "write for example https://host/v1"
        )
    if url.userinfo or url.query or url.fragment:
        raise PlanError(
            where,
            f"the address of {url.host} holds a user, a password, a query or a fragment, and "
            "recipes are published",
            f"leave it out, and set {API_KEY} in the environment",
        )
    allowed = [one.strip() for one in os.environ.get(SEND_TO, "").split(",") if one.strip()]
    if _origin(url) not in {_origin_of(one) for one in allowed}:
        raise PlanError(
            where,
            f"would send its prompts to {_origin(url)}, which nobody has allowed",
            f"set {SEND_TO}={_origin(url)} in the environment if that is meant",
        )


def _origin(url: httpx2.URL) -> str:
    host = f"[{url.host}]" if ":" in url.host else url.host
    return f"{url.scheme}://{host}" + (f":{url.port}" if url.port else "")


def _origin_of(text: str) -> str:
    import httpx2

    try:
        return _origin(httpx2.URL(text))
    except httpx2.InvalidURL:
        return ""


def ask_server(
    generation: Generation, prompts: Sequence[Prompt], journal: Journal, task: Task
) -> None:
    """Asks for the answers that a journal does not hold yet, and keeps each as it comes.

    Raises:
        PlanError: the address may not be asked.
        StageError: the server refuses, fails again and again, or has counted too many tokens.
    """
    import httpx2

    refuse_unasked(generation)
    known = {(one.draw, one.prompt) for one in journal.samples}
    turns = [divmod(place, len(prompts)) for place in range(count_of(generation, prompts))]
    left = deque(turn for turn in turns if turn not in known)
    task.advance(len(known))
    key = os.environ.get(API_KEY)
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    waiting: dict[Future[Sample], tuple[int, int]] = {}
    with (
        httpx2.Client(
            headers=headers, timeout=httpx2.Timeout(generation.seconds), follow_redirects=False
        ) as client,
        ThreadPoolExecutor(generation.at_once) as pool,
    ):
        server = _Server(client, generation)
        try:
            while True:
                while len(waiting) < generation.at_once and left:
                    refuse_too_many(journal.samples, generation)
                    turn = left.popleft()
                    waiting[pool.submit(server.answer, prompts[turn[1]], *turn)] = turn
                if not waiting:
                    return
                done, _ = wait(waiting, return_when=FIRST_COMPLETED)
                # What others were told is kept before a failure is raised.
                for one in sorted(done, key=lambda one: one.exception() is not None):
                    del waiting[one]
                    journal.add([one.result()])
                    task.advance()
        except BaseException:
            server.stop()
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def count_of(generation: Generation, prompts: Sequence[Prompt]) -> int:
    """How many answers a server is asked for: by default one for each prompt."""
    return generation.answers or len(prompts)


def refuse_too_many(samples: Sequence[Sample], generation: Generation) -> None:
    """Refuses to go on when the server has counted more tokens than it may.

    Raises:
        StageError: it has.
    """
    counted = sum(int(one.about.get("tokens", 0)) for one in samples)
    if generation.most_tokens is not None and counted >= generation.most_tokens:
        raise StageError(
            _WHERE,
            f"{len(samples)} answers took {counted:,} tokens, and `most_tokens` is "
            f"{generation.most_tokens:,}",
            "raise `most_tokens`, or ask for fewer `answers`; what was answered is kept",
        )


@dataclass
class _Server:
    client: httpx2.Client
    generation: Generation
    stopped: bool = False

    def stop(self) -> None:
        """Lets attempts that are under way be the last."""
        self.stopped = True

    def answer(self, prompt: Prompt, draw: int, number: int) -> Sample:
        """Asks for one answer, as often as it may."""
        generation, problem = self.generation, ""
        for attempt in range(generation.attempts):
            try:
                return self._asked(prompt, draw, number)
            except _Passing as error:
                problem = str(error)
                pause = BACKOFF_SECONDS * 2**attempt if error.pause is None else error.pause
                last = attempt + 1 == generation.attempts
                if not last and not self.stopped:
                    self._rest(min(pause, _LONGEST_PAUSE_SECONDS))
                if self.stopped:
                    break
        raise StageError(
            f"{_WHERE}  prompt {number}",
            f"{shown(generation.speaker)} gave no answer in {generation.attempts} attempts: "
            f"{problem}",
            "run it again later, or raise `attempts` or `seconds`; what was answered is kept",
        )

    def _rest(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        while not self.stopped and (left := until - time.monotonic()) > 0:
            time.sleep(min(left, 0.5))

    def _asked(self, prompt: Prompt, draw: int, number: int) -> Sample:
        generation = self.generation
        chat = generation.template is not False or prompt.messages is not None
        body: dict[str, Any] = {
            "model": generation.model,
            "max_tokens": generation.new_tokens,
            "temperature": generation.temperature,
            "seed": seed_of(generation.seed, "answer", number, draw) % 2**31,
        }
        if generation.top_p < 1:
            body["top_p"] = generation.top_p
        if chat:
            body["messages"] = prompt.as_messages()
        else:
            body["prompt"] = prompt.text
        way = "chat/completions" if chat else "completions"
        said = self._posted(f"{generation.speaker.rstrip('/')}/{way}", body)
        text, reason = _text_of(said, chat=chat)
        about = {
            "model": str(said.get("model") or generation.model)[:200],
            "tokens": _tokens_of(said),
            "finish": reason,
            "day": datetime.datetime.now(datetime.UTC).date().isoformat(),
        }
        return Sample(
            prompt=number,
            draw=draw,
            answer=text,
            ended=reason != "length",
            messages=body.get("messages"),
            text=body.get("prompt"),
            document=prompt.document,
            about=about,
        )

    def _posted(self, url: str, body: Mapping[str, Any]) -> dict[str, Any]:
        """Sends one request and reads its JSON, which may be slow, large or none."""
        import httpx2

        until = time.monotonic() + self.generation.seconds
        try:
            with self.client.stream("POST", url, json=dict(body)) as response:
                content = b""
                for piece in response.iter_bytes():
                    content += piece
                    if len(content) > _LARGEST_ANSWER:
                        raise _Passing(f"its answer is longer than {_LARGEST_ANSWER} bytes")
                    if time.monotonic() > until:
                        raise _Passing(f"it was not done in {self.generation.seconds:g} s")
                self._refuse_status(response, content)
        except httpx2.TimeoutException:
            raise _Passing(f"it did not answer for {self.generation.seconds:g} s") from None
        except (httpx2.RequestError, httpx2.StreamError) as error:
            reason = (str(error).splitlines() or [""])[0] or type(error).__name__
            raise _Passing(f"the connection failed: {shown(reason):.300}") from None
        try:
            said = json.loads(content)
        except (ValueError, RecursionError):
            raise _Passing(f"its answer is not JSON: {_excerpt(content)}") from None
        if not isinstance(said, dict):
            raise _Passing(f"its answer is no object: {_excerpt(content)}")
        return said

    def _refuse_status(self, response: httpx2.Response, content: bytes) -> None:
        status, where = response.status_code, f"{_WHERE}  {shown(self.generation.speaker)}"
        if status == 200:
            return
        told = f"{status}: {_excerpt(content)}"
        if status in _AGAIN:
            raise _Passing(f"it says {told}", _retry_after(response))
        if status in (401, 403):
            state = "the key is refused" if os.environ.get(API_KEY) else "it wants a key"
            raise StageError(
                where, f"{state} ({told})", f"set {API_KEY} in the environment to one that may ask"
            )
        if response.is_redirect:
            raise StageError(
                where,
                f"it sends elsewhere ({status}), and prompts go to no other place than named",
                "write the address that it names, if you trust it",
            )
        if status == 404:
            raise StageError(
                where,
                f"it knows no such path or model ({told})",
                "write `from` up to and with /v1, and a `model` that it has",
            )
        raise StageError(
            where, f"it refuses the request ({told})", "correct the keys of `generated`"
        )


def _text_of(said: Mapping[str, Any], *, chat: bool) -> tuple[str, str]:
    """The text of an answer, and why it ended; an answer may be empty, and is known as such."""
    choices = said.get("choices")
    first = choices[0] if isinstance(choices, list) and choices else None
    if not isinstance(first, Mapping):
        raise _Passing("its answer has no `choices`")
    message = first.get("message") if chat else first
    if not isinstance(message, Mapping):
        raise _Passing("its answer has no `message`")
    text = message.get("content" if chat else "text")
    if text is not None and not isinstance(text, str):
        raise _Passing("its answer is no text")
    reason = first.get("finish_reason")
    reason = reason if isinstance(reason, str) else "unknown"
    # What was withheld is nothing to learn from.
    text = "" if text is None or reason == "content_filter" else text
    return text.encode("utf-8", "replace").decode(), reason[:40]


def _tokens_of(said: Mapping[str, Any]) -> int:
    usage = said.get("usage")
    count = usage.get("total_tokens") if isinstance(usage, Mapping) else None
    return count if type(count) is int and 0 <= count < 1 << 40 else 0


def _retry_after(response: httpx2.Response) -> float | None:
    """The pause that a server asks for, in seconds, written as such or as a date."""
    value = response.headers.get("retry-after")
    if value is None:
        return None
    if value.strip().isdigit():
        return float(value)
    try:
        then = email.utils.parsedate_to_datetime(value)
        return max(0.0, then.timestamp() - time.time())
    except (ValueError, OverflowError):
        return None


def _excerpt(content: bytes) -> str:
    """What a server says, short and printable; its own message where it is the usual error."""
    text = content[:2000].decode("utf-8", "replace")
    try:
        known = json.loads(content)
        error = known.get("error")
        text = str(error.get("message") if isinstance(error, Mapping) else error or text)
    except (ValueError, AttributeError, RecursionError):
        pass
    return shown(" ".join(text.split())[:200]) or "nothing"
