"""`Masquerade` and `AsyncMasquerade`: the operations, bound to a connection."""

from __future__ import annotations

import os
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from functools import wraps
from types import TracebackType
from typing import Any, Generic, ParamSpec, Self, TypeVar

import httpx

from . import casts, chat, models, personas
from .errors import InvalidSetting
from .flow import Call, Flow, RetryPolicy, retrying
from .runners import AsyncStream, Stream

P = ParamSpec("P")
T = TypeVar("T")
R = TypeVar("R")

DEFAULT_URL = "http://127.0.0.1:8000"
DEFAULT_TIMEOUT_S = 600.0  # between two bytes: a long reply on a busy CPU takes minutes
_CONNECT_TIMEOUT_S = 5.0
_LIMITS = httpx.Limits(max_connections=1000, max_keepalive_connections=100)  # a town may talk all at once


# --- binding an operation to a client ---------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Connection:
    http: httpx.Client
    retries: RetryPolicy

    def run(self, flow: Flow[T, R]) -> Stream[T, R]:
        return Stream(self.http, retrying(flow, self.retries))


@dataclass(frozen=True, slots=True)
class _AsyncConnection:
    http: httpx.AsyncClient
    retries: RetryPolicy

    def run(self, flow: Flow[T, R]) -> AsyncStream[T, R]:
        return AsyncStream(self.http, retrying(flow, self.retries))


class _Calls:
    """A group of blocking calls, such as `client.personas`."""

    def __init__(self, connection: _Connection) -> None:
        self._connection = connection


class _AsyncCalls:
    """A group of awaiting calls."""

    def __init__(self, connection: _AsyncConnection) -> None:
        self._connection = connection


class _Blocking(Generic[P, R]):
    """A method that runs the operation to its end."""

    def __init__(self, operation: Callable[P, Call[R]]) -> None:
        self._operation = operation

    def __get__(self, calls: _Calls, owner: type) -> Callable[P, R]:
        @wraps(self._operation)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            return calls._connection.run(self._operation(*args, **kwargs)).result()

        return call


class _Streaming(Generic[P, T, R]):
    """A method that returns the operation as a Stream."""

    def __init__(self, operation: Callable[P, Flow[T, R]]) -> None:
        self._operation = operation

    def __get__(self, calls: _Calls, owner: type) -> Callable[P, Stream[T, R]]:
        @wraps(self._operation)
        def call(*args: P.args, **kwargs: P.kwargs) -> Stream[T, R]:
            return calls._connection.run(self._operation(*args, **kwargs))

        return call


class _Awaiting(Generic[P, R]):
    """A method whose coroutine runs the operation to its end."""

    def __init__(self, operation: Callable[P, Call[R]]) -> None:
        self._operation = operation

    def __get__(self, calls: _AsyncCalls, owner: type) -> Callable[P, Coroutine[Any, Any, R]]:
        @wraps(self._operation)
        async def call(*args: P.args, **kwargs: P.kwargs) -> R:
            return await calls._connection.run(self._operation(*args, **kwargs)).result()

        return call


class _AsyncStreaming(Generic[P, T, R]):
    """A method that returns the operation as an AsyncStream."""

    def __init__(self, operation: Callable[P, Flow[T, R]]) -> None:
        self._operation = operation

    def __get__(self, calls: _AsyncCalls, owner: type) -> Callable[P, AsyncStream[T, R]]:
        @wraps(self._operation)
        def call(*args: P.args, **kwargs: P.kwargs) -> AsyncStream[T, R]:
            return calls._connection.run(self._operation(*args, **kwargs))

        return call


# --- the calls --------------------------------------------------------------------------------------------


class PersonaCalls(_Calls):
    """`client.personas`."""

    create = _Blocking(personas.create)
    sculpt = _Streaming(personas.sculpt)
    estimate = _Blocking(personas.estimate)
    get = _Blocking(personas.get)
    list = _Streaming(personas.list_all)
    update = _Blocking(personas.update)
    rollback = _Blocking(personas.rollback)
    delete = _Blocking(personas.delete)
    cancel = _Blocking(personas.cancel)
    warm = _Blocking(personas.warm)
    events = _Blocking(personas.events)
    watch = _Streaming(personas.watch)
    download_mask = _Blocking(personas.download_mask)
    download_attached = _Blocking(personas.download_attached)
    upload_mask = _Blocking(personas.upload_mask)
    report = _Blocking(personas.report)
    examples = _Blocking(personas.examples)


