"""Performing effects over httpx, with blocking and with awaiting calls: the only code that exists twice."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Generic, Self, TypeVar

import httpx

from .errors import APIConnectionError, APITimeout
from .flow import Effect, Emit, Flow, Open, Outcome, Pause, Progression, Read, Send
from .wire import Request, Response

T = TypeVar("T")
R = TypeVar("R")


class Stream(Generic[T, R]):
    """An operation that hands out values as it goes: iterate, then `result()`.

    The first step sends the request. Leaving it (`with`, `close`, or dropping the last reference) closes its
    connection.
    """

    def __init__(self, http: httpx.Client, flow: Flow[T, R]) -> None:
        self._http = http
        self._progression = Progression(flow)
        self._response: httpx.Response | None = None
        self._body: Iterator[bytes] = iter(())

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> T:
        outcome: Outcome | Exception = None
        try:
            while (step := self._progression.advance(outcome)) is not None:
                if isinstance(step, Emit):
                    return step.value
                try:
                    outcome = self._perform(step)
                except APIConnectionError as error:
                    outcome = error
        except BaseException:
            self.close()
            raise
        self.close()
        raise StopIteration

    def result(self) -> R:
        """Run to the end, dropping what is left to iterate over, and return the operation's result."""
        for _ in self:
            pass
        return self._progression.result

    def close(self) -> None:
        self._progression.close()
        self._close_body()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()

    def _perform(self, effect: Effect) -> Outcome:
        with _translated(self._http.base_url):
            match effect:
                case Send(request):
                    return _response(self._http.send(_build(self._http, request)))
                case Open(request):
                    return self._open(request)
                case Read():
                    return next(self._body, b"")
                case Pause(seconds):
                    time.sleep(seconds)
        return None

    def _open(self, request: Request) -> Response:
        self._close_body()
        self._response = response = self._http.send(_build(self._http, request), stream=True)
        self._body = response.iter_bytes()
        if not response.is_success:
            response.read()
        return _response(response)

    def _close_body(self) -> None:
        if self._response is not None:
            self._response.close()
            self._response = None


class AsyncStream(Generic[T, R]):
    """An operation that hands out values as it goes: `async for`, then `await result()`.

    The first step sends the request. Leave it early only through `async with` or `aclose`, which close its
    connection.
    """

    def __init__(self, http: httpx.AsyncClient, flow: Flow[T, R]) -> None:
        self._http = http
        self._progression = Progression(flow)
        self._response: httpx.Response | None = None
        self._body: AsyncIterator[bytes] | None = None

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> T:
        outcome: Outcome | Exception = None
        try:
            while (step := self._progression.advance(outcome)) is not None:
                if isinstance(step, Emit):
                    return step.value
                try:
                    outcome = await self._perform(step)
                except APIConnectionError as error:
                    outcome = error
        except BaseException:
            await self.aclose()
            raise
        await self.aclose()
        raise StopAsyncIteration

    async def result(self) -> R:
        """Run to the end, dropping what is left to iterate over, and return the operation's result."""
        async for _ in self:
            pass
        return self._progression.result

    async def aclose(self) -> None:
        self._progression.close()
        await self._close_body()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    async def _perform(self, effect: Effect) -> Outcome:
        with _translated(self._http.base_url):
            match effect:
                case Send(request):
                    return _response(await self._http.send(_build(self._http, request)))
                case Open(request):
                    return await self._open(request)
                case Read():
                    return await anext(self._body, b"") if self._body is not None else b""
                case Pause(seconds):
                    await asyncio.sleep(seconds)
        return None

    async def _open(self, request: Request) -> Response:
        await self._close_body()
        self._response = response = await self._http.send(_build(self._http, request), stream=True)
        self._body = response.aiter_bytes()
        if not response.is_success:
            await response.aread()
        return _response(response)

    async def _close_body(self) -> None:
        if self._response is not None:
            response, self._response = self._response, None
            await response.aclose()


def _build(http: httpx.Client | httpx.AsyncClient, request: Request) -> httpx.Request:
    timeout = http.timeout
    if request.silence_s is not None:
        read = min(request.silence_s, timeout.read or request.silence_s)
        timeout = httpx.Timeout(read, connect=timeout.connect, write=timeout.write, pool=timeout.pool)
    return http.build_request(
        request.method,
        request.path,
        params=request.params or None,
        headers=request.headers,
        timeout=timeout,
        json=None if isinstance(request.body, bytes) else request.body,
        content=request.body if isinstance(request.body, bytes) else None,
    )


def _response(response: httpx.Response) -> Response:
    """Any httpx response; of one that still streams, status and headers."""
    content = response.content if response.is_stream_consumed else b""
    return Response(response.status_code, dict(response.headers), content)


@contextmanager
def _translated(base_url: httpx.URL) -> Iterator[None]:
    """Raise httpx's transport errors as ours."""
    try:
        yield
    except (httpx.ConnectError, httpx.ConnectTimeout) as error:
        reason = str(error) or type(error).__name__
        message = f"cannot connect to {base_url}: {reason}; is the server running?"
        raise APIConnectionError(message, delivered=False) from error
    except httpx.PoolTimeout as error:
        raise APITimeout("no free connection within the timeout", delivered=False) from error
    except httpx.TimeoutException as error:
        raise APITimeout(f"no answer from {base_url} within the timeout") from error
    except httpx.RequestError as error:
        reason = str(error) or type(error).__name__
        raise APIConnectionError(f"the connection to {base_url} was lost: {reason}") from error
