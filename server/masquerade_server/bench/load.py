"""Sends a load and times every chunk that comes back."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

from masquerade_client import APIError, AsyncMasquerade, MasqueradeError, Sampling, Usage
from masquerade_server.bench.timeline import Failure, Timeline
from masquerade_server.bench.workload import Call


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of a load."""

    results: tuple[Timeline | Failure, ...]  # in the order of the calls
    duration_s: float  # from the first departure to the last answer


async def run_load(
    client: AsyncMasquerade,
    calls: Sequence[Call],
    sampling: Sampling,
    *,
    concurrency: int | None = None,
    on_end: Callable[[], None] = lambda: None,
) -> Outcome:
    """Send each call at its departure, at most `concurrency` at once; `on_end` is told of each that has ended.

    A request's clock starts when it is sent, not when it departs: waiting for a free place does not count. A request
    that fails is a `Failure`, and never stops the others. `client` must not retry.
    """
    places = nullcontext() if concurrency is None else asyncio.Semaphore(concurrency)
    started = time.perf_counter()

    async def send(call: Call) -> Timeline | Failure:
        await asyncio.sleep(started + call.departs_s - time.perf_counter())
        async with places:
            result = await timed_reply(client, call, sampling)
        on_end()
        return result

    results = await asyncio.gather(*map(send, calls))
    return Outcome(tuple(results), time.perf_counter() - started)


async def timed_reply(client: AsyncMasquerade, call: Call, sampling: Sampling) -> Timeline | Failure:
    """Stream one reply to its end."""
    sent = time.perf_counter()
    first = last = None
    texts: list[float] = []
    usage: Usage | None = None
    finish_reason: str | None = None
    try:
        async with client.chat.stream(call.model, call.question, **sampling) as stream:
            async for chunk in stream:
                now = time.perf_counter()
                first = first or now
                if chunk.text:
                    texts.append(now)
                if chunk.finish_reason is not None:
                    last, finish_reason = now, chunk.finish_reason
                usage = chunk.usage or usage
    except MasqueradeError as error:
        return Failure(_kind(error), str(error))
    if first is None or last is None or usage is None:
        return Failure("incomplete reply", f"{call.model}: finish reason {finish_reason}, usage {usage}")
    return Timeline(sent, first, last, tuple(texts), usage.prompt_tokens, usage.cached_tokens, usage.completion_tokens)


def _kind(error: MasqueradeError) -> str:
    if not isinstance(error, APIError):
        return type(error).__name__
    return f"{type(error).__name__} {error.status}" + (f" ({error.code})" if error.code else "")
