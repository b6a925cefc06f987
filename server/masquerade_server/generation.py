"""From a validated body to a reply: limits, sampling, the engine request, and the two ways to answer."""

from __future__ import annotations

import asyncio
import re
import time
import uuid
from collections.abc import AsyncGenerator, Awaitable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response

from masquerade_engine.requests import Request, SamplingParams, TokenOutput
from masquerade_masks import EngineStopped, MasqueradeError, SettingError
from masquerade_server.errors import GenerationFailed, PromptTooLong, error_body
from masquerade_server.middleware import note
from masquerade_server.openai_shapes import ReplyHead, ReplyShape, usage_of
from masquerade_server.sse import DONE, EventStream, event

if TYPE_CHECKING:
    from masquerade_server.catalogue import Target
    from masquerade_server.schemas import GenerationBody
    from masquerade_server.state import ChatEngine

T = TypeVar("T")

CLIENT_CLOSED_REQUEST = 499  # nginx's status for the log: nobody reads the answer
_SEED_BITS = (1 << 63) - 1
_HEADER_UNSAFE = re.compile(r"[^A-Za-z0-9_.\[\]-]")


@dataclass(frozen=True, slots=True)
class Generation:
    """One generation, ready to run."""

    request: Request
    shape: ReplyShape
    stream: bool
    include_usage: bool
    stop_ids: frozenset[int]  # end tokens: never part of the text, nor of its logprobs
    headers: dict[str, str]


def token_budget(prompt_tokens: int, limit: int, field: str, wanted: int | None, *, default: int | None) -> int:
    """Tokens to generate at most. Raises `PromptTooLong`, and `SettingError` where `wanted` is too many."""
    left = limit - prompt_tokens
    if left < 1:
        raise PromptTooLong(prompt_tokens, limit)
    if wanted is None:
        return left if default is None else min(left, default)
    if wanted > left:
        prompt = f"the prompt takes {prompt_tokens} of the {limit} tokens that the context holds"
        raise SettingError(field, f"is {wanted}, and {prompt}: {left} are left")
    return wanted


def sampling_params(body: GenerationBody, max_tokens: int, logprobs: int | None) -> SamplingParams:
    """The engine's sampling from OpenAI's fields; null is OpenAI's default."""
    min_tokens = body.min_tokens or 0
    if min_tokens > max_tokens:
        raise SettingError("min_tokens", f"is {min_tokens}, and at most {max_tokens} tokens are generated")
    return SamplingParams(
        max_tokens=max_tokens,
        temperature=_or(body.temperature, 1.0),
        top_p=_or(body.top_p, 1.0),
        top_k=max(0, body.top_k or 0),
        min_p=_or(body.min_p, 0.0),
        repetition_penalty=_or(body.repetition_penalty, 1.0),
        presence_penalty=_or(body.presence_penalty, 0.0),
        frequency_penalty=_or(body.frequency_penalty, 0.0),
        seed=None if body.seed is None else body.seed & _SEED_BITS,
        stop=body.stop_strings,
        min_tokens=min_tokens,
        ignore_eos=bool(body.ignore_eos),
        logprobs=logprobs,
    )


def reply_head(kind: str, target: Target) -> ReplyHead:
    """A fresh id under `kind` (`chatcmpl` or `cmpl`), stamped with what serves it."""
    return ReplyHead(f"{kind}-{uuid.uuid4().hex}", int(time.time()), target.model, target.fingerprint)


def new_generation(
    *,
    body: GenerationBody,
    target: Target,
    prompt: Sequence[int],
    sampling: SamplingParams,
    shape: ReplyShape,
    stop_ids: frozenset[int],
) -> Generation:
    """The engine's request and how its reply is worded."""
    headers = {}
    if body.ignored:  # said where a developer looks: nothing else tells that a field had no effect
        names = [_HEADER_UNSAFE.sub("?", name)[:64] for name in body.ignored[:16]]
        headers["x-masquerade-ignored"] = ", ".join(names)
    request = Request(shape.head.id, tuple(prompt), target.function, sampling, priority=body.priority or 0)
    return Generation(request, shape, bool(body.stream), body.include_usage, stop_ids, headers)