class AsyncPersonaCalls(_AsyncCalls):
    """`client.personas`, awaiting."""

    create = _Awaiting(personas.create)
    sculpt = _AsyncStreaming(personas.sculpt)
    estimate = _Awaiting(personas.estimate)
    get = _Awaiting(personas.get)
    list = _AsyncStreaming(personas.list_all)
    update = _Awaiting(personas.update)
    rollback = _Awaiting(personas.rollback)
    delete = _Awaiting(personas.delete)
    cancel = _Awaiting(personas.cancel)
    warm = _Awaiting(personas.warm)
    events = _Awaiting(personas.events)
    watch = _AsyncStreaming(personas.watch)
    download_mask = _Awaiting(personas.download_mask)
    download_attached = _Awaiting(personas.download_attached)
    upload_mask = _Awaiting(personas.upload_mask)
    report = _Awaiting(personas.report)
    examples = _Awaiting(personas.examples)


class ChatCalls(_Calls):
    """`client.chat`."""

    complete = _Blocking(chat.complete)
    stream = _Streaming(chat.stream)


class AsyncChatCalls(_AsyncCalls):
    """`client.chat`, awaiting."""

    complete = _Awaiting(chat.complete)
    stream = _AsyncStreaming(chat.stream)


class ModelCalls(_Calls):
    """`client.models`."""

    list = _Blocking(models.list_all)
    get = _Blocking(models.get)


class AsyncModelCalls(_AsyncCalls):
    """`client.models`, awaiting."""

    list = _Awaiting(models.list_all)
    get = _Awaiting(models.get)


class CastCalls(_Calls):
    """`client.casts`."""

    overlap = _Blocking(casts.overlap)


class AsyncCastCalls(_AsyncCalls):
    """`client.casts`, awaiting."""

    overlap = _Awaiting(casts.overlap)


class ServerCalls(_Calls):
    """`client.server`."""

    ready = _Blocking(models.ready)


class AsyncServerCalls(_AsyncCalls):
    """`client.server`, awaiting."""

    ready = _Awaiting(models.ready)


# --- the clients ------------------------------------------------------------------------------------------


class Masquerade:
    """A client that blocks. Safe to share between threads; close it, or use it in `with`.

    `base_url` defaults to `MASQUERADE_URL` or http://127.0.0.1:8000, `api_key` to `MASQUERADE_API_KEY`.
    `timeout` is in seconds, of silence rather than in total. Raises InvalidSetting.
    """

    def __init__(
        self,
        base_url: str | None = None,
        *,
        api_key: str | None = None,
        timeout: float = DEFAULT_TIMEOUT_S,
        max_retries: int = 2,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        self.base_url = _resolve_url(base_url)
        self._http = httpx.Client(
            base_url=self.base_url,
            headers=_headers(api_key),
            timeout=httpx.Timeout(timeout, connect=min(timeout, _CONNECT_TIMEOUT_S)),
            limits=_LIMITS,
            transport=transport,
        )
        connection = _Connection(self._http, RetryPolicy(max_retries=max_retries))
        self.personas = PersonaCalls(connection)
        self.chat = ChatCalls(connection)
        self.models = ModelCalls(connection)
        self.casts = CastCalls(connection)
        self.server = ServerCalls(connection)

    def close(self) -> None:
        self._http.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class AsyncMasquerade:
    """A client for asyncio, with the calls of `Masquerade`. Close it, or use it in `async with`."""

    def __init__(
        self,
        base_url: str | None = None,
        *,
        api_key: str | None = None,
        timeout: float = DEFAULT_TIMEOUT_S,
        max_retries: int = 2,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        self.base_url = _resolve_url(base_url)
        self._http = httpx.AsyncClient(
            base_url=self.base_url,
            headers=_headers(api_key),
            timeout=httpx.Timeout(timeout, connect=min(timeout, _CONNECT_TIMEOUT_S)),
            limits=_LIMITS,
            transport=transport,
        )
        connection = _AsyncConnection(self._http, RetryPolicy(max_retries=max_retries))
        self.personas = AsyncPersonaCalls(connection)
        self.chat = AsyncChatCalls(connection)
        self.models = AsyncModelCalls(connection)
        self.casts = AsyncCastCalls(connection)
        self.server = AsyncServerCalls(connection)

    async def aclose(self) -> None:
        await self._http.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()


def _resolve_url(given: str | None) -> str:
    """The server's root. A trailing slash or OpenAI's `/v1` is dropped."""
    text = given or os.environ.get("MASQUERADE_URL") or DEFAULT_URL
    try:
        url = httpx.URL(text)
    except httpx.InvalidURL as error:
        raise InvalidSetting(f"the server's URL {text!r} is not a URL: {error}") from error
    if url.scheme not in {"http", "https"} or not url.host:
        raise InvalidSetting(f"the server's URL {text!r} must look like {DEFAULT_URL}")
    return text.rstrip("/").removesuffix("/v1").rstrip("/")


def _headers(api_key: str | None) -> dict[str, str]:
    headers = {"User-Agent": "masquerade-client"}
    if key := api_key or os.environ.get("MASQUERADE_API_KEY"):
        if not (key.isascii() and key.isprintable()) or key != key.strip():
            raise InvalidSetting("the API key holds characters that no HTTP header can carry")
        headers["Authorization"] = f"Bearer {key}"
    return headers
