"""The HTTP side: routes, errors, streaming. It never waits for the engine in the event loop."""

from __future__ import annotations

import asyncio
import json
import logging
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, Final

from pydantic import ValidationError
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from prune_export_server.answers import Form, usage_of
from prune_export_server.generation import Chosen, Sampling
from prune_export_server.metrics import Metrics
from prune_export_server.refused import Refused
from prune_export_server.requests import ChatRequest, CompletionRequest, first_problem
from prune_export_server.streaming import Streamed, events_of, gone
from prune_export_server.text import Words
from prune_export_server.worker import Done, Failed, Full, Job, Worker

MOST_BODY: Final = 4 << 20
"""The longest body in bytes: a megabyte of text is more than any context."""
_BODY_SECONDS: Final = 30.0
_LOG: Final = logging.getLogger(__name__)


@dataclass(frozen=True)
class Service:
    """What the routes need: the engine's worker, a tokenizer of their own, and limits.

    `words` has one more, which the event loop alone uses.
    """

    model: str
    worker: Worker
    tokenizer: Any
    words: Words
    vocabulary: int
    longest: int
    timeout: float
    metrics: Metrics
    draining: Callable[[], bool] = lambda: False


def application(service: Service) -> Starlette:
    """Makes the ASGI application."""
    lock = threading.Lock()  # a tokenizer may be used by one thread at a time

    async def chat(request: Request) -> Response:
        asked = _parsed(ChatRequest, await _body(request))
        _check_model(service, asked.model)
        messages = [{"role": one.role, "content": one.text} for one in asked.messages]
        ids = await run_in_threadpool(_chat_ids, service.tokenizer, lock, messages)
        most = asked.max_completion_tokens or asked.max_tokens
        wanted = (asked.top_logprobs or 0) if asked.logprobs else None
        sampling = _sampling(service, asked, [ids], most, wanted)
        form = Form(service.model, service.words, chat=True, logprobs=asked.logprobs)
        return await _answer(service, request, asked, [ids], sampling, form)

    async def completions(request: Request) -> Response:
        asked = _parsed(CompletionRequest, await _body(request))
        _check_model(service, asked.model)
        ids = await run_in_threadpool(_prompt_ids, service, lock, asked.prompts)
        sampling = _sampling(service, asked, ids, asked.max_tokens, asked.logprobs, asked.echo)
        form = Form(service.model, service.words, chat=False, logprobs=asked.logprobs is not None)
        return await _answer(service, request, asked, ids, sampling, form)

    async def models(request: Request) -> Response:
        del request
        return JSONResponse({"object": "list", "data": [_model(service)]})

    async def model(request: Request) -> Response:
        _check_model(service, request.path_params["name"])
        return JSONResponse(_model(service))

    async def health(request: Request) -> Response:
        del request
        fine = service.worker.alive and not service.draining()
        state = {"status": "ok" if fine else "unavailable", "model": service.model,
                 "waiting": service.worker.waiting}  # fmt: skip
        return JSONResponse(state, 200 if fine else 503)

    async def metrics(request: Request) -> Response:
        del request
        return Response(service.metrics.page(), media_type="text/plain; version=0.0.4")

    def counted(handler: Callable[[Request], Any]) -> Callable[[Request], Any]:
        async def count(request: Request) -> Response:
            try:
                found: Response = await handler(request)
            except Refused as error:
                headers = {"Retry-After": "1"} if error.status == 429 else None
                found = JSONResponse(error.body(), error.status, headers)
            except ClientDisconnect:
                found = Response(status_code=499)
            except Exception as error:  # a fault of ours: the client reads JSON all the same
                _LOG.exception("%s failed", request.url.path)
                body = Refused(500, f"the server failed: {type(error).__name__}").body()
                found = JSONResponse(body, 500)
            path = request.scope["route"].path
            service.metrics.requests.labels(path, str(found.status_code)).inc()
            return found

        return count

    return Starlette(
        routes=[
            Route("/v1/chat/completions", counted(chat), methods=["POST"]),
            Route("/v1/completions", counted(completions), methods=["POST"]),
            Route("/v1/models", counted(models)),
            Route("/v1/models/{name:path}", counted(model)),
            Route("/health", health),
            Route("/metrics", metrics),
        ],
        exception_handlers={404: _unknown, 405: _unknown},
    )


async def _unknown(request: Request, error: Exception) -> Response:
    status = getattr(error, "status_code", 404)
    refused = Refused(status, f"{request.method} {request.url.path} is not served here")
    return JSONResponse(refused.body(), status)


def _model(service: Service) -> dict[str, Any]:
    return {
        "id": service.model, "object": "model", "created": 0, "owned_by": "prune-export",
        "max_model_len": service.longest,
    }  # fmt: skip


def _check_model(service: Service, name: str) -> None:
    if name != service.model:
        raise Refused(
            404, f"the model {name!r} is not served here; `{service.model}` is",
            param="model", code="model_not_found",
        )  # fmt: skip