async def answer(http: HttpRequest, engine: ChatEngine, generation: Generation) -> Response:
    """Run a generation. Its first token decides the status, so a full queue is a 429 for streams as well.

    Raises what the engine raises before the first token. A client that goes away cancels its generation.
    """
    outputs = engine.generate(generation.request)
    try:
        first = await until_disconnect(http, anext(outputs))
        if generation.stream:
            chunks = _chunks(_all(first, outputs), generation, http)
            return EventStream(chunks, generation.headers, source=outputs)
        reply = await until_disconnect(http, _whole(_all(first, outputs), generation, http))
    except ClientGone:
        note(http.scope, "client gone")
        return Response(status_code=CLIENT_CLOSED_REQUEST)
    return JSONResponse(reply, headers=generation.headers)


class ClientGone(Exception):
    """The client closed its connection before the answer."""


async def until_disconnect(http: HttpRequest, work: Awaitable[T]) -> T:
    """The result of `work`, which is cancelled where the client goes away first. Raises `ClientGone`.

    The request's body must have been read: what comes after it is the disconnect.
    """
    task = asyncio.ensure_future(work)
    listener = asyncio.ensure_future(_disconnected(http))
    try:
        await asyncio.wait({task, listener}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGone
        return task.result()
    finally:
        for one in (task, listener):
            one.cancel()
        await asyncio.gather(task, listener, return_exceptions=True)


async def _disconnected(http: HttpRequest) -> None:
    while (await http.receive())["type"] != "http.disconnect":
        pass


async def _all(first: TokenOutput, rest: AsyncGenerator[TokenOutput, None]) -> AsyncGenerator[TokenOutput, None]:
    """Every output of a request. Raises where the engine ended it without an answer."""
    output = first
    try:
        while True:
            if output.finish_reason == "cancelled":
                raise EngineStopped("the server is shutting down")
            if output.finish_reason == "error":
                raise GenerationFailed("the engine could not go on with this request; the server's log says more")
            yield output
            if output.finish_reason is not None:
                return
            output = await anext(rest)
    finally:
        await rest.aclose()


async def _whole(
    outputs: AsyncGenerator[TokenOutput, None],
    generation: Generation,
    http: HttpRequest,
) -> dict[str, Any]:
    texts, tokens = [], []
    async for output in outputs:
        texts.append(output.text)
        tokens += _reported(output, generation)
    _note_usage(http, output)
    return generation.shape.whole("".join(texts), tokens, _finish_reason(output), usage_of(output))


async def _chunks(
    outputs: AsyncGenerator[TokenOutput, None],
    generation: Generation,
    http: HttpRequest,
) -> AsyncGenerator[bytes, None]:
    """The stream of a reply: opening, pieces, ending, usage if asked for, `[DONE]`."""
    for chunk in generation.shape.opening():
        yield event(chunk)
    try:
        async for output in outputs:
            tokens = _reported(output, generation)
            if output.text or tokens:
                yield event(generation.shape.piece(output.text, tokens))
    except MasqueradeError as error:  # the status line is gone: SDKs raise on an `error` key
        yield event(error_body(error))
    else:
        yield event(generation.shape.ending(_finish_reason(output)))
        if generation.include_usage:
            yield event(generation.shape.usage_chunk(usage_of(output)))
        _note_usage(http, output)
    yield DONE


def _reported(output: TokenOutput, generation: Generation) -> list[TokenOutput]:
    """The output as a token with a logprob, where those were asked for."""
    if generation.request.sampling.logprobs is None or output.logprob is None:
        return []
    return [] if output.token_id is None or output.token_id in generation.stop_ids else [output]


def _finish_reason(last: TokenOutput) -> str:
    assert last.finish_reason is not None
    return last.finish_reason


def _note_usage(http: HttpRequest, last: TokenOutput) -> None:
    note(http.scope, f"{last.num_prompt_tokens}+{last.num_output_tokens} tokens")


def _or(value: float | None, default: float) -> float:
    return default if value is None else value
