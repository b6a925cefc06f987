"""From a validated body to a reply: limits, sampling, the engine request, and the two ways to answer."""

from __future__ import annotations

import asyncio
import re
import time
import uuid
from collections.abc import AsyncGenerator, Awaitable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, TypeVar

from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response

from masquerade_engine.requests import Request, SamplingParams, TokenOutput
from masquerade_masks import MasqueradeError, SettingError
from masquerade_server.choices import Outputs, outputs_of
from masquerade_server.errors import PromptTooLong, error_body
from masquerade_server.middleware import note
from masquerade_server.openai_shapes import Choice, ReplyHead, ReplyShape, usage_of
from masquerade_server.sse import DONE, EventStream, event
from masquerade_server.token_reports import TokenReports

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
    """The generations of one reply, ready to run."""

    requests: tuple[Request, ...]  # one a choice
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
    headers: Mapping[str, str] | None = None,
) -> Generation:
    """The engine's requests and how their reply is worded. Raises `SettingError` for `n` and `best_of` at odds."""
    told = dict(headers or {})
    if body.ignored:  # said where a developer looks: nothing else tells that a field had no effect
        names = [_HEADER_UNSAFE.sub("?", name)[:64] for name in body.ignored[:16]]
        told["x-masquerade-ignored"] = ", ".join(names)
    requests = tuple(
        Request(
            shape.head.id if index == 0 else f"{shape.head.id}-{index}",
            tuple(prompt),
            target.function,
            _of_choice(sampling, index),
            priority=body.priority or 0,
            deadline_s=body.deadline_s,
        )
        for index in range(body.num_choices)
    )
    return Generation(requests, shape, bool(body.stream), body.include_usage, stop_ids, told)


def _of_choice(sampling: SamplingParams, index: int) -> SamplingParams:
    """A choice's own draws: the first has those of a reply with no other."""
    if sampling.seed is None or index == 0:
        return sampling
    return replace(sampling, seed=(sampling.seed + index) & _SEED_BITS)


async def answer(http: HttpRequest, engine: ChatEngine, generation: Generation) -> Response:
    """Run a generation. Its first token decides the status, so a full queue is a 429 for streams as well.

    Raises what `outputs_of` raises before the first token. A client that goes away cancels every choice.
    """
    outputs = outputs_of(engine, generation.requests)
    try:
        first = await until_disconnect(http, anext(outputs))
        if generation.stream:
            return EventStream(_chunks(first, outputs, generation, http), generation.headers, source=outputs)
        async with aclosing(outputs):
            reply = await until_disconnect(http, _whole(first, outputs, generation, http))
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


@dataclass(slots=True)
class _ChoiceProgress:
    """One choice of a reply, as far as it has come."""

    reports: TokenReports | None  # None: no logprobs were asked for
    texts: list[str] = field(default_factory=list)
    tokens: list[TokenOutput] = field(default_factory=list)
    last: TokenOutput | None = None

    def feed(self, output: TokenOutput) -> list[TokenOutput]:
        """The tokens to report with the output's text."""
        self.last = output
        return [] if self.reports is None else self.reports.feed(output)

    @property
    def ended(self) -> TokenOutput:
        """The last output of a choice that has ended."""
        assert self.last is not None
        return self.last

    def finished(self) -> Choice:
        reason = self.ended.finish_reason
        assert reason is not None
        return Choice("".join(self.texts), self.tokens, reason)


def _choices(generation: Generation) -> list[_ChoiceProgress]:
    bytes_of = generation.shape.bytes_of
    return [
        _ChoiceProgress(None if bytes_of is None else TokenReports(bytes_of, generation.stop_ids))
        for _ in generation.requests
    ]


async def _all(first: tuple[int, TokenOutput], rest: Outputs) -> Outputs:
    async with aclosing(rest):
        yield first
        async for item in rest:
            yield item


async def _whole(
    first: tuple[int, TokenOutput], rest: Outputs, generation: Generation, http: HttpRequest
) -> dict[str, Any]:
    choices = _choices(generation)
    async with aclosing(_all(first, rest)) as outputs:
        async for index, output in outputs:
            choices[index].tokens += choices[index].feed(output)
            choices[index].texts.append(output.text)
    usage = usage_of([choice.ended for choice in choices])
    _note_usage(http, usage)
    return generation.shape.whole([choice.finished() for choice in choices], usage)


async def _chunks(
    first: tuple[int, TokenOutput], rest: Outputs, generation: Generation, http: HttpRequest
) -> AsyncGenerator[bytes, None]:
    """The stream of a reply: openings, the choices' pieces and endings as they come, usage if asked for, `[DONE]`."""
    shape, choices = generation.shape, _choices(generation)
    for index in range(len(choices)):
        for chunk in shape.opening(index):
            yield event(chunk)
    try:
        async with aclosing(_all(first, rest)) as outputs:
            async for index, output in outputs:
                tokens = choices[index].feed(output)
                if output.text or tokens:
                    yield event(shape.piece(index, output.text, tokens))
                if output.finish_reason is not None:
                    yield event(shape.ending(index, output.finish_reason))
    except MasqueradeError as error:  # the status line is gone: SDKs raise on an `error` key
        yield event(error_body(error))
    else:
        usage = usage_of([choice.ended for choice in choices])
        if generation.include_usage:
            yield event(shape.usage_chunk(usage))
        _note_usage(http, usage)
    yield DONE


def _note_usage(http: HttpRequest, usage: dict[str, Any]) -> None:
    note(http.scope, f"{usage['prompt_tokens']}+{usage['completion_tokens']} tokens")


def _or(value: float | None, default: float) -> float:
    return default if value is None else value
