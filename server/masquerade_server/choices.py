"""The choices of one reply: n generations under way at once, as one stream of outputs."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import replace
from typing import TYPE_CHECKING

from masquerade_engine.requests import Request, TokenOutput
from masquerade_masks import EngineStopped
from masquerade_server.errors import DeadlineExceeded, GenerationFailed

if TYPE_CHECKING:
    from masquerade_server.state import ChatEngine

Outputs = AsyncGenerator[tuple[int, TokenOutput], None]  # the choice's index, and its next output


async def outputs_of(engine: ChatEngine, requests: Sequence[Request]) -> Outputs:
    """Every output of every request, as they come.

    Raises what the engine raises for any of them, `EngineStopped` or `GenerationFailed` where it ended one without an
    answer, and `DeadlineExceeded` where none had a token in time; a choice that was late beside others is empty.
    Closing it cancels them all.
    """
    late: list[tuple[int, TokenOutput]] = []
    begun = False
    async with aclosing(_raw_outputs(engine, requests)) as outputs:
        async for index, output in outputs:
            if output.finish_reason == "cancelled":
                raise EngineStopped("the server is shutting down")
            if output.finish_reason == "error":
                raise GenerationFailed("the engine could not go on with this request; the server's log says more")
            if output.finish_reason == "deadline":
                late.append((index, replace(output, finish_reason="length")))
            else:
                begun = True
                yield index, output
    if late and not begun:
        assert requests[0].deadline_s is not None
        raise DeadlineExceeded(requests[0].deadline_s)
    for index, output in late:
        yield index, output


def _raw_outputs(engine: ChatEngine, requests: Sequence[Request]) -> Outputs:
    sources = [engine.generate(request) for request in requests]
    return _only(sources[0]) if len(sources) == 1 else _interleaved(sources)


async def _only(source: AsyncGenerator[TokenOutput, None]) -> Outputs:
    async with aclosing(source):
        async for output in source:
            yield 0, output


async def _interleaved(sources: Sequence[AsyncGenerator[TokenOutput, None]]) -> Outputs:
    news: asyncio.Queue[tuple[int, TokenOutput | Exception | None]] = asyncio.Queue()
    tasks = [asyncio.create_task(_forward(index, source, news)) for index, source in enumerate(sources)]
    try:
        num_open = len(tasks)
        while num_open:
            index, item = await news.get()
            if item is None:
                num_open -= 1
            elif isinstance(item, Exception):
                raise item
            else:
                yield index, item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _forward(
    index: int,
    source: AsyncGenerator[TokenOutput, None],
    news: asyncio.Queue[tuple[int, TokenOutput | Exception | None]],
) -> None:
    """Pass a source's outputs on; last its end, or what it raised."""
    end: Exception | None = None
    try:
        async with aclosing(source):
            async for output in source:
                news.put_nowait((index, output))
    except Exception as error:
        end = error
    news.put_nowait((index, end))