async def _body(request: Request) -> Any:
    """The JSON of a request, of bounded length and in bounded time."""
    parts: list[bytes] = []
    size = 0
    try:
        async with asyncio.timeout(_BODY_SECONDS):
            async for part in request.stream():
                size += len(part)
                if size > MOST_BODY:
                    raise Refused(413, f"the body is longer than {MOST_BODY} bytes")
                parts.append(part)
    except TimeoutError:
        raise Refused(408, "the body did not come in time") from None
    try:
        return json.loads(b"".join(parts))
    except (ValueError, RecursionError) as error:
        raise Refused(400, f"the body is not JSON: {error}") from None


def _parsed(kind: Any, body: Any) -> Any:
    try:
        return kind.model_validate(body)
    except ValidationError as error:
        key, words = first_problem(error)
        raise Refused(400, f"{key or 'the body'}: {words}", param=key or None) from None


def _chat_ids(tokenizer: Any, lock: threading.Lock, messages: list[Any]) -> list[int]:
    if not tokenizer.chat_template:
        raise Refused(400, "this model has no chat template; use /v1/completions")
    with lock:
        try:
            text = tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=True
            )
            found = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        except Exception as error:  # a template may raise what it likes
            words = (str(error).splitlines() or [type(error).__name__])[0]
            raise Refused(
                400, f"the chat template refuses these messages: {words:.300}", param="messages"
            ) from None
    return [int(one) for one in found]


def _prompt_ids(
    service: Service, lock: threading.Lock, prompts: Sequence[str | list[int]]
) -> list[list[int]]:
    found = []
    for prompt in prompts:
        if isinstance(prompt, str):
            with lock:
                try:
                    ids = service.tokenizer(prompt, verbose=False)["input_ids"]
                except Exception as error:
                    raise Refused(400, f"is no text: {error}", param="prompt") from None
        else:
            ids = prompt
        if any(not 0 <= one < service.vocabulary for one in ids):
            raise Refused(
                400, f"a token id is not in 0 to {service.vocabulary - 1}", param="prompt"
            )
        found.append([int(one) for one in ids])
    return found


def _sampling(
    service: Service,
    asked: Any,
    prompts: Sequence[Sequence[int]],
    most: int | None,
    logprobs: int | None,
    echo: bool = False,
) -> Sampling:
    for ids in prompts:
        if not ids:
            raise Refused(400, "an empty prompt cannot be continued", param="prompt")
        if len(ids) + (most or 1) > service.longest and not (
            most == 0 == service.longest - len(ids)
        ):
            raise Refused(
                400,
                f"{len(ids)} tokens of prompt and {most or 1} new ones are more than the "
                f"{service.longest} that this model takes",
                param="max_tokens", code="context_length_exceeded",
            )  # fmt: skip
    room = service.longest - max(len(ids) for ids in prompts)
    return Sampling(
        max_tokens=room if most is None else most, temperature=asked.temperature,
        top_p=asked.top_p, seed=asked.seed, logprobs=logprobs, echo=echo,
    )  # fmt: skip


async def _answer(
    service: Service,
    request: Request,
    asked: Any,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    form: Form,
) -> Any:
    loop = asyncio.get_running_loop()
    end = time.monotonic() + service.timeout
    most = service.worker.most_waiting
    if len(prompts) > most:
        raise Refused(400, f"{len(prompts)} prompts; the queue takes {most}", param="prompt")
    if not service.worker.alive:
        raise Refused(503, "the engine does not run any more")
    jobs = [Job(ids, sampling, asked.stops, end, loop) for ids in prompts]
    try:
        service.worker.submit(jobs)
    except Full:
        raise Refused(429, "too many requests are waiting; try again later") from None
    if asked.stream:
        usage = bool(asked.stream_options and asked.stream_options.include_usage)
        return Streamed(service.worker, jobs, form, usage=usage)
    watch = asyncio.create_task(gone(request))
    try:
        choices, generated = [], 0
        for index, job in enumerate(jobs):
            text, tokens, done = await _collected(job, watch, service)
            if sampling.echo:
                text = service.words.decoded(job.ids) + text
            choices.append(form.choice(index, text, tokens, done.finish))
            generated += done.generated
        usage_ = usage_of(sum(map(len, prompts)), generated)
        return JSONResponse(form.whole(choices, usage_))
    finally:
        watch.cancel()
        for job in jobs:
            service.worker.cancel(job)


async def _collected(
    job: Job, watch: asyncio.Task[None], service: Service
) -> tuple[str, list[Chosen], Done]:
    text = ""
    tokens: list[Chosen] = []
    async with aclosing(events_of(job, watch, service.worker)) as events:
        async for event in events:
            if isinstance(event, Done):
                return text, tokens, event
            if isinstance(event, Failed):
                raise Refused(504 if event.late else 500, event.problem)
            text += event.text
            tokens += event.tokens
    raise ClientDisconnect
